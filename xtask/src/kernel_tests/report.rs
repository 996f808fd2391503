//! What came of a run: a table for people, JUnit and JSON for programs, and the page of the docs.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::cases::{self, Case};
use crate::images::Kernel;

/// What came of one case on one kernel.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) kernel: String,
    pub(super) case: &'static str,
    pub(super) verdict: Verdict,
    pub(super) seconds: f64,
    /// What the case measured.
    pub(super) notes: Vec<String>,
    /// What it said, or why it did not run.
    pub(super) said: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Ok,
    /// The kernel cannot have it.
    Absent,
    Failed,
}

/// Every outcome of a run.
#[derive(Debug)]
pub(super) struct Report<'a> {
    pub(super) kernels: &'a [Kernel],
    pub(super) outcomes: Vec<Outcome>,
    /// Cases were broken on purpose, and had to fail.
    pub(super) broken: bool,
}

impl Report<'_> {
    fn of(&self, kernel: &str, case: &str) -> Option<&Outcome> {
        self.outcomes.iter().find(|one| one.kernel == kernel && one.case == case)
    }

    fn word(&self, outcome: Option<&Outcome>) -> &'static str {
        match outcome.map(|outcome| outcome.verdict) {
            Some(Verdict::Ok) if self.broken => "caught",
            Some(Verdict::Ok) => "ok",
            Some(Verdict::Absent) => "–",
            Some(Verdict::Failed) if self.broken => "MISSED",
            Some(Verdict::Failed) => "FAILED",
            None => "",
        }
    }

    fn cases(&self) -> Vec<&'static Case> {
        cases::all().filter(|case| self.outcomes.iter().any(|one| one.case == case.name)).collect()
    }

    pub(super) fn failures(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|one| one.verdict == Verdict::Failed)
    }

    /// Kernels across, cases down.
    pub(super) fn table(&self) -> String {
        let mut text = format!("{:<18}", "");
        for kernel in self.kernels {
            write!(text, "{:>14}", kernel.name).ok();
        }
        text.push('\n');
        for case in self.cases() {
            write!(text, "{:<18}", case.name).ok();
            for kernel in self.kernels {
                let outcome = self.of(&kernel.name, case.name);
                let time = outcome
                    .filter(|one| one.verdict != Verdict::Absent)
                    .map_or_else(String::new, |one| format!(" {:.0} s", one.seconds));
                write!(text, "{:>14}", format!("{}{time}", self.word(outcome))).ok();
            }
            text.push('\n');
        }
        text
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        std::fs::write(dir.join("results.json"), self.json()).context("cannot write results.json")?;
        std::fs::write(dir.join("junit.xml"), self.junit()).context("cannot write junit.xml")
    }

    fn json(&self) -> String {
        let kernels: Vec<_> = self
            .kernels
            .iter()
            .map(|kernel| json!({ "name": kernel.name, "release": kernel.release }))
            .collect();
        let outcomes: Vec<_> = self
            .outcomes
            .iter()
            .map(|one| {
                json!({
                    "kernel": one.kernel, "case": one.case, "verdict": self.word(Some(one)), "seconds": one.seconds,
                    "notes": one.notes, "said": one.said,
                })
            })
            .collect();
        json!({ "broken": self.broken, "kernels": kernels, "results": outcomes }).to_string()
    }

    fn junit(&self) -> String {
        let failed = self.failures().count();
        let absent = self.outcomes.iter().filter(|one| one.verdict == Verdict::Absent).count();
        let mut text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"kernel-tests\" tests=\"{}\" failures=\"{failed}\" skipped=\"{absent}\">\n",
            self.outcomes.len()
        );
        for one in &self.outcomes {
            let (kernel, said) = (escape(&one.kernel), escape(&one.said));
            write!(
                text,
                "  <testcase classname=\"{kernel}\" name=\"{}\" time=\"{:.1}\">",
                one.case, one.seconds
            )
            .ok();
            match one.verdict {
                Verdict::Ok => {}
                Verdict::Absent => {
                    write!(text, "<skipped message=\"{said}\"/>").ok();
                }
                Verdict::Failed => {
                    write!(text, "<failure>{said}</failure>").ok();
                }
            }
            text.push_str("</testcase>\n");
        }
        text + "</testsuite>\n"
    }

    /// `docs/kernels.md`.
    pub(super) fn page(&self) -> String {
        let mut text = "# Kernels\n\nWritten by `cargo xtask kernel-tests --docs` from its run. `–`: the kernel cannot have it.\n\n| |".to_owned();
        for kernel in self.kernels {
            write!(text, " {} |", kernel.name).ok();
        }
        write!(text, "\n|---|{}\n| `uname -r` |", "---|".repeat(self.kernels.len())).ok();
        for kernel in self.kernels {
            write!(text, " {} |", kernel.release).ok();
        }
        text.push('\n');
        for case in self.cases() {
            write!(text, "| {}: {} |", case.name, case.about).ok();
            for kernel in self.kernels {
                let outcome = self.of(&kernel.name, case.name);
                let notes = outcome
                    .filter(|one| !one.notes.is_empty())
                    .map_or_else(String::new, |one| format!(" ({})", one.notes.join(", ")));
                write!(text, " {}{notes} |", self.word(outcome)).ok();
            }
            text.push('\n');
        }
        text
    }
}

/// Text in XML. Control characters have no place in it.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(letter),
            letter if letter.is_control() => out.push('?'),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_say_what_came_of_what() {
        let kernel =
            Kernel { name: "1.2".into(), release: "1.2.3".into(), vmlinuz: "x".into(), modules: Vec::new() };
        let outcome = |case, verdict, said: &str| Outcome {
            kernel: "1.2".into(),
            case,
            verdict,
            seconds: 2.0,
            notes: vec!["1 s".into()],
            said: said.into(),
        };
        let outcomes = vec![
            outcome("start", Verdict::Ok, ""),
            outcome("overlay", Verdict::Failed, "a < b"),
            outcome("uring-off", Verdict::Absent, "none"),
        ];
        let report = Report { kernels: &[kernel], outcomes, broken: false };
        let table = report.table();
        assert!(table.contains("ok 2 s") && table.contains("FAILED 2 s") && table.contains('–'), "{table}");
        assert!(!table.contains("clock"), "only what ran: {table}");
        let junit = report.junit();
        assert!(
            junit.contains("tests=\"3\" failures=\"1\" skipped=\"1\"") && junit.contains("a &lt; b"),
            "{junit}"
        );
        assert!(report.page().contains("| ok (1 s) |"), "{}", report.page());
        assert!(serde_json::from_str::<serde_json::Value>(&report.json()).is_ok());
        assert!(Report { broken: true, ..report }.table().contains("MISSED"));
    }
}
