//! The beats of a sandbox's agent: written to its heartbeat file, and missed. Called by the actor when a beat comes and when the time for one is
//! over; what a missing one means the machine decides.

use actix::prelude::*;
use msb_protocol::control::GuestMetrics;
use msb_protocol::guest::Beat;
use msb_protocol::id::BootId;

use super::SandboxActor;
use crate::sandbox::heartbeat::{Heartbeat, Verdict};
use crate::sandbox::machine::Event;

impl SandboxActor {
    pub(super) fn arm_beats(&mut self, ctx: &mut Context<Self>) {
        if let Some(timer) = self.beat_timer.take() {
            ctx.cancel_future(timer);
        }
        let now = self.now_ms();
        let stands = self.disk.is_held() || self.suspensions > 0;
        let Some(watch) = self.beats.as_mut() else { return };
        if stands {
            // Its machine may be standing to be written down: nothing beats then.
            watch.forgive(now);
        }
        match watch.look(now, || self.surroundings.pressure.is_starved()) {
            Verdict::LookAgain(at) => {
                let sleep = self.surroundings.clock.sleep_until(at);
                self.beat_timer = Some(ctx.spawn(sleep.into_actor(self).map(|(), this, ctx| {
                    this.beat_timer = None;
                    this.arm_beats(ctx);
                })));
            }
            Verdict::Silent => {
                self.beats = None;
                tracing::warn!(sandbox = %self.record.name, "the agent stopped beating");
                self.tell(Event::AgentSilent, ctx);
            }
        }
    }

    pub(super) fn hear_beat(&mut self, boot_id: BootId, beat: Beat, ctx: &mut Context<Self>) {
        let now_ms = self.now_ms();
        let Some(watch) = self.beats.as_mut() else { return };
        let due_ms = watch.due_ms();
        if !watch.hear(boot_id, beat.sequence, now_ms) {
            return;
        }
        // The first beat of a machine that was adopted ends the longer wait for it.
        let is_due_sooner = watch.due_ms() < due_ms;
        let heartbeat = Heartbeat::new(boot_id, &beat, self.surroundings.clock.wall());
        self.surroundings.heartbeats.write(self.record.id, &self.directories.heartbeat, heartbeat);
        if let Some(meter) = &self.meter {
            meter.note_guest(GuestMetrics {
                memory_used_bytes: beat.memory_used_bytes,
                memory_total_bytes: beat.memory_total_bytes,
                root_used_bytes: beat.root_used_bytes,
                root_free_bytes: beat.root_free_bytes,
                processes: beat.processes,
            });
        }
        if is_due_sooner || self.beat_timer.is_none() {
            self.arm_beats(ctx);
        }
    }
}
