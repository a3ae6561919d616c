//! The samples of all VMs. Nobody waits for them, so they do not wake the service: one task looks at every VM's
//! connection in the same moments ([`super::unhurried`]) and hands on what one look brought together.
//!
//! ```text
//!  driver of a VM ─ run (a task): connects, takes the first sample, waits for the end ─► the connection
//!                                                                                           │
//!                     MetricsActor ◄─ batches, each measured by its run's meter ─ look (one task for all)
//! ```
//!
//! What arrives is the VM process's: bounded by the frame codec and in number, parsed to types, an error ends the
//! connection and another one is made.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use msb_protocol::frame::{Decoder, FrameError, encode_json};
use msb_protocol::vmm::{CONTROL_SOCKET, Request, RequestFrame, SampleDecoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::unhurried::{LOOK_INTERVAL, look_after};
use crate::metrics::meter::Meter;
use crate::metrics::{Measured, MetricsHandle};

/// Wait before the connection is made again.
const REOPEN_AFTER: Duration = Duration::from_secs(2);
/// Bytes of one read, and all that one look takes of a VM: more than the samples of an old one, in JSON, at the
/// shortest interval.
const READ_LEN: usize = 16 << 10;
/// Longest sample in bytes.
const SAMPLE_LEN_MAX: usize = 64 << 10;
/// Samples that one read brings; a VM that sends more of them loses them.
const SAMPLES_OF_READ_MAX: usize = 16;
/// Samples that are handed on together.
const BATCH_LEN: usize = 128;
/// Connections on their way to the task that looks.
const ARRIVING_LEN: usize = 64;

/// The way to the task that looks at the connections.
#[derive(Clone, Debug)]
pub struct SampleReader {
    arriving: mpsc::Sender<Connection>,
    metrics: MetricsHandle,
}

impl SampleReader {
    /// Starts the task; it ends with the last of these handles.
    #[must_use]
    pub fn start(metrics: MetricsHandle) -> Self {
        let (arriving, queue) = mpsc::channel(ARRIVING_LEN);
        tokio::spawn(look(queue, metrics.clone()));
        Self { arriving, metrics }
    }

    /// Reads the samples of one VM until its run is over. It holds no way to the run's events: they would not end before
    /// it, and the next run of the sandbox, which has its socket in the same place, would have one more reader each time.
    pub(super) async fn run(self, run_dir: PathBuf, interval_ms: u64, meter: Arc<Meter>) {
        while interval_ms > 0 && !meter.is_over() {
            if let Err(error) = self.read(&run_dir, interval_ms, &meter).await {
                tracing::debug!(boot_id = %meter.boot_id(), %error, "no samples come from the VM process");
            }
            tokio::time::sleep(REOPEN_AFTER).await;
        }
    }

    async fn read(&self, run_dir: &Path, sample_interval_ms: u64, meter: &Arc<Meter>) -> io::Result<()> {
        let mut stream = UnixStream::connect(run_dir.join(CONTROL_SOCKET)).await?;
        let mut wire = Vec::new();
        let request = Request::Subscribe { sample_interval_ms, compact: true };
        encode_json(&RequestFrame { id: 1, request }, &mut wire).map_err(io::Error::other)?;
        stream.write_all(&wire).await?;
        let mut incoming = Incoming::new(Arc::clone(meter));
        // The first comes at once: whoever asks for metrics right after a create has some.
        let (mut buffer, mut first) = (Vec::with_capacity(READ_LEN), Vec::new());
        while first.is_empty() {
            if meter.is_over() {
                return Ok(());
            }
            buffer.clear();
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            incoming.push(&buffer, &mut first).map_err(io::Error::other)?;
        }
        self.metrics.take(first);
        let interval = Duration::from_millis(sample_interval_ms);
        let (open, closed) = oneshot::channel();
        // Out of the reactor's sight. It stays non-blocking.
        let connection = Connection::new(stream.into_std()?, incoming, interval, open);
        self.arriving.send(connection).await.map_err(io::Error::other)?;
        // It is dropped with the connection.
        let _ = closed.await;
        Ok(())
    }
}

/// Bytes of one VM on their way to be samples.
#[derive(Debug)]
struct Incoming {
    meter: Arc<Meter>,
    frames: Decoder,
    samples: SampleDecoder,
}

impl Incoming {
    fn new(meter: Arc<Meter>) -> Self {
        Self { meter, frames: Decoder::with_limit(SAMPLE_LEN_MAX), samples: SampleDecoder::default() }
    }

    /// Takes what one read brought, and puts the samples that are whole by now into the batch.
    fn push(&mut self, bytes: &[u8], batch: &mut Vec<Arc<Measured>>) -> Result<(), FrameError> {
        self.frames.push(bytes);
        let mut taken = 0;
        while let Some(body) = self.frames.next_body()? {
            match self.samples.decode(body)? {
                Some((boot_id, sample)) if boot_id == self.meter.boot_id() && taken < SAMPLES_OF_READ_MAX => {
                    taken += 1;
                    batch.extend(self.meter.measure(sample));
                }
                // An answer, of another run, or of a VM that floods.
                Some(_) | None => {}
            }
        }
        Ok(())
    }
}

/// The connection to one VM.
#[derive(Debug)]
struct Connection {
    stream: StdUnixStream,
    incoming: Incoming,
    /// After something has come: nothing will for so long.
    pause: Duration,
    next_look: Instant,
    /// Whoever opened it waits for its end. Nothing is ever sent.
    _open: oneshot::Sender<()>,
}

impl Connection {
    fn new(stream: StdUnixStream, incoming: Incoming, interval: Duration, open: oneshot::Sender<()>) -> Self {
        // Half a look less, so that a look which is a little early does not miss what has come.
        let pause = interval.saturating_sub(LOOK_INTERVAL / 2);
        Self { stream, incoming, pause, next_look: Instant::now(), _open: open }
    }

    /// Reads what has come since the last look, if it is time; false when nothing more will come, or its run is over.
    fn look(&mut self, now: Instant, buffer: &mut [u8], batch: &mut Vec<Arc<Measured>>) -> bool {
        if self.incoming.meter.is_over() {
            return false;
        }
        if self.next_look > now {
            return true;
        }
        match self.stream.read(buffer) {
            Ok(0) => false,
            Ok(len) => {
                // Less than there was room for is all that there was.
                if len < buffer.len() {
                    self.next_look = now + self.pause;
                }
                self.incoming.push(&buffer[..len], batch).is_ok()
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
}

/// Looks at all connections in each of the moments of looking.
async fn look(mut arriving: mpsc::Receiver<Connection>, metrics: MetricsHandle) {
    let (mut connections, mut buffer) = (Vec::<Connection>::new(), vec![0; READ_LEN]);
    let mut next_look = Instant::now();
    loop {
        tokio::select! {
            connection = arriving.recv() => match connection {
                Some(connection) => connections.push(connection),
                None => return,
            },
            () = sleep_until(next_look), if !connections.is_empty() => {
                let (now, mut batch, mut at) = (Instant::now(), Vec::new(), 0);
                while at < connections.len() {
                    if connections[at].look(now, &mut buffer, &mut batch) {
                        at += 1;
                    } else {
                        connections.swap_remove(at);
                    }
                    if batch.len() >= BATCH_LEN {
                        metrics.take(std::mem::take(&mut batch));
                        // Others on this thread have their turn.
                        tokio::task::yield_now().await;
                    }
                }
                if !batch.is_empty() {
                    metrics.take(batch);
                }
                next_look = look_after(Duration::ZERO);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use msb_protocol::frame::decode_json;
    use msb_protocol::id::{BootId, SandboxId, SandboxName};
    use msb_protocol::vmm::{Sample, SampleEncoder};
    use tokio::net::UnixListener;

    use super::*;
    use crate::clock::{Clock, SystemClock};
    use crate::metrics::meter::Subject;
    use crate::metrics::{History, Latest, MetricsHandle, Newest};
    use crate::sandbox::activity::Activity;

    /// A VM process that sends what the test says, and the daemon's side of it.
    struct Scene {
        id: SandboxId,
        boot_id: BootId,
        metrics: MetricsHandle,
        meter: Arc<Meter>,
        listener: UnixListener,
        vm: UnixStream,
        encoder: SampleEncoder,
        _directory: tempfile::TempDir,
    }

    impl Scene {
        async fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join(CONTROL_SOCKET)).unwrap();
            let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
            let metrics = MetricsHandle::start(directory.path(), clock.clone());
            let (id, boot_id) = (SandboxId::generate(), BootId::generate());
            let subject = Subject::new(id, SandboxName::parse("web").unwrap(), boot_id);
            let meter = Meter::new(subject, metrics.clone(), clock.clone(), Activity::new(clock));
            let reader = SampleReader::start(metrics.clone());
            tokio::spawn(reader.run(directory.path().to_owned(), 1_000, meter.clone()));
            let mut vm = listener.accept().await.unwrap().0;
            let (mut decoder, mut buffer) = (Decoder::new(), Vec::with_capacity(4096));
            vm.read_buf(&mut buffer).await.unwrap();
            decoder.push(&buffer);
            let asked: RequestFrame = decode_json(decoder.next_body().unwrap().unwrap()).unwrap();
            assert_eq!(asked.request, Request::Subscribe { sample_interval_ms: 1_000, compact: true });
            let encoder = SampleEncoder::default();
            Self { id, boot_id, metrics, meter, listener, vm, encoder, _directory: directory }
        }

        async fn send(&mut self, cpu_time_us: impl IntoIterator<Item = u64>) {
            let mut wire = Vec::new();
            for cpu_time_us in cpu_time_us {
                let sample = Sample { cpu_time_us, ..Sample::default() };
                self.encoder.encode(self.boot_id, &sample, &mut wire).unwrap();
            }
            self.vm.write_all(&wire).await.unwrap();
        }

        async fn newest(&self) -> Option<Newest> {
            self.metrics.actor().send(Latest { now_ms: 0 }).await.unwrap().0.pop().map(|(_, newest)| newest)
        }

        /// Waits until the newest sample says this.
        async fn until(&self, cpu_time_us: u64) {
            for _ in 0..500 {
                if self.newest().await.is_some_and(|newest| newest.measured.sample.cpu_time_us == cpu_time_us) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("{cpu_time_us} never came: {:?}", self.newest().await);
        }

        async fn count(&self) -> usize {
            self.metrics.actor().send(History { id: self.id, since_ms: 0 }).await.unwrap().len()
        }
    }

    #[actix_rt::test]
    async fn samples_of_a_vm_come_one_after_the_other_and_a_flood_is_cut() {
        let mut scene = Scene::new().await;
        scene.send([1]).await;
        scene.until(1).await;
        scene.send([2, 3]).await;
        scene.until(3).await;
        assert_eq!(scene.count().await, 3);
        // More than one read takes; their ends are whole all the same.
        scene.send(4..2_000).await;
        scene.send([2_000]).await;
        tokio::time::sleep(LOOK_INTERVAL * 8).await;
        scene.send([2_001]).await;
        scene.until(2_001).await;
        assert!(scene.count().await < 200, "{}", scene.count().await);
    }

    #[actix_rt::test]
    async fn nothing_follows_the_last_sample_of_a_run_and_its_reader_ends_with_it() {
        let mut scene = Scene::new().await;
        scene.send([1]).await;
        scene.until(1).await;
        scene.meter.end(Some(Sample { cpu_time_us: 9, ..Sample::default() }));
        scene.send([5]).await;
        scene.until(9).await;
        tokio::time::sleep(LOOK_INTERVAL * 6).await;
        assert_eq!(scene.newest().await.unwrap().measured.sample.cpu_time_us, 9);
        let closed = async { while scene.vm.read_u8().await.is_ok() {} };
        tokio::time::timeout(Duration::from_secs(5), closed).await.unwrap();
        // The next run listens in the same place: nobody of this one comes to it.
        assert!(tokio::time::timeout(REOPEN_AFTER * 2, scene.listener.accept()).await.is_err());
    }

    #[actix_rt::test]
    async fn a_vm_that_does_not_speak_the_protocol_is_not_read_any_further() {
        let mut scene = Scene::new().await;
        scene.send([1]).await;
        scene.until(1).await;
        scene.vm.write_all(&[0, 0, 0, 2, 0xff, 0xff]).await.unwrap();
        let closed = async { while scene.vm.read_u8().await.is_ok() {} };
        tokio::time::timeout(Duration::from_secs(5), closed).await.unwrap();
        assert_eq!(scene.count().await, 1);
    }
}
