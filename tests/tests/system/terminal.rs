//! A terminal session as a person sees it: tmux is the terminal, and the case reads its screen.

use std::process::Command;
use std::time::{Duration, Instant};

use msb_tests::Home;

/// How long the screen may take to show something; a guest boots in it.
const PATIENCE: Duration = Duration::from_secs(180);

/// A tmux server of its own with one window, in which a shell runs in the home's environment.
struct Screen<'a> {
    home: &'a Home,
    socket: String,
}

impl<'a> Screen<'a> {
    fn open(home: &'a Home) -> Self {
        let screen = Self { home, socket: home.scratch().join("tmux").display().to_string() };
        screen.tmux("-f /dev/null new-session -d -x 100 -y 30 \"PS1='host> ' TERM=xterm-256color exec sh\"");
        screen.wait_for("host>");
        screen
    }

    fn tmux(&self, words: &str) -> String {
        self.home.shell(&format!("exec tmux -S '{}' {words}", self.socket)).run().succeeds().text()
    }

    /// Types a line.
    fn line(&self, text: &str) {
        self.tmux(&format!(
            "send-keys -l -- \"{}\"",
            text.replace('\\', "\\\\").replace('"', "\\\"").replace('$', "\\$")
        ));
        self.key("Enter");
    }

    fn key(&self, key: &str) {
        self.tmux(&format!("send-keys {key}"));
    }

    fn shown(&self) -> String {
        self.tmux("capture-pane -p -e -S -")
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            let shown = self.shown();
            if shown.contains(text) {
                return;
            }
            assert!(Instant::now() < until, "{text:?} did not appear on the screen:\n{shown}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        let _ = self.home.shell(&format!("exec tmux -S '{}' kill-server", self.socket)).run();
        // tmux leaves its socket.
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[test]
fn a_terminal_session_looks_right_on_the_screen() {
    if Command::new("tmux").arg("-V").output().is_err() {
        println!("skipped: tmux is not installed");
        return;
    }
    let home = Home::with_busybox("terminal");
    let screen = Screen::open(&home);
    screen.line("msb run -it --name box -e PS1='in> ' busybox sh");
    // At the start of a line: the command that was typed holds the prompt too.
    screen.wait_for("\nin>");
    // Size, kind, colours and UTF-8 are the terminal's own; a new size arrives while the session goes on.
    screen.line("echo size $(stty size) $TERM");
    screen.wait_for("size 30 100 xterm-256color");
    screen.line(r"printf 'colour \033[31mred\033[0m \303\244\342\202\254\n'");
    screen.wait_for("\u{1b}[31mred");
    screen.wait_for("ä€");
    screen.tmux("resize-window -x 120 -y 40");
    screen.line("echo resized $(stty size)");
    screen.wait_for("resized 40 120");
    // Ctrl-C and Ctrl-Z reach the job, not msb.
    screen.line("sh -c 'echo run''ning; exec sleep 600'");
    screen.wait_for("\nrunning");
    screen.key("C-c");
    screen.line("echo code $?");
    screen.wait_for("code 130");
    screen.line("sh -c 'echo run''ning again; exec sleep 601'");
    screen.wait_for("\nrunning again");
    screen.key("C-z");
    screen.wait_for("Stopped");
    // A stopped job takes no other signal before it goes on, and a shell with stopped jobs does not end.
    screen.line("kill -9 %1; wait; echo killed $?");
    screen.wait_for("killed 0");
    // The detach keys leave it running, and the terminal is as it was.
    screen.key("C-]");
    screen.wait_for("detached from box");
    screen.line("stty -a | grep -o ' icanon' | sed 's/^/mode/'");
    screen.wait_for("mode icanon");
    assert_eq!(home.status("box"), "running");
    // Attached again, with somebody who only watches.
    let mut watcher = home.msb(["attach", "--no-stdin", "box"]).start();
    screen.line("msb attach box");
    // Nobody else types meanwhile, so what is typed before the session stands is read by it or by the shell before.
    let until = Instant::now() + PATIENCE;
    while !screen.shown().contains("again 42") {
        assert!(Instant::now() < until, "{}", screen.shown());
        screen.line("test $PPID && echo again $((40 + 2))");
        std::thread::sleep(Duration::from_secs(1));
    }
    watcher.wait_for("again 42");
    screen.key("C-d");
    screen.wait_for("host> ");
    home.wait_until("box", "stopped");
    screen.line("echo over $?");
    screen.wait_for("over");
    let _ = watcher.finish().exits(0);
    // A detached one with a terminal writes its log as a terminal would show it.
    home.succeeds(&["run", "-d", "-t", "--name", "quiet", "busybox", "sh", "-c", "tty; sleep 600"]);
    let until = Instant::now() + PATIENCE;
    while !home.succeeds(&["logs", "--grep", "/dev/", "quiet"]).contains("/dev/pts/0") {
        assert!(Instant::now() < until, "no terminal");
        std::thread::sleep(Duration::from_millis(300));
    }
    drop(screen);
    home.finish();
}
