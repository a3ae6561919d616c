//! What the host can do: asked of `msb-vmm --probe` once, because a probe runs a scratch VM.

use std::path::PathBuf;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::vmm::ProbeReport;
use tokio::sync::OnceCell;

/// Time for a probe.
const PROBE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// The probe and its remembered answer.
#[derive(Debug)]
pub struct HostProbe {
    program: PathBuf,
    qemu: Option<PathBuf>,
    report: OnceCell<ProbeReport>,
}

impl HostProbe {
    /// A probe that was not run yet.
    #[must_use]
    pub fn new(program: PathBuf, qemu: Option<PathBuf>) -> Self {
        Self { program, qemu, report: OnceCell::new() }
    }

    /// What this host can do.
    ///
    /// # Errors
    /// `engine_unavailable` if the VM process's program cannot say.
    pub async fn report(&self) -> Result<ProbeReport, ApiError> {
        self.report.get_or_try_init(|| self.run()).await.cloned()
    }

    async fn run(&self) -> Result<ProbeReport, ApiError> {
        let failed = |why: String| {
            ApiError::new(ErrorCode::EngineUnavailable, format!("{} --probe: {why}", self.program.display()))
        };
        let mut command = tokio::process::Command::new(&self.program);
        command.arg("--probe").args(&self.qemu).env_clear().stdin(std::process::Stdio::null()).kill_on_drop(true);
        let output = match tokio::time::timeout(PROBE_TIMEOUT, command.output()).await {
            Ok(output) => output.map_err(|error| failed(error.to_string()))?,
            Err(_) => return Err(failed("no answer within 30 s".into())),
        };
        serde_json::from_slice(&output.stdout).map_err(|_| {
            let said = String::from_utf8_lossy(&output.stderr);
            failed(said.lines().last().unwrap_or("no report").to_owned())
        })
    }
}
