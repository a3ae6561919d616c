//! Boots a kernel and an initramfs on engine kvm, without agent, daemon or jail: the figure that compares with other VMMs, and the
//! first thing to try when a kernel does not come up.
//!
//! `bare KERNEL [INITRAMFS] [--memory MIB] [--cpus N] [--append WORDS]`
//!
//! The console goes to standard output; the last line tells how the machine ended and when each phase was reached. Used by the lab's
//! cases (`cargo xtask lab`); not installed.
#![expect(clippy::print_stdout, reason = "a program for the command line")]

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use msb_vmm::engine::kvm::KvmEngine;
use msb_vmm::engine::{Engine, KernelFile, KernelFormat, Machine};
use msb_vmm::launch::phases::Phases;

/// What a kernel needs to end by a reset and to keep its console short.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

fn main() -> anyhow::Result<()> {
    let started = Instant::now();
    let mut words = std::env::args().skip(1);
    let (mut files, mut memory_mib, mut cpus, mut append) = (Vec::new(), 128, 1, String::new());
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--memory" => memory_mib = value()?.parse()?,
            "--cpus" => cpus = value()?.parse()?,
            "--append" => append = value()?,
            _ => files.push(PathBuf::from(word)),
        }
    }
    let [kernel, initramfs @ ..] = files.as_slice() else { bail!("no kernel given") };
    let mut file = File::open(kernel).with_context(|| kernel.display().to_string())?;
    let mut magic = [0u8; 4];
    file.read_exact(&mut magic)?;
    let format = if &magic == b"\x7fELF" { KernelFormat::Elf } else { KernelFormat::BzImage };
    let initramfs = initramfs
        .first()
        .map(|path| anyhow::Ok((path.clone(), File::open(path).with_context(|| path.display().to_string())?)))
        .transpose()?;
    let phases = Phases::new(started, None);
    let machine = Machine {
        cpus,
        memory_mib,
        kernel: KernelFile { path: kernel.clone(), file, format, fingerprint: String::new() },
        initramfs,
        restore: None,
        command_line: format!("{COMMAND_LINE} {append}"),
        devices: Vec::new(),
        console: Box::new(std::io::stdout()),
        work_directory: std::env::temp_dir(),
        phases: phases.clone(),
    };
    let mut engine = KvmEngine::new(None);
    engine.boot(machine)?;
    let end = engine.run();
    phases.mark("ended");
    let marks: Vec<String> =
        phases.all().iter().map(|mark| format!("{} {:.1} ms", mark.name, mark.at_us as f64 / 1000.0)).collect();
    println!("BARE-END {end:?}: {}", marks.join(", "));
    Ok(())
}
