//! The queue of starts: who waits, for how long, and how one leaves it.

use msb_actors::simulation::STARTS_AT_ONCE;
use msb_actors::starts::TURN_MAX_MS;

use super::*;

impl World {
    /// Waits, in real time, until so many VMs were launched, and a little longer for one too many.
    async fn until_launched(&self, count: usize) {
        for _ in 0..20_000 {
            if self.launcher.launched() == count as u64 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(self.launcher.launched(), count as u64);
    }

    fn ask_for(&self, text: &str) {
        let (daemon, request) = (self.daemon.clone(), request(detached(text)));
        tokio::spawn(async move { daemon.create(request, None).await.map(|_| ()) });
    }
}

#[test]
fn the_next_one_boots_when_one_is_up_or_has_had_its_time() {
    simulate(async |world| {
        world.launcher.fault(|faults| faults.silent_boot = true);
        for number in 0..STARTS_AT_ONCE + 3 {
            world.ask_for(&format!("s{number}"));
        }
        world.until_launched(STARTS_AT_ONCE).await;
        // One of those that boot is up: its place is the next one's.
        let booting = (0..STARTS_AT_ONCE + 3).map(|number| format!("s{number}"));
        let first = booting.into_iter().find(|text| world.launcher.spec_of(text).is_some()).unwrap();
        world.launcher.ready(&first);
        world.until(&first, SandboxState::Running).await;
        world.until_launched(STARTS_AT_ONCE + 1).await;
        // The others hang in their boots, and keep nobody any longer.
        world.turn(TURN_MAX_MS - 500).await;
        world.until_launched(STARTS_AT_ONCE + 1).await;
        world.turn(1_000).await;
        world.until_launched(STARTS_AT_ONCE + 3).await;
    });
}

#[test]
fn one_that_is_stopped_while_it_waits_leaves_the_queue_and_never_boots() {
    simulate(async |world| {
        world.launcher.fault(|faults| faults.silent_boot = true);
        for number in 0..STARTS_AT_ONCE {
            world.ask_for(&format!("s{number}"));
        }
        world.until_launched(STARTS_AT_ONCE).await;
        world.ask_for("late");
        world.until("late", SandboxState::Starting).await;
        // So long that it stands in the queue.
        world.until_launched(STARTS_AT_ONCE).await;
        world.daemon.stop(&name("late"), None, false).await.unwrap();
        // It never ran: nothing of it is left.
        world.until_gone("late").await;
        world.until_launched(STARTS_AT_ONCE).await;
        // Its place is not lost: who comes later has it.
        world.launcher.crash("s0", EndCause::VmmCrash);
        world.ask_for("later");
        for _ in 0..20_000 {
            if world.launcher.spec_of("later").is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("nobody has the place");
    });
}
