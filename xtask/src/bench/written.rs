//! What a start and a command cost beside what they cost when that was last written down (`written.txt`), so that a change which makes them
//! dearer is seen in the output of CI.
//!
//! Called by the tier `exact`, which compares, and by `cargo xtask bench --exact --write-down`. Always the release profile: another's figures say
//! nothing beside these. Nothing here fails a test: a figure says what to look at, not that something is wrong.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::exact::{self, Told};
use crate::binaries;

/// Rows of the exact lab that take seconds and hardly differ from one run to the next. (A stop took 25 ms in one and 34 in the next.)
const ROWS: [&str; 4] = ["hello", "run", "exec", "ls"];
/// Where it is written down.
const WRITTEN: &str = "xtask/src/bench/written.txt";
/// What is told: so much dearer than written down.
const DEARER: f64 = 1.05;

/// Figures by name.
type Figures = BTreeMap<String, f64>;

/// Measures, and prints each figure beside the one that was written down.
pub(crate) fn compare() -> Result<()> {
    let written = parse(&std::fs::read_to_string(WRITTEN).context(WRITTEN)?)?;
    let (lines, dearer) = beside(&measure()?, &written);
    println!("\n{:<16} {:>12} {:>14} {:>9}", "exact lab", "now", "written down", "change");
    for line in lines {
        println!("{line}");
    }
    match dearer {
        0 => println!("\nnothing costs 5 % more than was written down"),
        count => println!(
            "\n{count} cost more than 5 % more than was written down: look why, or write it down anew with \
             `cargo xtask bench --exact --write-down`"
        ),
    }
    Ok(())
}

/// Measures, and writes down.
pub(super) fn write_down() -> Result<()> {
    let text: String = measure()?.iter().map(|(name, value)| format!("{name} {value:.0}\n")).collect();
    std::fs::write(WRITTEN, text).context(WRITTEN)?;
    println!("written down in {WRITTEN}");
    Ok(())
}

fn measure() -> Result<Figures> {
    let (told, code) = exact::measure(binaries::Arguments::default(), &ROWS.map(str::to_owned))?;
    if code != 0 {
        bail!("the measuring script ended with status {code}");
    }
    Ok(figures(&told))
}

/// Times in microseconds and counts. Not the time of `run`, and of the hello only what is no wait: making a VM waits for the host's kernel
/// between 0 and 12 ms (docs/performance.md).
fn figures(told: &Told) -> Figures {
    let mut figures: Figures = told
        .figures
        .iter()
        .filter(|(key, _)| ROWS.contains(&key.as_str()) && *key != "run")
        .map(|(key, value)| (format!("{key}_us"), *value))
        .collect();
    if let Some(hello) = figures.get_mut("hello_us") {
        *hello -= told.phases.iter().filter(|(name, _)| name == "vm_created").map(|(_, ms)| ms * 1000.0).sum::<f64>();
    }
    for count in &told.counts {
        for (what, value) in [("exits", count.exits), ("calls", count.calls), ("faults", count.faults)] {
            figures.insert(format!("{}_{what}", count.key), value as f64);
        }
    }
    figures
}

/// Lines `NAME VALUE`.
fn parse(text: &str) -> Result<Figures> {
    text.lines()
        .map(|line| {
            let (name, value) = line.split_once(' ').with_context(|| format!("{WRITTEN}: {line:?} is no figure"))?;
            Ok((name.to_owned(), value.parse().with_context(|| format!("{WRITTEN}: {line:?} is no figure"))?))
        })
        .collect()
}

/// A line for each figure, and how many are dearer.
fn beside(now: &Figures, written: &Figures) -> (Vec<String>, usize) {
    let mut dearer = 0;
    let line = |(name, value): (&String, &f64)| {
        let Some(before) = written.get(name) else { return format!("{name:<16} {value:>12.0} {:>14}", "–") };
        let is_dearer = *value > before * DEARER;
        dearer += usize::from(is_dearer);
        let change = (value / before.max(1.0) - 1.0) * 100.0;
        let word = if is_dearer { "  DEARER" } else { "" };
        format!("{name:<16} {value:>12.0} {before:>14.0} {change:>+7.1} %{word}")
    };
    let mut lines: Vec<String> = now.iter().map(line).collect();
    let gone = written.keys().filter(|name| !now.contains_key(*name));
    lines.extend(gone.map(|name| format!("{name:<16} {:>12}", "not measured")));
    (lines, dearer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dearer_than_written_down_is_told() {
        let figures = |list: &[(&str, f64)]| list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let written = parse("exec_us 1000\ngone_us 5\nls_us 1000\n").unwrap();
        let now: Figures = figures(&[("exec_us", 1050.0), ("ls_us", 1051.0), ("new_us", 7.0)]);
        let (lines, dearer) = beside(&now, &written);
        assert_eq!(dearer, 1);
        assert_eq!(
            lines,
            [
                "exec_us                  1050           1000    +5.0 %",
                "ls_us                    1051           1000    +5.1 %  DEARER",
                "new_us                      7              –",
                "gone_us          not measured",
            ]
        );
        assert!(parse("exec_us\n").is_err() && parse("exec_us many\n").is_err());
    }

    #[test]
    fn what_is_written_down_can_be_read() {
        let text =
            std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bench/written.txt"))
                .unwrap();
        assert!(parse(&text).unwrap().contains_key("hello_us"));
    }

    #[test]
    fn the_hello_is_without_the_wait_and_run_is_counted_alone() {
        let told = Told {
            figures: [("hello", 96_000.0), ("run", 170_000.0)].map(|(key, value)| (key.to_owned(), value)).into(),
            phases: vec![("kernel".to_owned(), 69.0), ("vm_created".to_owned(), 8.0)],
            ..Told::default()
        };
        assert_eq!(figures(&told).into_iter().collect::<Vec<_>>(), [("hello_us".to_owned(), 88_000.0)]);
    }
}
