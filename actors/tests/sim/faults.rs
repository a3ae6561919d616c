//! A panic in each handler of each actor: at most the request that hit it fails, every VM lives on, and everything works afterwards.

use msb_actors::faults::injected;
use msb_actors::images::{ArchiveSource, LoadOptions};
use msb_protocol::control::LabelRequest;
use msb_protocol::error::ApiError;
use msb_protocol::snapshot::{CreateSnapshot, POOL_LABEL, TEMPLATE_LABEL};

use super::*;

/// Repeats a request until it is answered well; a request that meets the panic may fail once, and says that it can be repeated or why not.
async fn insist<T, F: Future<Output = Result<T, ApiError>>>(
    world: &World,
    what: &str,
    mut request: impl FnMut() -> F,
) -> T {
    let mut last = None;
    for _ in 0..200 {
        match request().await {
            Ok(answer) => return answer,
            Err(error) => last = Some(error),
        }
        world.clock.turn(50);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{what} fails for ever: {last:?}");
}

async fn up(world: &World, text: &str) -> SandboxDetail {
    let idle = (text == "idle").then_some(1_000);
    insist(world, "create", || async {
        let spec = SandboxSpec { idle_timeout_ms: idle, ..detached(text) };
        let request = request(spec);
        match world.daemon.create(request, None).await {
            // The first try came through after all.
            Err(error) if error.code == ErrorCode::SandboxAlreadyExists => world.daemon.inspect(&name(text)).await,
            outcome => outcome,
        }
    })
    .await
}

/// Something of everything.
async fn drive(world: &World) {
    let daemon = &world.daemon;
    up(world, "new").await;
    up(world, "idle").await;
    insist(world, "actors", || daemon.actors()).await;
    insist(world, "list", || daemon.list(&[])).await;
    // All are found already; they are looked at all the same.
    daemon.recovered(Duration::from_secs(1)).await;
    let (old, new) = (name("old"), name("new"));
    let request = LabelRequest { set: [("a".to_owned(), "b".to_owned())].into(), remove: Vec::new() };
    insist(world, "label", || daemon.label(&old, request.clone())).await;
    insist(world, "images", || daemon.list_images()).await;
    insist(world, "image", || daemon.inspect_image("busybox".into())).await;
    let load = || {
        let progress = tokio::sync::mpsc::channel(8).0;
        daemon.load_image(ArchiveSource::Stream(Box::new(&b"archive"[..])), LoadOptions::default(), progress)
    };
    insist(world, "load", load).await;
    insist(world, "ssh", || daemon.ssh(&old)).await;
    // A simulated VM has no policy to explain; it is asked all the same.
    let _ = daemon.explain_network(&old, "1.1.1.1:443".into()).await;
    insist(world, "rmi", || daemon.remove_image("app".into(), false)).await;
    insist(world, "check", || daemon.check_store()).await;
    for _ in 0..8 {
        world.turn(500).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let all = msb_actors::metrics::snapshot::Choice::default();
    insist(world, "metrics", || daemon.metrics(&all)).await;
    insist(world, "history", || daemon.metrics_history(&old, u64::MAX, 100)).await;
    insist(world, "pause", || daemon.pause(&new)).await;
    insist(world, "resume", || daemon.resume(&new)).await;
    snapshot(world, true).await;
    insist(world, "stop", || daemon.stop(&new, None, false)).await;
    snapshot(world, false).await;
    insist(world, "start", || daemon.start(&new, false)).await;
    gone(world, "new").await;
    gone(world, "idle").await;
}

/// Of `new`, which is at rest, or runs if its memory is wanted.
async fn snapshot(world: &World, memory: bool) {
    let daemon = &world.daemon;
    insist(world, "snapshot", || async {
        let labels = [(TEMPLATE_LABEL, "true"), (POOL_LABEL, "1")].map(|(key, value)| (key.into(), value.into()));
        let request = CreateSnapshot { name: name("kept"), from: name("new"), labels: labels.into(), memory };
        match daemon.take_snapshot(request).await {
            Err(error) if error.code == ErrorCode::SnapshotAlreadyExists => daemon.inspect_snapshot("kept").await,
            outcome => outcome,
        }
    })
    .await;
    insist(world, "inspect", || daemon.inspect_snapshot("kept")).await;
    assert_eq!(insist(world, "snapshots", || daemon.list_snapshots()).await.len(), 1);
    if memory {
        // A ready fork of it may stand or not.
        let spec = insist(world, "inspect", || daemon.inspect_snapshot("kept")).await.spec;
        insist(world, "copy", || async {
            let own =
                SandboxSpec { name: Some(name("copy")), snapshot: Some(name("kept")), detached: true, ..spec.clone() };
            let request = request(own);
            match daemon.create(request, None).await {
                Err(error) if error.code == ErrorCode::SandboxAlreadyExists => Ok(()),
                outcome => outcome.map(drop),
            }
        })
        .await;
        gone(world, "copy").await;
    }
    insist(world, "snapshot rm", || async {
        match daemon.remove_snapshot(name("kept")).await {
            Err(error) if error.code == ErrorCode::SnapshotNotFound => Ok(()),
            outcome => outcome,
        }
    })
    .await;
}

async fn gone(world: &World, text: &str) {
    insist(world, "rm", || async {
        match world.daemon.remove(&name(text), true).await {
            Err(error) if error.code == ErrorCode::SandboxNotFound => Ok(()),
            outcome => outcome,
        }
    })
    .await;
}

#[test]
fn a_panic_in_each_handler_of_each_actor_costs_one_request_at_most() {
    for place in injected::PLACES {
        // The first time it is entered, and later ones: in another phase of something's life.
        for pass in [0, 2] {
            simulate(|world| async move {
                let boot = up(&world, "old").await.boot_id;
                let before = injected::fired();
                injected::arm(place, pass);
                let world = if *place == "supervisor/started" {
                    // Only a daemon that starts enters it; the next incarnation finds what this one did not.
                    world.restart_daemon().await
                } else {
                    world
                };
                drive(&world).await;
                injected::disarm();
                assert!(pass > 0 || injected::fired() == before + 1, "{place} is never entered");
                let old = world.until("old", SandboxState::Running).await;
                assert_eq!(old.boot_id, boot, "{place}: a VM was lost");
                assert_eq!(world.launcher.alive(), 1, "{place}");
                up(&world, "after").await;
                gone(&world, "after").await;
                let tree = world.daemon.actors().await.unwrap();
                if injected::fired() > before {
                    let told = tree.actors.iter().any(|row| row.restarts == 1 && row.last_cause.is_some());
                    // What died with its sandbox is shown no more.
                    assert!(told || place.starts_with("sandbox/"), "{place}: {tree:?}");
                }
                gone(&world, "old").await;
                let world = world.restart_daemon().await;
                assert!(world.daemon.list(&[]).await.unwrap().is_empty(), "{place}");
                assert_eq!(world.launcher.alive(), 0, "{place}");
            });
        }
    }
}

/// Holds the list above against the sources, so that a new handler cannot be forgotten.
#[test]
fn every_handler_is_a_place_and_every_place_is_in_the_list() {
    let mut files = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    let (mut found, mut bare) = (BTreeSet::new(), Vec::new());
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if let Some(place) = line.trim().strip_prefix("faults::here(\"").and_then(|rest| rest.strip_suffix("\");"))
            {
                assert!(found.insert(place.to_owned()), "{place} stands twice");
            }
            let until = (number + 6).min(lines.len());
            let injected = lines[number..until].iter().any(|line| line.contains("faults::here("));
            // What tests send and what ends an actor are no handlers of requests.
            let exempt = ["LetGo", "PanicNow"].iter().any(|word| line.contains(word));
            if line.trim_start().starts_with("fn handle(") && !injected && !exempt {
                bare.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert_eq!(bare, [""; 0], "handlers without a place");
    assert_eq!(found, injected::PLACES.iter().map(|place| (*place).to_owned()).collect());
}
