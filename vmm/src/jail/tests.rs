//! Hostile code on every class of thread: a child process closes the jail, starts a thread of each class, and tries.
//!
//! The child is this test binary again, told by an environment variable to be hostile, because a closed jail cannot be opened for the
//! tests that come after.

#![expect(
    clippy::print_stdout,
    clippy::exit,
    reason = "hostile children report on their standard output and end themselves"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::*;

const HOSTILE: &str = "MSB_TEST_HOSTILE";

/// What an attacker tries first, and whether it came through.
#[expect(unsafe_code, reason = "hostile code calls what it wants")]
fn attempts(own: &Path, shared: &OwnedFd) -> Vec<(&'static str, bool)> {
    // SAFETY: system calls with constant arguments; those that succeed give descriptors or nothing.
    let call = |number: libc::c_long, a: i64, b: i64, c: i64| unsafe { libc::syscall(number, a, b, c) } >= 0;
    let program = c"/bin/true".as_ptr() as i64;
    vec![
        ("read /etc/shadow", std::fs::read("/etc/shadow").is_ok()),
        ("read /etc/passwd", std::fs::read("/etc/passwd").is_ok()),
        ("write outside", std::fs::write(own.with_file_name("escaped"), b"x").is_ok()),
        ("execve", call(libc::SYS_execve, program, 0, 0)),
        ("spawn", Command::new("/bin/true").status().is_ok()),
        ("ptrace", call(libc::SYS_ptrace, libc::PTRACE_TRACEME as i64, 0, 0)),
        ("process_vm_readv", call(libc::SYS_process_vm_readv, 1, 0, 0)),
        ("kill others", call(libc::SYS_kill, 1, 0, 0)),
        ("unshare", call(libc::SYS_unshare, libc::CLONE_NEWUSER as i64, 0, 0)),
        ("packet socket", call(libc::SYS_socket, libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0)),
        ("unix socket", call(libc::SYS_socket, libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0)),
        ("netlink socket", call(libc::SYS_socket, libc::AF_NETLINK as i64, libc::SOCK_RAW as i64, 0)),
        ("internet socket", call(libc::SYS_socket, libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0)),
        ("bpf", call(libc::SYS_bpf, 0, 0, 0)),
        ("memfd", call(libc::SYS_memfd_create, c"x".as_ptr() as i64, 0, 0)),
        ("chmod", call(libc::SYS_chmod, c"/tmp".as_ptr() as i64, 0o777, 0)),
        ("open /dev/kvm", std::fs::File::open("/dev/kvm").is_ok()),
        ("kvm ioctl", call(libc::SYS_ioctl, 0, 0xae01, 0) || errno() != libc::EPERM),
        ("executable memory", {
            // SAFETY: a fresh anonymous mapping, or none.
            let mapped = unsafe {
                libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
            };
            mapped != libc::MAP_FAILED
        }),
        ("stat outside", std::fs::metadata("/etc/passwd").is_ok()),
        ("stat above a share", rustix::fs::statat(shared, "../secret", rustix::fs::AtFlags::empty()).is_ok()),
        ("capability", !rustix::thread::capabilities(None).is_ok_and(|sets| sets.permitted.is_empty())),
        ("own log", std::fs::write(own.join("vmm.log"), b"x").is_ok()),
        ("own end record", std::fs::rename(own.join("vmm.log"), own.join("end.json")).is_ok()),
        ("fork", {
            // SAFETY: a child, should there be one, ends at once.
            let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            if child == 0 {
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(0) };
            }
            child > 0
        }),
    ]
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Runs a part in a process with one thread, as `main` has: the harness runs every test in a second one.
#[expect(unsafe_code, reason = "fork")]
fn in_one_thread(part: impl FnOnce()) {
    // SAFETY: the harness's other thread waits for this one and holds no lock that the part needs.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => {
            let end = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(end, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
        nix::unistd::ForkResult::Child => {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(part));
            std::process::exit(i32::from(ended.is_err()));
        }
    }
}

/// The child's part; in the parent's run of the tests it does nothing.
#[test]
fn hostile_child() {
    let Some(own) = std::env::var_os(HOSTILE) else { return };
    in_one_thread(|| hostile(Path::new(&own)));
}

fn hostile(own: &Path) {
    namespaces::enter();
    let shared: OwnedFd = std::fs::File::open(own.join("shared")).unwrap().into();
    let shared = std::sync::Arc::new(namespaces::detached(shared, false));
    // A thread that is there before the jail closes and never heard of it: the union filter still holds it.
    let (close, closed) = std::sync::mpsc::channel::<()>();
    let (tried, result) = std::sync::mpsc::channel();
    let old = std::thread::spawn(move || {
        closed.recv().unwrap();
        tried.send(Command::new("/bin/true").status().is_ok()).unwrap();
    });
    let barrier = std::sync::Arc::new(std::sync::Barrier::new(5));
    let class_threads: Vec<_> = [ThreadClass::Device, ThreadClass::Network, ThreadClass::Vcpu, ThreadClass::Share]
        .into_iter()
        .map(|class| {
            let (own, barrier, shared) =
                (own.to_owned(), std::sync::Arc::clone(&barrier), std::sync::Arc::clone(&shared));
            std::thread::spawn(move || {
                barrier.wait();
                enter(class).unwrap();
                enter(class).unwrap();
                (class, attempts(&own, &shared))
            })
        })
        .collect();
    let files = FilePlan { write: vec![own.to_owned()], network: true, ..Default::default() };
    let report = super::close(&JailPlan { files, has_child: false, has_shares: true }).unwrap();
    barrier.wait();
    close.send(()).unwrap();
    println!("RESULT old thread spawn {}", result.recv().unwrap());
    old.join().unwrap();
    println!("REPORT {}", report.in_force.join(", "));
    println!("MISSING {}", report.missing.join(", "));
    // Threads may be started in a closed jail, too: log rotation does.
    assert!(std::thread::spawn(|| enter(ThreadClass::Service).is_ok()).join().unwrap());
    let mut results: Vec<_> = class_threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    results.push((ThreadClass::Service, attempts(own, &shared)));
    for (class, attempts) in results {
        for (what, came_through) in attempts {
            println!("RESULT {class:?} {what} {came_through}");
        }
    }
}

/// Somebody without any rights.
const NOBODY: u32 = 65534;

#[test]
fn hostile_code_is_refused_on_every_class_of_thread() {
    let is_root = rustix::process::geteuid().is_root();
    hostile_code_is_refused(None, is_root);
    // What an ordinary user gets are other namespaces.
    if is_root {
        hostile_code_is_refused(Some(NOBODY), false);
    }
}

fn hostile_code_is_refused(user: Option<u32>, is_root: bool) {
    let directory = tempfile::tempdir().unwrap();
    let own = directory.path().join("own");
    std::fs::create_dir_all(own.join("shared")).unwrap();
    std::fs::write(own.join("secret"), b"x").unwrap();
    for path in [directory.path(), &own, &own.join("shared")] {
        std::os::unix::fs::chown(path, user, None).unwrap();
    }
    // By this name, because the way to the file may be closed to others.
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "jail::tests::hostile_child", "--nocapture", "--test-threads=1"]).env(HOSTILE, &own);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let whole = format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let results: Vec<&str> = text.lines().filter_map(|line| line.split("RESULT ").nth(1)).collect();
    let came_through: Vec<&str> = results.iter().filter_map(|line| line.strip_suffix(" true")).collect();
    let (in_force, missing) = ("REPORT ", "MISSING ");
    let told = |start, what| text.lines().any(|line| line.contains(start) && line.contains(what));
    let (has_landlock, has_namespaces) = (told(in_force, "landlock abi"), told(in_force, "mount namespace"));
    assert!(has_landlock || told(missing, "landlock"), "{whole}");
    assert!(has_namespaces || told(missing, "mount namespace"), "{whole}");
    // What one line of the jail refuses is open only where the host lacks that line, and says so.
    let expected: Vec<&str> = came_through
        .iter()
        .copied()
        .filter(|what| {
            matches!(*what, "Service own log" | "Service own end record" | "Network internet socket" | "Share own log")
                || (!has_landlock
                    && !has_namespaces
                    && (what.starts_with("Service ") || what.starts_with("Share "))
                    && (what.contains("read") || what.contains("outside") || what.contains("kvm")))
                || (!has_namespaces && what.contains(" stat "))
                // Root's shares have files of others.
                || (is_root && *what == "Share capability")
        })
        .collect();
    assert_eq!(came_through, expected, "{whole}");
    for allowed in ["Service own log", "Service own end record", "Network internet socket"] {
        assert!(came_through.contains(&allowed), "{allowed} must work: {whole}");
    }
    assert_eq!(results.len(), 5 * 25 + 1, "every attempt was made: {whole}");
    assert!(!directory.path().join("escaped").exists());
}

/// The child's part: confines itself as QEMU is, and becomes a shell that tries what QEMU never needs.
#[test]
fn hostile_qemu() {
    let Some(loaded) = std::env::var_os("MSB_TEST_QEMU") else { return };
    in_one_thread(|| become_hostile_qemu(Path::new(&loaded)));
}

fn become_hostile_qemu(loaded: &Path) {
    namespaces::enter();
    let confinement = child::confine(Path::new("/bin/sh"), vec![loaded.to_owned()]).unwrap();
    println!("RESULT landlock {}", confinement.landlock.is_some());
    let script = format!(
        "try() {{ if out=$(\"$@\" 2>&1); then echo \"RESULT $1 $2 true\"; else echo \"RESULT $1 $2 false\"; fi; }}; \
         try cat /etc/shadow; try cat /etc/hostname; try ls /root; try touch {outside}; try stat /etc/hostname; try cat {loaded}; try rm {loaded}",
        outside = loaded.with_file_name("escaped").display(),
        loaded = loaded.display(),
    );
    let error = Command::new("/bin/sh").arg("-c").arg(script).env_clear().env("PATH", "/usr/bin:/bin").exec();
    panic!("{error}");
}

#[test]
fn a_confined_qemu_reads_what_it_loads_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let loaded = directory.path().join("vmlinux");
    std::fs::write(&loaded, b"kernel").unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "jail::tests::hostile_qemu", "--nocapture", "--test-threads=1"])
        .env("MSB_TEST_QEMU", &loaded)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let results: Vec<&str> = text.lines().filter_map(|line| line.split("RESULT ").nth(1)).collect();
    assert_eq!(results.len(), 8, "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    if results[0] == "landlock false" {
        return;
    }
    let came_through: Vec<&str> = results[1..].iter().filter_map(|line| line.strip_suffix(" true")).collect();
    assert_eq!(came_through, [format!("cat {}", loaded.display())], "{text}");
    assert!(loaded.exists() && !directory.path().join("escaped").exists());
}

#[test]
fn inherited_descriptors_are_closed_but_for_the_kept() {
    let open = || io::Result::Ok(std::fs::File::open("/dev/null")?.as_raw_fd());
    assert!(open().is_ok());
    // In a child, because the harness has descriptors of its own.
    let Some(_) = std::env::var_os("MSB_TEST_CLOSE") else {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "jail::tests::inherited_descriptors_are_closed_but_for_the_kept", "--nocapture"])
            .env("MSB_TEST_CLOSE", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("RESULT true false"), "{text}");
        return;
    };
    let (kept, lost) = (std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/null").unwrap());
    process::close_inherited(&[kept.as_raw_fd()]);
    println!("RESULT {} {}", kept.metadata().is_ok(), lost.metadata().is_ok());
    std::process::exit(0);
}
