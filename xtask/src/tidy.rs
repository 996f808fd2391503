//! `cargo xtask tidy`: house rules that a machine can check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run::{output, top};

/// Checks everything; fails with all findings.
pub(crate) fn tidy() -> Result<()> {
    let top = top();
    let architecture = std::fs::read_to_string(top.join("ARCHITECTURE.md"))?;
    let metadata: Value = serde_json::from_str(&output(
        Command::new("cargo").args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(&top),
    )?)?;
    let mut findings = directions(&allowed(&architecture), &imports(&metadata)?);
    for path in sources(&top)? {
        let text = std::fs::read_to_string(&path)?;
        let name = path.strip_prefix(&top).unwrap_or(&path).display().to_string();
        findings.extend(source_findings(&text).into_iter().map(|finding| format!("{name}: {finding}")));
    }
    if findings.is_empty() {
        println!("tidy: nothing to say");
        return Ok(());
    }
    bail!("{}", findings.join("\n"));
}

/// What each crate may import, from the code map. `None`: everything.
fn allowed(architecture: &str) -> BTreeMap<String, Option<Vec<String>>> {
    let rows = architecture.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.split('`').nth(1)?;
        let imports = *cells.get(3)?;
        let list = match imports {
            "all" => None,
            "–" => Some(Vec::new()),
            list => Some(list.split(", ").map(str::to_owned).collect()),
        };
        Some((name.to_owned(), list))
    });
    rows.collect()
}

/// Which of our crates each of our crates imports, tests aside.
fn imports(metadata: &Value) -> Result<Vec<(String, Vec<String>)>> {
    let packages =
        metadata.get("packages").and_then(Value::as_array).context("cargo metadata has no packages")?;
    let short = |name: &str| match name {
        "sluice" => "agent".to_owned(),
        name => name.trim_start_matches("sluice-").to_owned(),
    };
    let found = packages.iter().map(|package| {
        let name = package.get("name").and_then(Value::as_str).unwrap_or("");
        let dependencies = package.get("dependencies").and_then(Value::as_array).into_iter().flatten();
        let ours = dependencies
            .filter(|one| one.get("kind").is_none_or(Value::is_null))
            .filter_map(|one| one.get("name").and_then(Value::as_str))
            .filter(|name| name.starts_with("sluice"))
            .map(short)
            .collect();
        (short(name), ours)
    });
    Ok(found.collect())
}

fn directions(
    allowed: &BTreeMap<String, Option<Vec<String>>>,
    imports: &[(String, Vec<String>)],
) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, used) in imports {
        match allowed.get(name) {
            None => findings.push(format!("crate {name} is not in ARCHITECTURE.md's code map")),
            Some(None) => {}
            Some(Some(list)) => {
                let forbidden = used.iter().filter(|one| !list.contains(one));
                findings.extend(forbidden.map(|one| format!("crate {name} may not import {one}")));
            }
        }
    }
    findings
}

fn source_findings(text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        findings.push("it does not begin with a //! line that says what it is for".to_owned());
    }
    // Written in pieces, so that this file does not find itself.
    for mark in [concat!("#[ig", "nore"), concat!("todo", "!("), concat!("unimpl", "emented!(")] {
        if text.contains(mark) {
            findings.push(format!("it contains {mark}"));
        }
    }
    findings
}

fn sources(top: &Path) -> Result<Vec<PathBuf>> {
    let list =
        output(Command::new("git").args(["ls-files", "-co", "--exclude-standard", "*.rs"]).current_dir(top))?;
    Ok(list.lines().map(|line| top.join(line)).filter(|path| path.exists()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_decides() {
        let map = allowed("| `a` | idea | – |\n| `b` | idea | a |\n| `agent` (`x`) | idea | all |\n");
        let uses =
            |name: &str, used: &[&str]| (name.to_owned(), used.iter().map(|one| (*one).to_owned()).collect());
        assert!(directions(&map, &[uses("b", &["a"]), uses("agent", &["a", "b"])]).is_empty());
        assert_eq!(directions(&map, &[uses("a", &["b"])]).len(), 1);
        assert_eq!(directions(&map, &[uses("c", &[])]).len(), 1);
    }

    #[test]
    fn sources_say_what_they_are_for() {
        assert!(source_findings("//! A file.\n").is_empty());
        assert_eq!(source_findings("fn main() {}\n").len(), 1);
        assert_eq!(source_findings(concat!("//! A.\n#[ig", "nore]\n")).len(), 1);
    }
}
