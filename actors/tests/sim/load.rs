//! Many sandboxes in one daemon: created, beating, idling out, crashing, stopped and started at random while the clock is turned.
//!
//! A few hundred for two minutes of the clock prove the rules in seconds; `cargo xtask soak` runs 10,000 for an hour and then also holds the
//! times against each other (`MSB_SIM_SANDBOXES`, `MSB_SIM_SECONDS`, `MSB_SIM_STRICT`).

#![expect(clippy::print_stdout, reason = "its figures are what the soak is run for")]

use std::collections::BTreeMap;
use std::time::Instant;

use msb_protocol::control::SandboxSummary;

use super::*;

/// xorshift: the same fleet each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

async fn grow(world: &World, random: &mut Random, from: usize, to: usize) {
    for number in from..to {
        let idle_timeout_ms = (random.below(2) == 0).then(|| 10_000 + random.below(120_000));
        let on_idle = if random.below(2) == 0 { OnIdle::Restart } else { OnIdle::Stop };
        let restart = match random.below(3) {
            0 => RestartPolicy::Default,
            1 => RestartPolicy::Always,
            _ => RestartPolicy::OnFailure { max_retries: Some(3) },
        };
        world.create(SandboxSpec { idle_timeout_ms, on_idle, restart, ..detached(&format!("s{number}")) }).await;
    }
}

/// The 99th of 100 times of a durable operation and of one that only looks, in microseconds.
async fn p99_us(world: &World, random: &mut Random, count: usize) -> (u128, u128) {
    let (mut times, mut looks) = (Vec::new(), Vec::new());
    for _ in 0..400 {
        let picked = name(&format!("s{}", random.below(count as u64)));
        let began = Instant::now();
        world.daemon.inspect(&picked).await.unwrap();
        looks.push(began.elapsed().as_micros());
        let set = [("tick".to_owned(), random.below(1_000).to_string())].into();
        let began = Instant::now();
        let request = msb_protocol::control::LabelRequest { set, remove: Vec::new() };
        // One whose actor is between two incarnations is not there to be measured; there is none in this test.
        world.daemon.label(&picked, request).await.unwrap();
        times.push(began.elapsed().as_micros());
    }
    times.sort_unstable();
    looks.sort_unstable();
    (times[times.len() * 99 / 100], looks[looks.len() * 99 / 100])
}

/// Waits until nothing is under way, while the clock stands.
async fn settle(world: &World) -> Vec<SandboxSummary> {
    let mut last = Vec::new();
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let all = world.daemon.list(&[]).await.unwrap();
        let moving = [SandboxState::Starting, SandboxState::Draining, SandboxState::Stopping];
        if all == last && !all.iter().any(|summary| moving.contains(&summary.status)) {
            return all;
        }
        last = all;
    }
}

#[test]
fn a_fleet_that_beats_idles_and_crashes_at_random_agrees_with_its_journal() {
    let (count, seconds) = (number("MSB_SIM_SANDBOXES", 200), number("MSB_SIM_SECONDS", 120));
    let strict = std::env::var_os("MSB_SIM_STRICT").is_some();
    System::new().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(TurnedClock::default());
        let launcher = FakeLauncher::new(clock.clone());
        let daemon = daemon(directory.path(), clock.clone(), launcher.clone());
        let world = World { directory, clock, launcher, daemon };
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let few = count.min(100);
        grow(&world, &mut random, 0, few).await;
        let ((few_us, few_look_us), few_bytes) = (p99_us(&world, &mut random, few).await, resident_bytes());
        let began = Instant::now();
        grow(&world, &mut random, few, count).await;
        let grown = began.elapsed();
        let ((many_us, many_look_us), many_bytes) = (p99_us(&world, &mut random, count).await, resident_bytes());
        println!("p99 of a durable change: {few_us} us with {few} sandboxes, {many_us} us with {count}");
        println!("p99 of a look at one: {few_look_us} us with {few} sandboxes, {many_look_us} us with {count}");
        if count > few {
            println!("memory of a sandbox: {} bytes", many_bytes.saturating_sub(few_bytes) / (count - few));
            println!("creation of a sandbox: {} us", grown.as_micros() / (count - few) as u128);
        }

        for second in 0..seconds {
            for _ in 0..count.div_ceil(100) {
                let text = format!("s{}", random.below(count as u64));
                match random.below(5) {
                    0 => world.launcher.crash(&text, EndCause::VmmCrash),
                    1 => world.launcher.exit_main(&text, ProcessEnd::exited(1)),
                    2 => drop(world.daemon.touch(&name(&text)).await),
                    // Refused while another operation is under way, and that is fine; not waited for, as by many clients.
                    3 => {
                        let daemon = world.daemon.clone();
                        tokio::task::spawn_local(async move { daemon.start(&name(&text), false).await });
                    }
                    _ => {
                        let daemon = world.daemon.clone();
                        tokio::task::spawn_local(async move { daemon.stop(&name(&text), Some(100), false).await });
                    }
                }
            }
            for _ in 0..4 {
                world.clock.turn(250);
                // Beats are a silence of the host's making when nobody had a turn to send them.
                tokio::time::sleep(Duration::from_millis(1 + count as u64 / 200)).await;
            }
            if strict && second % 600 == 0 {
                println!("{second} s: {} VMs", world.launcher.alive());
            }
        }

        let shown = settle(&world).await;
        assert_eq!(shown.len(), count, "a sandbox is lost or doubled");
        let journal = &world.daemon.surroundings().journal;
        let mut live = 0;
        for summary in &shown {
            let record =
                journal.load(summary.id).await.unwrap_or_else(|| panic!("{} is not in the journal", summary.name));
            let detail = world.daemon.inspect(&summary.name).await.unwrap();
            let (machine, _) = msb_actors::sandbox::machine::Machine::recover(
                msb_actors::sandbox::machine::Policy {
                    restart: RestartPolicy::Default,
                    ..msb_actors::sandbox::machine::Policy::of(&record.spec)
                },
                &record.machine,
                0,
            );
            assert_eq!(
                (machine.shown(), machine.run().map(|run| run.boot_id)),
                (summary.status, detail.boot_id),
                "{}",
                summary.name
            );
            live += usize::from(summary.status.is_live());
        }
        assert_eq!(world.launcher.alive(), live, "VMs and live sandboxes differ");
        let boots = world.launcher.boots();
        assert_eq!(boots.iter().collect::<BTreeSet<_>>().len(), boots.len(), "a boot id is used twice");
        println!("{} runs, {live} live at the end", boots.len());

        let world = world.restart_daemon().await;
        let again = settle(&world).await;
        let by_id: BTreeMap<_, _> = again.iter().map(|summary| (summary.id, summary)).collect();
        assert_eq!(by_id.len(), count);
        for summary in shown.iter().filter(|summary| summary.status == SandboxState::Running) {
            assert_eq!(by_id[&summary.id].status, SandboxState::Running, "{} was not adopted", summary.name);
        }
        if strict {
            assert!(many_us * 2 <= few_us * 3, "p99 grows with the fleet: {few_us} us to {many_us} us");
        }
    });
}

/// Processor time of this whole process: the daemon, and the fake machines that beat for it.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}

/// On the host's own clock, because it is what the daemon costs that counts. The soak runs it long enough to hold the figures to their promise.
#[test]
fn idle_sandboxes_cost_next_to_nothing_and_a_crash_is_answered_at_once() {
    let (count, seconds) = (number("MSB_SIM_IDLE_SANDBOXES", 20), number("MSB_SIM_IDLE_SECONDS", 1));
    let strict = std::env::var_os("MSB_SIM_STRICT").is_some();
    System::new().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(msb_actors::clock::SystemClock::default());
        let launcher = FakeLauncher::new(clock.clone());
        let daemon = daemon(directory.path(), clock.clone(), launcher.clone());
        for number in 0..count {
            let spec = detached(&format!("s{number}"));
            let request = request(spec);
            daemon.create(request, None).await.unwrap();
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = processor_time();
        tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
        let percent = (processor_time() - before).as_secs_f64() * 100.0 / seconds as f64;
        println!("{count} idle sandboxes, their fake machines included: {percent:.2} % of a core over {seconds} s");

        let mut waits = Vec::new();
        for number in 0..count {
            let launched = launcher.launched();
            let began = Instant::now();
            launcher.crash(&format!("s{number}"), EndCause::VmmCrash);
            while launcher.launched() == launched {
                assert!(began.elapsed() < Duration::from_secs(60), "s{number} is not restarted");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            waits.push(began.elapsed().saturating_sub(Duration::from_millis(BACK_OFF_MS)).as_millis());
        }
        waits.sort_unstable();
        let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
        println!("from a crash to the next process, without the back-off: median {median} ms, longest {longest} ms");
        if strict {
            assert!(percent < 0.5, "{percent} % of a core");
            assert!(longest < 150, "{longest} ms");
        }
    });
}

/// The first wait of a restart, which is not part of what is measured.
const BACK_OFF_MS: u64 = 100;
