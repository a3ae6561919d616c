//! A daemon without VMs: a launcher whose machines are tasks, a store whose images are made up, a clock to turn.
//!
//! For the sim tier of this crate and the API tests of the daemon (feature `simulation`). What a fake VM does follows from its
//! main workload: `true` and `false` end at once, `sleep N` after N seconds of the clock, everything else never. [`FakeLauncher`]
//! injects what real ones suffer.

mod agent;
mod clock;
mod launcher;

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use msb_image::snapshot::SnapshotFiles;
use msb_protocol::control::{ImageConfigDetail, ImageDetail, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{
    DiskUsageRow, ImageRemoval, LoginReport, LoginRequest, PruneReport, PruneRequest, PullEvent, PullLayer,
    PullRequest, RegistryRow, SaveRequest,
};
use msb_protocol::paths::HomeLayout;
use msb_protocol::spec::EngineChoice;

use tokio_util::sync::CancellationToken;

pub use clock::TurnedClock;
pub use launcher::{FakeLauncher, Faults};

use crate::clock::Clock;
use crate::daemon::Daemon;
use crate::images::{ArchiveSource, ImageActor, ImageStore, ImageUsers, LoadOptions, PreparedImage};
use crate::journal::Journal;
use crate::metrics::MetricsHandle;
use crate::pool::{PoolActor, Workshop};
use crate::pressure::Pressure;
use crate::sandbox::heartbeat::HeartbeatWriter;
use crate::sandbox::plan::HostSettings;
use crate::snapshots::Snapshots;
use crate::starts::Starts;
use crate::supervisor::Surroundings;
use crate::vm::Launcher;

/// Images that exist: `busybox`, `app` (with every default an image can have).
#[derive(Debug, Default)]
pub struct FakeImages;

impl FakeImages {
    fn find(reference: &str) -> Result<(&'static str, ImageConfigDetail), ApiError> {
        let plain =
            ImageConfigDetail { cmd: vec!["sh".into()], env: vec!["PATH=/bin".into()], ..ImageConfigDetail::default() };
        match reference {
            "busybox" | "sha256:b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0" => {
                Ok(("sha256:b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0", plain))
            }
            "app" | "sha256:a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0" => Ok((
                "sha256:a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0",
                ImageConfigDetail {
                    labels: [("team".to_owned(), "ml".to_owned())].into(),
                    user: "app".into(),
                    ..plain
                },
            )),
            _ => {
                Err(ApiError::new(ErrorCode::ImageNotFound, format!("no image {reference}; there are busybox and app")))
            }
        }
    }
}

impl ImageStore for FakeImages {
    fn prepare(&self, reference: &str) -> Result<PreparedImage, ApiError> {
        let (digest, config) = Self::find(reference)?;
        Ok(PreparedImage { digest: digest.into(), config, lower: Vec::new(), lease: Arc::new(()) })
    }
    fn make_upper(&self, path: &Path, _: u32) -> Result<(), ApiError> {
        std::fs::write(path, b"").map_err(|error| ApiError::new(ErrorCode::DiskFull, error.to_string()))
    }
    fn list(&self) -> Result<Vec<ImageSummary>, ApiError> {
        ["busybox", "app"].into_iter().map(|name| self.inspect(name).map(|detail| detail.summary)).collect()
    }
    fn inspect(&self, reference: &str) -> Result<ImageDetail, ApiError> {
        let (digest, config) = Self::find(reference)?;
        let summary = ImageSummary {
            digest: digest.into(),
            references: vec![reference.into()],
            platform: "linux/amd64".into(),
            compressed_bytes: 1,
            unpacked_bytes: 2,
            layers: 1,
            created_at: None,
            loaded_at: jiff::Timestamp::UNIX_EPOCH,
            pinned: false,
        };
        Ok(ImageDetail {
            summary,
            complete: true,
            config,
            layer_details: Vec::new(),
            used_by: Vec::new(),
            used_by_snapshots: Vec::new(),
            history: Vec::new(),
        })
    }
    fn remove(&self, reference: &str, force: bool, users: &ImageUsers) -> Result<ImageRemoval, ApiError> {
        let (digest, _) = Self::find(reference)?;
        match users.get(digest) {
            Some(names) if !force => {
                let names: Vec<String> = names.iter().map(ToString::to_string).collect();
                Err(ApiError::new(ErrorCode::ImageInUse, format!("{reference} is in use by {}", names.join(", "))))
            }
            _ => Ok(ImageRemoval { untagged: vec![reference.into()], ..ImageRemoval::default() }),
        }
    }
    fn save(&self, what: &SaveRequest, out: &mut dyn Write) -> Result<(), ApiError> {
        for reference in &what.references {
            Self::find(reference)?;
        }
        out.write_all(what.references.join(",").as_bytes()).map_err(ApiError::internal)
    }
    fn tag(&self, reference: &str, _: &str) -> Result<ImageSummary, ApiError> {
        self.inspect(reference).map(|detail| detail.summary)
    }
    fn pin(&self, reference: &str, pinned: bool) -> Result<ImageSummary, ApiError> {
        self.inspect(reference).map(|detail| ImageSummary { pinned, ..detail.summary })
    }
    fn prune(&self, request: &PruneRequest, users: &ImageUsers) -> Result<PruneReport, ApiError> {
        let unused = self.list()?.into_iter().filter(|image| !users.contains_key(&image.digest)).count() as u64;
        Ok(PruneReport { dry_run: request.dry_run, manifests_removed: unused, ..PruneReport::default() })
    }
    fn usage(&self, _: &ImageUsers) -> Result<Vec<DiskUsageRow>, ApiError> {
        Ok(vec![DiskUsageRow { kind: "images".into(), count: 2, bytes: 2, ..DiskUsageRow::default() }])
    }
    fn has(&self, reference: &str) -> Result<bool, ApiError> {
        Ok(Self::find(reference).is_ok())
    }
    /// The only registry of this world has what the store has.
    fn pull(
        &self,
        request: &PullRequest,
        _: &CancellationToken,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<(ImageSummary, bool), ApiError> {
        let summary = self.inspect(&request.reference)?.summary;
        let layers = vec![PullLayer { digest: "sha256:1a".into(), bytes: 10 }];
        progress(PullEvent::Resolved { digest: summary.digest.clone(), platform: summary.platform.clone(), layers });
        progress(PullEvent::LayerDone { digest: "sha256:1a".into(), known: true });
        Ok((summary, true))
    }
    fn login(&self, request: &LoginRequest) -> Result<LoginReport, ApiError> {
        if request.credentials.password != "right" {
            return Err(ApiError::new(ErrorCode::RegistryDenied, "it refuses the name or the password"));
        }
        Ok(LoginReport { registry: request.registry.clone(), stored_in: "nowhere".into() })
    }
    fn logout(&self, _: &str) -> Result<(), ApiError> {
        Ok(())
    }
    fn registries(&self) -> Result<Vec<RegistryRow>, ApiError> {
        Ok(vec![RegistryRow { registry: "r.test".into(), ..RegistryRow::default() }])
    }
    fn load(
        &self,
        archive: ArchiveSource,
        _: &LoadOptions,
        progress: &mut dyn FnMut(LoadEvent) -> ControlFlow<()>,
    ) -> Result<Vec<ImageSummary>, ApiError> {
        let mut archive: Box<dyn Read> = match archive {
            ArchiveSource::Stream(stream) => stream,
            ArchiveSource::File(file) => Box::new(file),
        };
        let mut buffer = vec![0; 64 << 10];
        let mut bytes = 0u64;
        loop {
            let read = archive
                .read(&mut buffer)
                .map_err(|error| ApiError::new(ErrorCode::InvalidArchive, error.to_string()))?;
            if read == 0 {
                break;
            }
            bytes += read as u64;
            let _ = progress(LoadEvent::Progress { bytes });
        }
        if bytes == 0 {
            return Err(ApiError::new(ErrorCode::InvalidArchive, "the archive is empty"));
        }
        self.list()
    }
    fn check(&self) -> Result<StoreReport, ApiError> {
        Ok(StoreReport { images: 2, ..StoreReport::default() })
    }
}

/// VMs of the simulator that boot at once.
pub const STARTS_AT_ONCE: usize = 64;

/// Where a simulated host tells how many wait for its processors; missing, it has enough of them.
pub const PRESSURE_FILE: &str = "pressure";

/// A daemon over fakes in a directory. Dropping it and making another over the same directory is a restart of the daemon.
///
/// # Panics
/// If the directory cannot be used.
#[must_use]
pub fn daemon(directory: &Path, clock: Arc<dyn Clock>, launcher: Arc<FakeLauncher>) -> Daemon {
    let (journal, found) = open_journal(directory, &clock);
    let files = SnapshotFiles::new(HomeLayout::new(directory).snapshots());
    let home = HomeLayout::new(directory);
    let launcher: Arc<dyn Launcher> = Arc::new(launcher);
    let snapshots = Snapshots::start(files, journal.clone(), clock.clone());
    let images = ImageActor::keep(Arc::new(FakeImages), clock.clone());
    let host = HostSettings {
        kernel: "/fake/vmlinux".into(),
        initramfs: "/fake/initramfs".into(),
        cmdline_extra: Vec::new(),
        qemu: None,
        engine: EngineChoice::Auto,
        boot_timeout_ms: 60_000,
        disk_full_timeout_ms: 60_000,
        log_size_max_bytes: 1 << 20,
        log_files_max: 3,
    };
    let runtime_dir = directory.join("rt");
    let workshop = Workshop {
        home: home.clone(),
        runtime_dir: runtime_dir.clone(),
        host: host.clone(),
        images: images.clone(),
        snapshots: snapshots.clone(),
        launcher: Arc::clone(&launcher),
    };
    let surroundings = Surroundings {
        pool: PoolActor::keep(workshop, clock.clone()),
        home,
        snapshots,
        runtime_dir,
        host,
        pressure: Pressure::at(directory.join(PRESSURE_FILE)),
        starts: Starts::new(STARTS_AT_ONCE, clock.clone()),
        launcher,
        images,
        metrics: MetricsHandle::start(directory, clock.clone()),
        journal,
        clock,
        heartbeats: HeartbeatWriter::start().expect("a thread"),
    };
    Daemon::over(Arc::new(surroundings), found.records)
}

/// Opens the journal, waiting for an earlier daemon of the same process to let go of it.
fn open_journal(directory: &Path, clock: &Arc<dyn Clock>) -> (Journal, crate::journal::Found) {
    for _ in 0..400 {
        match Journal::open(&HomeLayout::new(directory).journal(), clock.clone()) {
            Err(crate::journal::JournalError::Open { reason, .. }) if reason.contains("already open") => {
                std::thread::sleep(std::time::Duration::from_millis(5))
            }
            opened => return opened.expect("a journal"),
        }
    }
    panic!("the journal of the earlier daemon stays open");
}
