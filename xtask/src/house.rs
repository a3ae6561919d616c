//! `cargo xtask check-deps`, second half: the house rules that no compiler lint knows.
//!
//! Each rule is a function from a file's path and text to complaints, so that a test can show it failing.

use std::path::Path;

use anyhow::{Result, bail};

use crate::{cache, program};

/// The only places where `unsafe` may stand; see ARCHITECTURE.md.
const UNSAFE_ROOMS: &[&str] =
    &["vmm/src/engine/kvm", "vmm/src/memory", "vmm/src/arch", "vmm/src/jail", "guest/src/sys"];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "helper", "helpers", "misc"];

type Rule = fn(&str, &str) -> Vec<String>;

const RULES: &[Rule] = &[header, unsafe_rooms, names, leftovers];

pub(crate) fn run() -> Result<()> {
    let listed = program::output(program::command("git").args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.rs",
    ]))?;
    let mut complaints = Vec::new();
    let mut missing = tests_named_in(&std::fs::read_to_string(cache::repository().join(THREAT_MODEL))?);
    let mut unprovoked: Vec<(String, String)> =
        error_codes(&std::fs::read_to_string(cache::repository().join(ERROR_TABLE))?);
    unprovoked.retain(|(_, code)| {
        !std::fs::read_to_string(cache::repository().join(SUITE)).is_ok_and(|text| text.contains(code))
    });
    let mut count = 0;
    for path in listed.lines() {
        // A file deleted in the work tree is still listed.
        let Ok(text) = std::fs::read_to_string(cache::repository().join(path)) else { continue };
        count += 1;
        complaints.extend(RULES.iter().flat_map(|rule| rule(path, &text)));
        let tests = test_part(path, &text);
        unprovoked.retain(|(variant, code)| !tests.contains(&format!("ErrorCode::{variant}")) && !tests.contains(code));
        missing.retain(|name| {
            !text.contains(&format!("fn {name}(")) && !path.ends_with(&format!("fuzz_targets/{name}.rs"))
        });
    }
    complaints.extend(missing.iter().map(|name| format!("{THREAT_MODEL} names {name}, and there is no such test")));
    complaints.extend(unprovoked.iter().map(|(_, code)| format!("no test speaks of the error {code}")));
    if !complaints.is_empty() {
        bail!("house rules:\n  {}", complaints.join("\n  "));
    }
    println!("check-deps: {count} source files keep the house rules");
    Ok(())
}

/// The document that says which test holds which line.
const THREAT_MODEL: &str = "docs/threat-model.md";

/// Where every error has a row, and the cases of the SDKs, which are tests too.
const ERROR_TABLE: &str = "protocol/src/error.rs";
const SUITE: &str = "sdk/conformance/suite.json";

/// Variant and code (in quotes, as tests and tables write it) of each row of the table of errors.
fn error_codes(table: &str) -> Vec<(String, String)> {
    table
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("    ")?.split(' ');
            let (variant, code, status) = (words.next()?, words.next()?, words.next()?);
            // What only a defect of msb can cause, no test can.
            let wanted = code.starts_with('"') && status.parse::<u16>().is_ok() && variant != "Internal";
            wanted.then(|| (variant.to_owned(), code.to_owned()))
        })
        .collect()
}

/// What of a file is a test: all of it under `tests/`, else what follows `mod tests`.
fn test_part<'a>(path: &str, text: &'a str) -> &'a str {
    if path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("tests.rs") {
        return text;
    }
    text.split_once("\nmod tests {").map_or("", |(_, tests)| tests)
}

/// What stands between backquotes in a table's last column or after "Fuzzed:".
fn tests_named_in(document: &str) -> Vec<String> {
    let cells = document.lines().filter_map(|line| match line.strip_prefix("Fuzzed:") {
        Some(rest) => Some(rest),
        None => line.strip_prefix('|')?.trim_end().strip_suffix('|')?.rsplit('|').next(),
    });
    cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .filter(|name| name.contains('_'))
        .map(str::to_owned)
        .collect()
}

/// Every file opens by saying what it is.
fn header(path: &str, text: &str) -> Vec<String> {
    if text.starts_with("//!") { Vec::new() } else { vec![format!("{path}:1: does not open with a `//!` header")] }
}

/// `unsafe` has an address.
fn unsafe_rooms(path: &str, text: &str) -> Vec<String> {
    let allowed = UNSAFE_ROOMS
        .iter()
        .any(|room| path.strip_prefix(room).is_some_and(|rest| rest.starts_with('/') || rest == ".rs"));
    if allowed {
        return Vec::new();
    }
    let forms = ["{", "fn", "impl", "extern"].map(|next| format!("{}afe {next}", "uns"));
    lines_with(path, text, &forms, "outside the rooms for it")
}

/// A module is named for the noun it holds.
fn names(path: &str, _text: &str) -> Vec<String> {
    Path::new(path)
        .components()
        .filter_map(|part| Path::new(part.as_os_str()).file_stem()?.to_str())
        .filter(|stem| EMPTY_NAMES.contains(stem))
        .map(|stem| format!("{path}: `{stem}` says nothing about what is inside"))
        .collect()
}

/// Work is finished before it lands.
fn leftovers(path: &str, text: &str) -> Vec<String> {
    // Written in two halves so that this file does not match itself.
    let forms = [("to", "do!("), ("unimpl", "emented!("), ("FIX", "ME"), ("XX", "X"), ("#[ign", "ore")]
        .map(|(a, b)| format!("{a}{b}"));
    lines_with(path, text, &forms, "is unfinished work")
}

fn lines_with(path: &str, text: &str, forms: &[String], why: &str) -> Vec<String> {
    text.lines()
        .enumerate()
        .filter_map(|(index, line)| {
            let code = line.split("//").next().unwrap_or(line);
            let form = forms.iter().find(|form| code.contains(form.as_str()))?;
            Some(format!("{path}:{}: `{form}` {why}", index + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_that_a_document_names_are_found() {
        let document = "| line | `x_y` | `a_b`, `c_d` |\n| prose | a plain `word` |\nFuzzed: `e_f`.\n`g_h`\n";
        assert_eq!(tests_named_in(document), ["a_b", "c_d", "e_f"]);
    }

    #[test]
    fn the_rows_of_the_error_table_and_the_tests_of_a_file_are_found() {
        let table = "macro! {\n    DiskFull \"disk_full\" 507 true \"a\" \"b\"\n    let x = 3;\n}\n";
        assert_eq!(error_codes(table), [("DiskFull".to_owned(), "\"disk_full\"".to_owned())]);
        assert_eq!(test_part("a/src/b.rs", "code\n#[cfg(test)]\nmod tests {\nA"), "\nA");
        assert_eq!(test_part("a/src/b.rs", "code"), "");
        assert_eq!(test_part("a/tests/b.rs", "code"), "code");
    }

    #[test]
    fn each_rule_finds_its_fault_and_passes_its_good_twin() {
        let bad_unsafe = format!("//! x\n{} {{ f() }}\n", "unsafe");
        let bad_left = format!("//! x\nfn f() {{ {}do!() }}\n", "to");
        let table: &[(Rule, &str, &str, bool)] = &[
            (header, "a.rs", "fn f() {}\n", false),
            (header, "a.rs", "//! what it is\n", true),
            (unsafe_rooms, "cli/src/a.rs", &bad_unsafe, false),
            (unsafe_rooms, "vmm/src/memory/map.rs", &bad_unsafe, true),
            (unsafe_rooms, "vmm/src/memory_map.rs", &bad_unsafe, false),
            (unsafe_rooms, "cli/src/a.rs", "//! nothing un\u{73}afe here\n", true),
            (names, "cli/src/utils.rs", "", false),
            (names, "cli/src/common/mod.rs", "", false),
            (names, "cli/src/printer.rs", "", true),
            (leftovers, "a.rs", &bad_left, false),
        ];
        for (rule, path, text, good) in table {
            assert_eq!(rule(path, text).is_empty(), *good, "{path}: {text}");
        }
    }
}
