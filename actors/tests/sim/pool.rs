//! Ready forks over fake VMs: they are made, taken, made again, and go with their template; without one a start makes everything itself.

use msb_protocol::mount::{Mount, MountOptions, MountSource};
use msb_protocol::network::{NetworkSpec, PortTransport, PublishedPort};
use msb_protocol::snapshot::{CreateSnapshot, POOL_LABEL, ReadyForks};
use msb_protocol::spec::EngineChoice;

use super::*;

/// A snapshot with memory that asks for so many.
async fn template(world: &World, size: &str) -> SandboxSpec {
    world.create(detached("web")).await;
    let labels = [(POOL_LABEL.into(), size.into())].into();
    let taking = CreateSnapshot { name: name("warm"), from: name("web"), labels, memory: true };
    world.daemon.take_snapshot(taking).await.unwrap().spec
}

async fn start(world: &World, text: &str, spec: &SandboxSpec) -> SandboxDetail {
    let own = SandboxSpec {
        name: Some(name(text)),
        snapshot: Some(name("warm")),
        detached: true,
        workload: Workload::Main,
        ..spec.clone()
    };
    world.create(own).await
}

async fn forks(world: &World) -> Option<ReadyForks> {
    world.daemon.inspect_snapshot("warm").await.unwrap().summary.ready_forks
}

/// Waits until so many stand, turning the clock as far as a refill waits.
async fn until_ready(world: &World, ready: u64) {
    for _ in 0..20_000 {
        if forks(world).await.is_some_and(|forks| forks.ready == ready) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{:?} in place of {ready}", forks(world).await);
}

/// Disks that nobody has yet.
fn disks(world: &World) -> usize {
    std::fs::read_dir(world.directory.path().join("pool")).unwrap().count()
}

#[test]
fn a_start_takes_a_ready_fork_and_another_is_made() {
    simulate(|world| async move {
        let spec = template(&world, "2").await;
        until_ready(&world, 2).await;
        assert_eq!(forks(&world).await, Some(ReadyForks { ready: 2, wanted: 2 }));
        assert_eq!(disks(&world), 2);
        let usage = world.daemon.disk_usage().await.unwrap();
        assert_eq!(usage.rows.iter().find(|row| row.kind == "ready forks").map(|row| row.count), Some(2));
        let everything = msb_actors::metrics::snapshot::Choice::default();
        assert_eq!(world.daemon.metrics(&everything).await.unwrap().ready_forks["warm"], 2);

        start(&world, "one", &spec).await;
        assert_eq!(world.launcher.launched_standing(), 1);
        assert!(world.launcher.spec_of("one").unwrap().restore.is_some());
        assert!(world.directory.path().join("sandboxes/one/upper.img").exists());
        // The sandbox has the processors first, then the next one is made.
        assert_eq!(forks(&world).await.unwrap().ready, 1);
        world.turn(2_000).await;
        until_ready(&world, 2).await;
        // A later start of the same sandbox has its disk, and takes none.
        world.daemon.stop(&name("one"), None, false).await.unwrap();
        world.daemon.start(&name("one"), false).await.unwrap();
        assert_eq!(world.launcher.launched_standing(), 1);

        world.daemon.remove_snapshot(name("warm")).await.unwrap();
        for _ in 0..20_000 {
            if disks(&world) == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{} disks of a template that is gone", disks(&world));
    });
}

#[test]
fn without_a_ready_fork_a_start_makes_everything_itself() {
    simulate(|world| async move {
        world.launcher.fault(|faults| faults.stand_by = true);
        let spec = template(&world, "1").await;
        start(&world, "one", &spec).await;
        assert_eq!((world.launcher.launched_standing(), forks(&world).await.unwrap().ready), (0, 0));
        // It is tried again, later.
        world.launcher.fault(|faults| faults.stand_by = false);
        world.turn(70_000).await;
        until_ready(&world, 1).await;
        // One that has died is none.
        world.launcher.fault(|faults| faults.spares_died = true);
        start(&world, "two", &spec).await;
        assert_eq!(world.launcher.launched_standing(), 0);
        assert!(world.launcher.spec_of("two").unwrap().restore.is_some());
        world.launcher.fault(|faults| faults.spares_died = false);
        // A service that begins makes its own.
        let world = world.restart_daemon().await;
        until_ready(&world, 1).await;
        assert_eq!(disks(&world), 1);
        start(&world, "three", &spec).await;
        assert_eq!(world.launcher.launched_standing(), 1);
    });
}

#[test]
fn a_start_that_asks_for_something_else_leaves_the_ready_fork_alone() {
    simulate(|world| async move {
        let spec = template(&world, "1").await;
        until_ready(&world, 1).await;
        let bind = std::net::Ipv4Addr::LOCALHOST.into();
        let published = PublishedPort { bind, host_port: 0, guest_port: 80, transport: PortTransport::default() };
        let network = NetworkSpec { ports: vec![published], ..spec.network.clone() };
        start(&world, "one", &SandboxSpec { network, ..spec.clone() }).await;
        assert_eq!((world.launcher.launched_standing(), forks(&world).await.unwrap().ready), (0, 1));
        assert!(world.directory.path().join("sandboxes/one/upper.img").exists());
        start(&world, "two", &spec).await;
        assert_eq!(world.launcher.launched_standing(), 1);
        // What stood by brought its folders.
        assert!(world.launcher.spec_of("two").unwrap().run_dir.exists());
    });
}

#[test]
fn a_snapshot_that_asks_for_none_has_none() {
    simulate(|world| async move {
        let spec = template(&world, "many").await;
        assert_eq!(forks(&world).await, None);
        start(&world, "one", &spec).await;
        assert_eq!((world.launcher.launched_standing(), disks(&world)), (0, 0));
    });
}

#[test]
fn a_machine_is_begun_before_it_is_known_whose_it_is_unless_one_stands_by() {
    simulate(|world| async move {
        let spec = template(&world, "1").await;
        let mut before = world.launcher.expected();
        assert!(before > 0, "the first start had none begun");
        until_ready(&world, 1).await;
        start(&world, "one", &spec).await;
        assert_eq!((world.launcher.launched_standing(), world.launcher.expected()), (1, before));
        // None stands by now.
        start(&world, "two", &spec).await;
        assert!(world.launcher.expected() > before, "a start with a snapshot had none begun");
        // A process sees what was mounted when it began, and engine qemu has no use for one.
        before = world.launcher.expected();
        let source = MountSource::Directory { path: world.directory.path().display().to_string() };
        let mount = Mount { target: "/mnt".into(), source, options: MountOptions::default() };
        world.create(SandboxSpec { mounts: vec![mount], ..detached("three") }).await;
        world.create(SandboxSpec { engine: EngineChoice::Qemu, ..detached("four") }).await;
        assert_eq!(world.launcher.expected(), before);
    });
}
