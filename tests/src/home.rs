//! A home of its own for each test: folders, environment, commands, and the account at the end.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::artifacts;
use crate::census::{self, Process};
use crate::invocation::{Finished, Invocation};

/// A temporary `MSB_HOME` with its own daemon.
pub struct Home {
    name: String,
    // Short and under /tmp, because socket paths end at 107 bytes.
    folder: tempfile::TempDir,
    // Before `folder` is removed, whatever happens.
    disk: Option<SmallDisk>,
    finished: bool,
}

impl Home {
    /// An empty home; `name` is the test's, for its evidence.
    ///
    /// # Panics
    ///
    /// When there is nothing to test (see [`crate::tree`]).
    #[must_use]
    pub fn new(name: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("msb-t-").tempdir_in("/tmp").expect("a temporary folder");
        for part in ["home", "runtime", "user"] {
            let path = folder.path().join(part);
            std::fs::create_dir(&path).expect("a folder of the test");
            restrict(&path);
        }
        Self { name: name.to_owned(), folder, disk: None, finished: false }
    }

    /// A home whose store holds the busybox image.
    #[must_use]
    pub fn with_busybox(name: &str) -> Self {
        let home = Self::new(name);
        home.load("busybox.tar");
        home
    }

    /// A home on a file system of its own of this size; none where this user may not mount one.
    ///
    /// # Panics
    ///
    /// When root cannot mount a tmpfs.
    #[must_use]
    pub fn on_small_disk(name: &str, mebibytes: u32) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let mut home = Self::new(name);
        let options = format!("size={mebibytes}m,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(home.path()).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a tmpfs");
        home.disk = Some(SmallDisk(home.path()));
        Some(home)
    }

    /// `MSB_HOME`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// `XDG_RUNTIME_DIR`.
    #[must_use]
    pub fn runtime(&self) -> PathBuf {
        self.folder.path().join("runtime")
    }

    /// A folder for the test's own files.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.folder.path().join("user")
    }

    /// `msb` with these words.
    pub fn msb<W: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Invocation {
        self.program("msb", words)
    }

    /// Any of the installed programs with these words, in this home's environment and no other.
    pub fn program<W: AsRef<std::ffi::OsStr>>(&self, name: &str, words: impl IntoIterator<Item = W>) -> Invocation {
        let mut command = Command::new(artifacts::tree().join("bin").join(name));
        command.args(words);
        self.furnish(&mut command);
        Invocation::new(command)
    }

    /// As [`Self::program`], to be started by the test itself.
    pub fn command(&self, name: &str, words: &[&str]) -> Command {
        let mut command = Command::new(artifacts::tree().join("bin").join(name));
        command.args(words);
        self.furnish(&mut command);
        command
    }

    /// A shell line with `msb` on its path, as a user would type it.
    pub fn shell(&self, line: &str) -> Invocation {
        let mut command = Command::new("sh");
        command.arg("-c").arg(line);
        self.furnish(&mut command);
        Invocation::new(command)
    }

    fn furnish(&self, command: &mut Command) {
        let tools = artifacts::tree().join("bin");
        command
            .env_clear()
            .env("PATH", format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", tools.display()))
            .env("HOME", self.scratch())
            .env("MSB_HOME", self.path())
            .env("XDG_RUNTIME_DIR", self.runtime())
            .env("MSB_ENGINE", artifacts::engine())
            .env("LC_ALL", "C.UTF-8")
            .current_dir(self.scratch());
    }

    /// Loads one of the test archives.
    ///
    /// # Panics
    ///
    /// When loading fails.
    #[track_caller]
    pub fn load(&self, archive: &str) {
        let path = artifacts::image(archive);
        let _ = self.msb(["image", "load", "-i", path.to_str().expect("a UTF-8 path")]).run().succeeds();
    }

    /// Runs a command that must succeed and returns what it printed.
    #[track_caller]
    pub fn succeeds(&self, words: &[&str]) -> String {
        self.msb(words).run().succeeds().text()
    }

    /// Runs a reading command with `--format json` and parses what it printed.
    ///
    /// # Panics
    ///
    /// When it fails or prints something else.
    #[track_caller]
    #[must_use]
    pub fn json(&self, words: &[&str]) -> Value {
        let finished = self.msb(words.iter().chain(&["--format", "json"])).run().succeeds();
        serde_json::from_slice(&finished.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}", finished.account()))
    }

    /// Runs a command that must fail with this exit code, as a user and as a program would see it: words and a hint on standard error,
    /// and with `--format json` an object with this code. Returns the words.
    ///
    /// # Panics
    ///
    /// When either is missing.
    #[track_caller]
    pub fn fails(&self, words: &[&str], exit_code: i32, code: &str) -> String {
        let finished = self.msb(words).run().exits(exit_code);
        let complaint = finished.complaint();
        let machine = self.msb(["--format", "json"].iter().chain(words)).run().exits(exit_code);
        let error = error_of(&machine);
        assert_eq!(error["code"], code, "{}\n{}", finished.account(), machine.account());
        for field in ["message", "hint"] {
            let text = error[field].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "an error without {field}: {}", machine.account());
            // What a person reads is wrapped and decorated, so words are compared and not lines.
            let first: String = text.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
            let flat = complaint.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(flat.contains(&first), "the {field} {text:?} is not told to people: {}", finished.account());
        }
        assert!(error["retryable"].is_boolean(), "{}", machine.account());
        complaint
    }

    /// The names of all sandboxes.
    #[track_caller]
    #[must_use]
    pub fn sandboxes(&self) -> Vec<String> {
        let list = self.json(&["ls"]);
        rows(&list).iter().map(|row| row["name"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The state of one sandbox, as `inspect` tells it.
    #[track_caller]
    #[must_use]
    pub fn status(&self, name: &str) -> String {
        self.inspect(name)["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Everything about one sandbox.
    #[track_caller]
    #[must_use]
    pub fn inspect(&self, name: &str) -> Value {
        match self.json(&["inspect", name]) {
            Value::Array(mut several) if several.len() == 1 => several.remove(0),
            one => one,
        }
    }

    /// Waits until a sandbox is in this state.
    ///
    /// # Panics
    ///
    /// When it is not within a minute.
    #[track_caller]
    pub fn wait_until(&self, name: &str, status: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = self.status(name);
            if now == status {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {now}, not {status}, after a minute");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// All processes of this home.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        let (home, runtime) = (self.path(), self.runtime());
        census::processes_of(&[&home, &runtime])
    }

    /// The processes of this home that run this program: `msbd`, `msb-vmm`, `qemu-system-x86_64`.
    #[must_use]
    pub fn running(&self, program: &str) -> Vec<Process> {
        self.processes().into_iter().filter(|process| process.program == program).collect()
    }

    /// The daemon.
    ///
    /// # Panics
    ///
    /// When there is not exactly one.
    #[track_caller]
    #[must_use]
    pub fn daemon(&self) -> Process {
        let found = self.running("msbd");
        assert_eq!(found.len(), 1, "not one daemon: {:?}", self.processes());
        found.into_iter().next().expect("one")
    }

    /// Waits until no virtual machine of this home runs.
    ///
    /// # Panics
    ///
    /// When one still does after 20 seconds.
    #[track_caller]
    pub fn wait_for_no_machine(&self) {
        let machines = || -> Vec<Process> {
            self.processes()
                .into_iter()
                .filter(|process| process.program == "msb-vmm" || process.program.starts_with("qemu-system"))
                .collect()
        };
        let left = wait_until_empty(Duration::from_secs(20), machines);
        assert!(left.is_empty(), "virtual machines are left: {left:?}");
    }

    /// Ends the test: removes every sandbox, ends the daemon, and insists that nothing is left.
    ///
    /// # Panics
    ///
    /// When something is.
    #[track_caller]
    pub fn finish(mut self) {
        // A test whose commands needed no service has nothing to clean up, and must not get one now.
        if std::fs::read_dir(self.path()).is_ok_and(|mut entries| entries.next().is_some()) {
            for name in self.sandboxes() {
                let _ = self.msb(["rm", "--force", &name]).run().succeeds();
            }
            self.wait_for_no_machine();
            let _ = self.msb(["doctor", "--store"]).run().succeeds();
        }
        for daemon in self.running("msbd") {
            daemon.signal(Signal::TERM);
        }
        let processes = wait_until_empty(Duration::from_secs(15), || self.processes());
        assert!(processes.is_empty(), "processes are left: {processes:?}");
        let files = leftovers(self.folder.path());
        assert!(files.is_empty(), "files are left: {files:?}");
        drop(self.disk.take());
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = self.folder.path().to_string_lossy().into_owned();
        let mounts: Vec<&str> = mounts.lines().filter(|line| line.contains(&ours)).collect();
        assert!(mounts.is_empty(), "mounts are left: {mounts:?}");
        self.finished = true;
    }

    /// Copies the logs to the evidence folder and prints their ends.
    fn keep_evidence(&self) {
        eprintln!("\n--- {} failed; what its home holds:", self.name);
        for process in self.processes() {
            eprintln!("process {} {}: {:.200}", process.pid, process.program, process.arguments);
        }
        let target = std::env::var_os("MSB_TEST_EVIDENCE").map(|folder| PathBuf::from(folder).join(&self.name));
        if let Some(target) = &target {
            let _ = std::fs::remove_dir_all(target);
        }
        let mut files = Vec::new();
        walk(&self.path(), &mut files);
        for file in files {
            let is_log =
                file.extension().is_some_and(|ending| ["log", "json", "jsonl"].iter().any(|wanted| ending == *wanted));
            if !is_log {
                continue;
            }
            let bytes = std::fs::read(&file).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {} ({} lines)", file.display(), lines.len());
            for line in &lines[lines.len().saturating_sub(40)..] {
                eprintln!("    {line:.300}");
            }
            if let (Some(target), Ok(relative)) = (&target, file.strip_prefix(self.path())) {
                let copy = target.join(relative);
                let _ = copy.parent().map(std::fs::create_dir_all);
                let _ = std::fs::write(copy, &bytes);
            }
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if std::thread::panicking() {
            self.keep_evidence();
        }
        // Whatever happened, nothing of this test may disturb the next one.
        for _ in 0..20 {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            for process in processes {
                process.signal(Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        drop(self.disk.take());
    }
}

/// A tmpfs of the test's own, gone when dropped.
struct SmallDisk(PathBuf);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The rows of a list, whether it came bare or under a name.
#[track_caller]
fn rows(list: &Value) -> Vec<Value> {
    match list {
        Value::Array(rows) => rows.clone(),
        Value::Object(fields) => match fields.values().next() {
            Some(Value::Array(rows)) if fields.len() == 1 => rows.clone(),
            _ => panic!("not a list: {list}"),
        },
        _ => panic!("not a list: {list}"),
    }
}

/// The error object that a command printed for programs: the last line that is one, wherever it was printed.
#[track_caller]
fn error_of(finished: &Finished) -> Value {
    let streams = [finished.text(), finished.complaint()];
    let whole = streams.iter().filter_map(|text| serde_json::from_str::<Value>(text.trim()).ok());
    let lines =
        streams.iter().flat_map(|text| text.lines()).filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let object = whole.chain(lines).find_map(|value| match value {
        Value::Object(mut fields) if fields.contains_key("error") => fields.remove("error"),
        value if value.get("code").is_some() => Some(value),
        _ => None,
    });
    object.unwrap_or_else(|| panic!("no error object: {}", finished.account()))
}

fn restrict(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).expect("chmod of the test's folder");
}

fn wait_until_empty<T>(patience: Duration, list: impl Fn() -> Vec<T>) -> Vec<T> {
    let deadline = Instant::now() + patience;
    loop {
        let found = list();
        if found.is_empty() || Instant::now() > deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Sockets and temporary files, which nobody needs once everything has ended.
fn leftovers(folder: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let mut files = Vec::new();
    walk(folder, &mut files);
    files.retain(|path| {
        let is_socket = path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_temporary =
            name.starts_with(".tmp") || name.ends_with(".tmp") || name.contains(".tmp.") || name.ends_with(".partial");
        is_socket || is_temporary
    });
    files
}

/// Every file under a folder, links not followed.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, found);
        } else {
            found.push(path);
        }
    }
}
