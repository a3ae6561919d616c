//! `cargo xtask check-deps`, first half: the arrows between the crates.
//!
//! ARCHITECTURE.md holds the table of who may use whom; this compares it with what cargo resolved, in both directions: an arrow that
//! the table does not allow is an error, and so is a crate that the table does not know. It also makes sure that the libraries the
//! product is built on are direct dependencies of something we ship, and not only of a test.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

use crate::cache;

/// The libraries this product stands on; each must be a direct dependency of a shipped crate.
const FOUNDATIONS: &[&str] =
    &["actix", "tokio", "kvm-bindings", "vm-memory", "oci-spec", "redb", "opentelemetry-otlp", "russh", "nix"];

/// Members that are never shipped.
const NOT_SHIPPED: &[&str] = &["tests", "xtask"];

/// The header cell that marks the table in ARCHITECTURE.md.
const COLUMN: &str = "may use from the workspace";

pub(crate) fn run() -> Result<()> {
    let text =
        std::fs::read_to_string(cache::repository().join("ARCHITECTURE.md")).context("cannot read ARCHITECTURE.md")?;
    let allowed = parse_table(&text)?;
    let metadata = MetadataCommand::new()
        .manifest_path(cache::repository().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata failed")?;
    let complaints = [compare(&allowed, &arrows(&metadata)?), missing_foundations(&metadata)?].concat();
    if !complaints.is_empty() {
        bail!("the crates do not fit ARCHITECTURE.md:\n  {}", complaints.join("\n  "));
    }
    println!(
        "check-deps: {} crates use each other as ARCHITECTURE.md says; {} foundations are there",
        allowed.len(),
        FOUNDATIONS.len()
    );
    Ok(())
}

/// Crate folder to the folders of the workspace crates it uses.
type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Reads the table: first column the crate's folder in backticks, last column the folders it may use, or "nothing".
fn parse_table(text: &str) -> Result<Arrows> {
    let mut arrows = Arrows::new();
    let rows = text.lines().skip_while(|line| !(line.starts_with('|') && line.contains(COLUMN))).skip(2);
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let (Some(name), Some(uses)) = (cells.first().and_then(|cell| in_backticks(cell).next()), cells.last()) else {
            bail!("a row of the table in ARCHITECTURE.md names no crate: {row}");
        };
        arrows.insert(name.to_owned(), in_backticks(uses).map(str::to_owned).collect());
    }
    if arrows.is_empty() {
        bail!("ARCHITECTURE.md has no table with a column \"{COLUMN}\"");
    }
    Ok(arrows)
}

fn in_backticks(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The folder of each member, by package name.
fn folders(metadata: &Metadata) -> Result<BTreeMap<String, String>> {
    metadata
        .workspace_packages()
        .iter()
        .map(|package| {
            let folder = package.manifest_path.parent().context("a manifest has a folder")?;
            let folder = folder.strip_prefix(&metadata.workspace_root).context("a member lies in the workspace")?;
            Ok((package.name.to_string(), folder.to_string()))
        })
        .collect()
}

fn arrows(metadata: &Metadata) -> Result<Arrows> {
    let folders = folders(metadata)?;
    Ok(metadata
        .workspace_packages()
        .iter()
        .map(|package| {
            let own = &folders[package.name.as_str()];
            let uses = package.dependencies.iter().filter_map(|dependency| folders.get(&dependency.name));
            // A crate may name itself to turn on a feature for its own tests.
            (own.clone(), uses.filter(|used| *used != own).cloned().collect())
        })
        .collect())
}

fn compare(allowed: &Arrows, actual: &Arrows) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, uses) in actual {
        let Some(may_use) = allowed.get(name) else {
            complaints.push(format!("`{name}` is not in the table"));
            continue;
        };
        for used in uses.difference(may_use) {
            complaints.push(format!("`{name}` uses `{used}`, which the table does not allow"));
        }
    }
    complaints.extend(
        allowed
            .keys()
            .filter(|name| !actual.contains_key(*name))
            .map(|name| format!("the table has `{name}`, the workspace has not")),
    );
    complaints
}

fn missing_foundations(metadata: &Metadata) -> Result<Vec<String>> {
    let folders = folders(metadata)?;
    let used: BTreeSet<&str> = metadata
        .workspace_packages()
        .iter()
        .filter(|package| !NOT_SHIPPED.contains(&folders[package.name.as_str()].as_str()))
        .flat_map(|package| &package.dependencies)
        .filter(|dependency| dependency.kind == DependencyKind::Normal)
        .map(|dependency| dependency.name.as_str())
        .collect();
    Ok(FOUNDATIONS
        .iter()
        .filter(|name| !used.contains(**name))
        .map(|name| format!("no crate we ship depends on {name} directly"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[(&str, &[&str])]) -> Arrows {
        rows.iter()
            .map(|(name, uses)| ((*name).to_owned(), uses.iter().map(|used| (*used).to_owned()).collect()))
            .collect()
    }

    #[test]
    fn table_is_read_from_the_document() {
        let text = "before\n\n| crate | holds | may use from the workspace |\n|---|---|---|\n| `a` | x `y` | nothing |\n| `b/c` | z | `a`, `d` (types) |\n\n| other | table |\n";
        assert_eq!(parse_table(text).expect("a table"), table(&[("a", &[]), ("b/c", &["a", "d"])]));
        assert!(parse_table("no table").is_err());
    }

    #[test]
    fn a_forbidden_arrow_an_unknown_crate_and_a_stale_row_are_named() {
        let allowed = table(&[("a", &[]), ("b", &["a"]), ("gone", &[])]);
        let actual = table(&[("a", &["b"]), ("b", &["a"]), ("new", &[])]);
        let complaints = compare(&allowed, &actual).join("; ");
        for part in ["`a` uses `b`", "`new` is not in the table", "the table has `gone`"] {
            assert!(complaints.contains(part), "{complaints}");
        }
        assert!(compare(&allowed, &allowed).is_empty());
    }
}
