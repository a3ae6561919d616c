//! What an earlier daemon left behind and no record knows: VM processes of sandboxes that do not exist, their run directories,
//! temporary files. Runs once, before the socket is served; records themselves are recovered by their actors.

use std::path::Path;

use msb_actors::vm::{AdoptRequest, EventSink, Launcher};
use msb_protocol::id::{BootId, SandboxId};
use msb_protocol::paths::sandbox_run_dir;

/// Ends VM processes without a record and removes run directories without a sandbox.
pub async fn sweep(runtime_dir: &Path, known: &[SandboxId], launcher: &dyn Launcher) {
    let kept: Vec<_> = known.iter().map(|id| sandbox_run_dir(runtime_dir, *id)).collect();
    let Ok(entries) = std::fs::read_dir(runtime_dir.join("vm")) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| !kept.contains(path)) {
        // No run has this id, so whatever answers there is ended.
        let request = AdoptRequest {
            boot_id: BootId(uuid::Uuid::nil()),
            identity: None,
            run_dir: path.clone(),
            log_dir: path.clone(),
        };
        drop(launcher.adopt(request, EventSink::unheard()).await);
        match std::fs::remove_dir_all(&path) {
            Ok(()) => tracing::warn!(path = %path.display(), "a run directory of no sandbox was removed"),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a run directory of no sandbox could not be removed")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use msb_actors::clock::SystemClock;
    use msb_actors::simulation::FakeLauncher;
    use std::sync::Arc;

    #[tokio::test]
    async fn directories_of_sandboxes_stay_and_others_go() {
        let runtime = tempfile::tempdir().unwrap();
        let known = SandboxId::generate();
        let (kept, stale) = (sandbox_run_dir(runtime.path(), known), runtime.path().join("vm/0123456789abcdef"));
        for directory in [&kept, &stale] {
            std::fs::create_dir_all(directory).unwrap();
        }
        std::fs::write(stale.join("control.sock"), "").unwrap();
        let launcher = FakeLauncher::new(Arc::new(SystemClock::default()));
        sweep(runtime.path(), &[known], &launcher).await;
        assert!(kept.exists() && !stale.exists());
    }
}
