//! The service of a host with several users: each works as itself, and nobody else's sandboxes exist for it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Users without an entry anywhere: the service needs none.
const ANN: u32 = 61_001;
const BOB: u32 = 61_002;
/// A group that every Debian has, in place of `msb`.
const GROUP: (&str, u32) = ("users", 100);

/// A door and what is behind it, in a folder that every user can reach.
struct Host {
    folder: tempfile::TempDir,
    front: Option<Child>,
}

impl Host {
    fn open() -> Self {
        let folder = tempfile::Builder::new().prefix("msb-h-").tempdir_in("/tmp").expect("a temporary folder");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("open the folder");
        // The tree of the tests may be below somebody's private home.
        let copied = Command::new("cp").arg("-rL").arg(msb_tests::tree()).arg(folder.path().join("tree")).status();
        assert!(copied.is_ok_and(|status| status.success()), "cannot copy the programs");
        std::fs::copy(msb_tests::image("busybox.tar"), folder.path().join("busybox.tar")).expect("copy the image");
        let opened = Command::new("chmod").args(["-R", "a+rX"]).arg(folder.path()).status();
        assert!(opened.is_ok_and(|status| status.success()));
        let mut host = Self { folder, front: None };
        host.start();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let front = Command::new(self.path("tree/bin/msbd"))
            .arg("--host")
            .arg("--host-state")
            .arg(self.path("state"))
            .arg("--host-run")
            .arg(self.path("run"))
            .args(["--host-group", GROUP.0])
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("MSB_ENGINE", msb_tests::engine())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start the door");
        self.front = Some(front);
        let socket = self.path("run/msbd.sock");
        for _ in 0..300 {
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the door does not open: {}", self.log());
    }

    fn end(&mut self, signal: Signal) {
        let Some(mut front) = self.front.take() else { return };
        let pid = Pid::from_child(&front);
        kill_process(pid, signal).expect("tell the door");
        front.wait().expect("wait for the door");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// `msb` as a user, who is in the group or not.
    fn msb(&self, uid: u32, member: bool, words: &[&str]) -> Output {
        self.msb_at(&self.path("run/msbd.sock"), uid, member, words)
    }

    fn msb_at(&self, socket: &Path, uid: u32, member: bool, words: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}"));
        command.arg(if member { format!("--groups={}", GROUP.1) } else { "--clear-groups".to_owned() });
        command.arg(self.path("tree/bin/msb")).args(words);
        command.env_clear().env("MSB_HOST", socket).env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        command.stdin(Stdio::null()).current_dir("/").output().expect("run msb")
    }

    #[track_caller]
    fn succeeds(&self, uid: u32, words: &[&str]) -> String {
        let output = self.msb(uid, true, words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?} of {uid}: {said}\n{}", self.log());
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    #[track_caller]
    fn fails(&self, uid: u32, member: bool, words: &[&str], code: &str) {
        let words: Vec<&str> = ["--format", "json"].iter().chain(words).copied().collect();
        let output = self.msb(uid, member, &words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(code), "{words:?} of {uid}: {said}");
    }

    /// Processes whose program or home is in this folder.
    fn processes(&self) -> Vec<(i32, PathBuf)> {
        let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
        entries
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let program = std::fs::read_link(entry.path().join("exe")).ok()?;
                program.starts_with(self.folder.path()).then_some((pid, program))
            })
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // After a failure; a test that passes has left none.
        for (pid, _) in self.processes() {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if let Some(mut front) = self.front.take() {
            let _ = front.wait();
        }
    }
}

fn owner(path: &Path) -> (u32, u32) {
    let found = std::fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (found.uid(), found.mode() & 0o777)
}

#[test]
fn two_users_of_a_host_work_as_themselves_and_never_see_each_other() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be two users");
        return;
    }
    let mut host = Host::open();
    assert_eq!(std::fs::metadata(host.path("run/msbd.sock")).expect("the socket").mode() & 0o777, 0o660);
    host.fails(ANN, false, &["ls"], "permission_denied");

    let image = host.path("busybox.tar");
    host.succeeds(ANN, &["image", "load", "-i", image.to_str().expect("UTF-8")]);
    host.succeeds(ANN, &["create", "--name", "box", "busybox"]);
    let detail: serde_json::Value =
        serde_json::from_str(&host.succeeds(ANN, &["inspect", "--format", "json", "box"])).expect("JSON");
    // Whatever serves her is hers: the VM process, her files, her directories.
    let machine = PathBuf::from(format!("/proc/{}", detail["vmm_pid"]));
    assert_eq!(owner(&machine).0, ANN, "{detail}");
    assert_eq!(owner(&host.path(&format!("state/users/{ANN}"))), (ANN, 0o700));
    assert_eq!(owner(Path::new(detail["directory"].as_str().expect("a directory"))).0, ANN);

    for words in [&["inspect", "box"][..], &["exec", "box", "--", "id"], &["stop", "box"], &["rm", "-f", "box"]] {
        host.fails(BOB, true, words, "sandbox_not_found");
    }
    assert_eq!(host.succeeds(BOB, &["ls", "-q"]), "");
    // Her service refuses him by itself, should the way to its socket ever stand open.
    let top = host.path(&format!("run/users/{ANN}"));
    let found = Command::new("find").arg(&top).args(["-name", "msbd.sock"]).output().expect("run find");
    let hers = PathBuf::from(String::from_utf8(found.stdout).expect("UTF-8").trim());
    let set_modes = |way, socket| {
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
        mode(&hers, socket).expect("the socket's mode");
        for directory in hers.ancestors().skip(1).take_while(|path| path.starts_with(&top)) {
            mode(directory, way).expect("a directory's mode");
        }
    };
    set_modes(0o711, 0o666);
    let refused = host.msb_at(&hers, BOB, true, &["ls", "--format", "json"]);
    set_modes(0o700, 0o600);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("peer_refused"), "{said}");
    assert_eq!(host.succeeds(ANN, &["ls", "-q"]), "box\n");

    // The door is killed and opened again: nothing of hers notices, and who uses the service of old is served by a new one.
    host.end(Signal::KILL);
    host.start();
    assert_eq!(host.succeeds(ANN, &["exec", "box", "--", "echo", "on"]), "on\n");
    let again: serde_json::Value =
        serde_json::from_str(&host.succeeds(ANN, &["inspect", "--format", "json", "box"])).expect("JSON");
    assert_eq!((&again["vmm_pid"], &again["boot_id"]), (&detail["vmm_pid"], &detail["boot_id"]));

    host.succeeds(ANN, &["rm", "-f", "box"]);
    host.end(Signal::TERM);
    for _ in 0..100 {
        if host.processes().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("left behind: {:?}", host.processes());
}
