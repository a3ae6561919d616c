//! The kernel command line that both engines share, and what each word is for. Engines append only what their transport needs.

/// Longest command line Linux takes on x86 (COMMAND_LINE_SIZE), its zero byte included.
pub const LENGTH_MAX: usize = 2048;

/// Words of every boot.
const SHARED: &[&str] = &[
    // The one 16550, for evidence; `quiet` keeps everything but errors and panics off it, which saves its slow port writes.
    "console=ttyS0",
    "quiet",
    // A panic or an oops ends the machine at once, by triple fault (there is no ACPI and no keyboard controller to ask).
    "panic=-1",
    "oops=panic",
    "reboot=t",
    // Nothing to find there.
    "pci=off",
    "8250.nr_uarts=1",
    // The agent is a file in our own initramfs.
    "rdinit=/init",
    // The CPU's and the boot loader's seeds are credited, so that nothing waits for entropy.
    "random.trust_cpu=on",
    "random.trust_bootloader=on",
    // The driver is there for who asks for one; a device that nobody asked for is a riddle to whoever lists them.
    "dummy.numdummies=0",
    // cgroup v2 only.
    "cgroup_no_v1=all",
    // A sandbox's clock comes from one source; the watchdog would only add timer interrupts.
    "tsc=nowatchdog",
    // Who waits for a grace period waits some microseconds in place of some ticks: cgroups, mounts and namespaces come and go here.
    "rcupdate.rcu_expedited=1",
];

/// Joins the shared words and a user's own; a user's come last, so they win.
///
/// # Errors
/// A sentence for the user: a word with a blank or a control character, or a line beyond what the kernel takes.
pub fn build(extra: &[String]) -> Result<String, String> {
    let mut line = SHARED.join(" ");
    for word in extra {
        if word.is_empty() || word.chars().any(|c| c.is_control() || c == ' ') || !word.is_ascii() {
            return Err(format!("kernel word {word:?} must be printable ASCII without blanks"));
        }
        line.push(' ');
        line.push_str(word);
    }
    // Room for what an engine appends.
    if line.len() > LENGTH_MAX - 1024 {
        return Err(format!("the kernel command line is too long: {} bytes (max {})", line.len(), LENGTH_MAX - 1024));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_words_come_last_and_cannot_smuggle_others() {
        assert!(build(&["loglevel=7".into()]).expect("line").ends_with(" loglevel=7"));
        for bad in ["", "a b", "a\nb", "ü"] {
            assert!(build(&[bad.into()]).is_err(), "{bad:?}");
        }
        assert!(build(&["x".repeat(2000)]).is_err());
    }
}
