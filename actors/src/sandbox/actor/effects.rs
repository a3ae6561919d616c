//! What the machine of a sandbox wants done, and what becomes of it: the image, the disks, the VM, the files.
//!
//! ```text
//!  perform(effects) ─► a task for each that takes time ─► News ─► hear ─► the machine's next event
//! ```
//!
//! Called by the actor once a change is durable. Nothing here waits in a handler, and nothing decides what comes next.

use std::sync::Arc;

use actix::prelude::*;
use msb_protocol::error::ApiError;
use msb_protocol::id::BootId;
use msb_protocol::labels;
use msb_protocol::spec::Workload;
use msb_protocol::state::SandboxState;
use msb_protocol::vmm::{RestoreSpec, VmSpec, VmState};
use tokio::sync::{mpsc, oneshot};

use super::{SandboxActor, ends, sleeping};
use crate::faults;
use crate::images::{MakeUpper, Prepare, PreparedImage};
use crate::journal::{Change, EventDraft};
use crate::metrics::meter::{Meter, Subject};
use crate::metrics::{Forget, LastWords};
use crate::pool::{Ready, Take};
use crate::sandbox::directories::written;
use crate::sandbox::machine::{Effect, Event, StartPhase, State};
use crate::sandbox::network::BoundPorts;
use crate::sandbox::probe::Probed;
use crate::sandbox::view::{self, View};
use crate::sandbox::{mounts, plan};
use crate::starts::Turn;
use crate::supervisor::Surroundings;
use crate::vm::{AdoptRequest, Adoption, EventSink, Spare, VmCommand, VmHandle};

/// News from the actor's own tasks.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) enum News {
    Leased(Result<PreparedImage, ApiError>),
    Disks(Result<Option<Restore>, ApiError>),
    Suspended(sleeping::Attempt, Result<(), ApiError>),
    Spawned(Result<(VmHandle, Turn), ApiError>),
    Adopted(Adoption),
    FilesRemoved(Result<(), ApiError>),
    Examined(BootId, Probed),
    Hooked(BootId, Probed),
}

/// What a start goes on with in place of booting.
pub(super) struct Restore {
    pub(super) files: RestoreSpec,
    /// A VM that stands by with it.
    pub(super) spare: Option<Box<dyn Spare>>,
}

impl SandboxActor {
    pub(super) fn perform(&mut self, effects: Vec<Effect>, ctx: &mut Context<Self>) {
        for effect in effects {
            match effect {
                Effect::Record { .. } | Effect::EndRun { .. } | Effect::FailStart => {}
                Effect::LeaseImage => self.lease(ctx),
                Effect::MakeDisks => self.make_disks(ctx),
                Effect::SpawnVm => self.spawn_vm(ctx),
                Effect::ReleaseImage => self.image = None,
                Effect::ResumeVm => self.resume_vm(),
                Effect::Suspend => self.suspend(ctx),
                Effect::GoOn => self.command(VmCommand::Release),
                Effect::RunHook => self.run_hook(ctx),
                Effect::Shutdown { cause, grace_ms } => self.command(VmCommand::Shutdown { cause, grace_ms }),
                Effect::KillVm { cause } => self.command(VmCommand::Kill { cause }),
                Effect::Adopt => self.adopt(ctx),
                Effect::RemoveFiles => self.remove_files(ctx),
            }
        }
    }

    pub(super) fn later(&self, ctx: &mut Context<Self>, work: impl Future<Output = News> + 'static) {
        ctx.spawn(work.into_actor(self).map(|news, this, ctx| this.hear(news, ctx)));
    }

    fn lease(&mut self, ctx: &mut Context<Self>) {
        self.failure = None;
        // With a snapshot it is first looked for a ready fork.
        if self.record.snapshot.is_none() {
            self.surroundings.expect_start(&self.record.spec);
        }
        if self.record.spec.root.is_local() {
            let root = PreparedImage::local(&self.record.spec.image);
            return self.later(ctx, async move { News::Leased(Ok(root)) });
        }
        // A sandbox keeps the image it was made from, whatever its reference means by now.
        let wanted = if self.record.image_digest.is_empty() {
            self.record.spec.image.clone()
        } else {
            self.record.image_digest.clone()
        };
        let images = self.surroundings.images.clone();
        self.later(ctx, async move {
            News::Leased(
                images
                    .send(Prepare(wanted))
                    .await
                    .unwrap_or_else(|error| Err(ApiError::internal(format!("the image actor: {error}")))),
            )
        });
    }

    fn make_disks(&mut self, ctx: &mut Context<Self>) {
        if let Err(error) = self.bind_ports() {
            return self.hear(News::Disks(Err(error)), ctx);
        }
        let (directories, images, size_mib) =
            (self.directories.clone(), self.surroundings.images.clone(), self.record.spec.root_size_mib);
        let (volumes, spec) = (self.surroundings.volumes(), self.record.spec.clone());
        let (snapshots, begun_with) = (self.surroundings.snapshots.clone(), self.record.snapshot.clone());
        let surroundings = Arc::clone(&self.surroundings);
        // A spec that makes no sense is told by the start itself.
        let wanted = begun_with.as_ref().and_then(|_| self.vm_spec()?.ok());
        let wakes = self.machine.run().and_then(|run| run.wakes);
        self.later(ctx, async move {
            // Whether it is needed is seen below; a sandbox that has its disk does not need the snapshot any more.
            let snapshot = match &begun_with {
                Some(parent) => Some(snapshots.find(&parent.id).await),
                None => None,
            };
            // One for a disk that is there already stays in the pool.
            let ready = match (&snapshot, wanted) {
                (Some(Ok(snapshot)), Some(spec))
                    if snapshot.manifest.pool_size() > 0 && !directories.upper.exists() =>
                {
                    surroundings
                        .pool
                        .send(Take { snapshot: snapshot.id.clone(), spec: Box::new(spec) })
                        .await
                        .ok()
                        .flatten()
                }
                _ => None,
            };
            if begun_with.is_some() && ready.is_none() {
                surroundings.expect_start(&spec);
            }
            let prepared = {
                tokio::task::spawn_blocking(move || {
                    directories.prepare()?;
                    let kept = wakes.map(|run| directories.kept_memory(run)).transpose()?;
                    let mut restore = kept.map(|files| Restore { files, spare: None });
                    let mut disks = mounts::missing_disks(&spec, &volumes)?;
                    if !directories.upper.exists() {
                        match snapshot {
                            None => disks.push((directories.upper, size_mib)),
                            Some(snapshot) => {
                                let snapshot = snapshot?;
                                let (size_bytes, bytes) =
                                    (snapshot.manifest.disk.size_bytes, u64::from(size_mib) << 20);
                                let moved = ready.and_then(|Ready { place, spare, .. }| {
                                    place.move_to(&directories).ok().map(|()| spare)
                                });
                                if moved.is_none() {
                                    snapshots.files.clone_disk(
                                        &snapshot.name,
                                        size_bytes,
                                        &directories.upper,
                                        bytes,
                                    )?;
                                }
                                if snapshot.manifest.memory.is_some() {
                                    let mut files = snapshots.files.memory_files(&snapshot.name);
                                    if snapshot.manifest.transient {
                                        // It is gone soon; the next copies of the same source go by these.
                                        files.written =
                                            Some(written(&surroundings.home.sandbox(&snapshot.manifest.source)));
                                    }
                                    restore = Some(Restore { files, spare: moved });
                                }
                            }
                        }
                    }
                    Ok((disks, restore))
                })
                .await
            };
            let made = match prepared {
                Ok(Ok((disks, restore))) => {
                    let mut made = Ok(());
                    for (path, size_mib) in disks {
                        if made.is_ok() {
                            made = images
                                .send(MakeUpper { path, size_mib })
                                .await
                                .unwrap_or_else(|error| Err(ApiError::internal(format!("the image actor: {error}"))));
                        }
                    }
                    made.map(|()| restore)
                }
                Ok(Err(error)) => Err(error),
                Err(error) => Err(ApiError::internal(format!("making directories: {error}"))),
            };
            News::Disks(made)
        });
    }

    /// The VM of the run that begins; none without an image.
    fn vm_spec(&self) -> Option<Result<VmSpec, ApiError>> {
        let (run, image) = (self.machine.run()?, self.image.as_ref()?);
        Some(plan::vm_spec(
            (self.record.id, &self.record.name),
            (&self.record.spec, self.ports.ports()),
            run,
            (&image.config, image.lower.clone()),
            &self.surroundings.host,
            &self.directories,
            &self.surroundings.volumes(),
        ))
    }

    fn spawn_vm(&mut self, ctx: &mut Context<Self>) {
        let spec = self.vm_spec().unwrap_or_else(|| Err(ApiError::internal("a start without an image")));
        match spec {
            Err(error) => self.hear(News::Spawned(Err(error)), ctx),
            Ok(mut spec) => {
                let mut stands_by = None;
                if let Some(Restore { files, spare }) = self.restore.take() {
                    spec.restore = Some(files);
                    stands_by = spare;
                }
                let events = self.listen(spec.boot_id);
                let (spec, listeners) = (Box::new(spec), self.ports.listeners());
                // The turn of a start that failed just now, if this one follows it, is over.
                self.turn = None;
                let (place, left) = oneshot::channel();
                self.queued = Some(place);
                let (turn, launcher) = (self.surroundings.starts.enter(), Arc::clone(&self.surroundings.launcher));
                self.later(ctx, async move {
                    let turn = tokio::select! {
                        turn = turn => turn,
                        _ = left => return News::Spawned(Err(ends::cancelled())),
                    };
                    // One that died since it was taken is a crash: its disk has been its own, and does not fit the template's memory.
                    let launching = match stands_by {
                        Some(spare) => spare.launch(spec, listeners, events),
                        None => launcher.launch(spec, listeners, events),
                    };
                    News::Spawned(launching.await.map(|vm| (vm, turn)))
                });
            }
        }
    }

    /// A start that is given up leaves the queue, and one that is over makes room in it.
    pub(super) fn mind_turn(&mut self) {
        match self.machine.state() {
            State::Starting { abandon: None, .. } => {}
            State::Starting { .. } => self.queued = None,
            _ => (self.queued, self.turn) = (None, None),
        }
    }

    fn adopt(&mut self, ctx: &mut Context<Self>) {
        let Some(run) = self.machine.run() else { return };
        let request = AdoptRequest {
            boot_id: run.boot_id,
            identity: self.record.vmm.clone(),
            run_dir: self.directories.run.clone(),
            log_dir: self.directories.logs.clone(),
        };
        let events = self.listen(run.boot_id);
        let adopting = self.surroundings.launcher.adopt(request, events);
        self.later(ctx, async move { News::Adopted(adopting.await) });
    }

    /// A channel for the events of one run; those of another are dropped where they arrive. They wait in it until the actor knows
    /// the VM they come from ([`Self::hear_events`]): a fast VM is ready before the news of its launch is here, and an event that
    /// the machine cannot place yet would be lost.
    fn listen(&mut self, boot_id: BootId) -> EventSink {
        let subject = Subject::new(self.record.id, self.record.name.clone(), boot_id);
        let Surroundings { metrics, clock, .. } = &*self.surroundings;
        let meter = Meter::new(subject, metrics.clone(), Arc::clone(clock), Arc::clone(&self.activity));
        self.meter = Some(Arc::clone(&meter));
        let (sink, events) = EventSink::new(meter);
        self.coming = Some((boot_id, events));
        sink
    }

    /// From now on the events of the run just launched or adopted are heard.
    fn hear_events(&mut self, ctx: &mut Context<Self>) {
        let Some((boot_id, events)) = self.coming.take() else { return };
        ctx.add_stream(futures_util::stream::unfold(events, move |mut events| async move {
            events.recv().await.map(|event| ((boot_id, event), events))
        }));
    }

    pub(super) fn command(&mut self, command: VmCommand) {
        let Some(vm) = &self.vm else { return };
        if let Err(mpsc::error::TrySendError::Full(command)) = vm.commands.try_send(command) {
            // The driver is busy with the VM's own socket; the command must still arrive.
            let commands = vm.commands.clone();
            tokio::spawn(async move { commands.send(command).await });
        }
    }

    fn remove_files(&mut self, ctx: &mut Context<Self>) {
        let directories = self.directories.clone();
        self.later(ctx, async move {
            let removed = tokio::task::spawn_blocking(move || directories.remove()).await;
            News::FilesRemoved(
                removed.unwrap_or_else(|error| Err(ApiError::internal(format!("removing files: {error}")))),
            )
        });
    }

    fn hear(&mut self, news: News, ctx: &mut Context<Self>) {
        faults::here("sandbox/news");
        let (event, failure) = match news {
            News::Leased(Ok(image)) => {
                // Once: what is changed later is the user's, also where it took a label of the image away.
                if self.record.image_digest.is_empty() {
                    self.record.labels = labels::merge(&image.config.labels, &self.record.spec.labels);
                }
                self.record.command = if self.record.spec.workload == Workload::Main {
                    plan::command_line(&self.record.spec, &image.config)
                } else {
                    Vec::new()
                };
                self.record.image_digest.clone_from(&image.digest);
                self.image = Some(image);
                (Event::PhaseDone(StartPhase::ImageLeased), None)
            }
            News::Disks(Ok(restore)) => {
                self.restore = restore;
                (Event::PhaseDone(StartPhase::DisksMade), None)
            }
            News::Spawned(Ok((vm, turn))) => {
                self.turn = Some(turn);
                self.record.vmm = Some(vm.identity.clone());
                self.vm = Some(vm);
                (Event::PhaseDone(StartPhase::VmSpawned), None)
            }
            News::Adopted(Adoption::Alive(vm, status, listeners)) => {
                self.record.vmm = Some(vm.identity.clone());
                self.vm = Some(vm);
                match BoundPorts::adopt(&self.record.ports, listeners) {
                    Some(ports) => self.ports = ports,
                    None => {
                        tracing::warn!(sandbox = %self.record.name, "the VM process did not give its published ports back");
                    }
                }
                self.note_status(&status);
                let ready = !matches!(status.state, VmState::Booting | VmState::SettingUp);
                self.tell(Event::Adopted { ready, paused: status.paused }, ctx);
                self.hear_events(ctx);
                self.watch_creator(ctx);
                return;
            }
            News::Adopted(Adoption::Gone(gone)) => {
                let event =
                    Event::VmEnded { cause: gone.cause, success: gone.main_end.is_some_and(|end| end.success()) };
                self.gone = Some(gone);
                self.tell(event, ctx);
                self.watch_creator(ctx);
                return;
            }
            News::Suspended(attempt, outcome) => return self.suspended(attempt, outcome, ctx),
            News::Examined(boot_id, probed) => return self.examined(boot_id, probed, ctx),
            News::Hooked(boot_id, probed) => return self.hooked(boot_id, &probed, ctx),
            News::FilesRemoved(outcome) => return self.files_removed(outcome, ctx),
            News::Leased(Err(error)) | News::Disks(Err(error)) | News::Spawned(Err(error)) => {
                (Event::PhaseFailed, Some(error))
            }
        };
        if failure.is_some() {
            self.failure = failure;
        }
        let launched = matches!(event, Event::PhaseDone(StartPhase::VmSpawned));
        self.tell(event, ctx);
        if launched {
            self.hear_events(ctx);
        }
    }

    fn files_removed(&mut self, outcome: Result<(), ApiError>, ctx: &mut Context<Self>) {
        if let Err(error) = outcome {
            // The record stays with its `removing` mark, so the next daemon tries again.
            tracing::error!(sandbox = %self.record.name, error = %error.message, "the files of a sandbox could not be removed");
            self.failure = Some(error);
        } else {
            let draft = EventDraft {
                sandbox: self.record.name.clone(),
                sandbox_id: self.record.id,
                boot_id: None,
                event: "removed".into(),
                state: SandboxState::Stopped,
                cause: None,
                actor: "supervisor".into(),
                message: String::new(),
            };
            let (journal, id) = (self.surroundings.journal.clone(), self.record.id);
            let removal = async move { journal.write(Change::Remove(id, draft)).await };
            ctx.wait(removal.into_actor(self).map(|outcome, this, ctx| {
                if let Err(error) = outcome {
                    tracing::error!(sandbox = %this.record.name, error = %error.message, "a removal could not be made durable");
                }
                this.vanish(ctx);
            }));
            return;
        }
        self.vanish(ctx);
    }

    fn vanish(&mut self, ctx: &mut Context<Self>) {
        if let Some(ssh) = self.ssh.take() {
            ssh.close();
        }
        let last_words = LastWords {
            labels: self.record.labels.clone(),
            restarts: self.machine.restarts(),
            created_at: self.record.created_at,
        };
        self.surroundings.metrics.forget(Forget { id: self.record.id, at_ms: self.now_ms(), last_words });
        self.guard.disarm();
        let mut view = View::clone(&self.view.borrow());
        view.gone = true;
        view.recovering = false;
        (view.failure, view.starts_failed, view.runs_ready) =
            (self.failure.clone(), self.starts_failed, self.runs_ready);
        view.detail = view::detail(&self.record, &self.machine, &self.directories, None);
        self.view.send_replace(Arc::new(view));
        ctx.stop();
    }
}
