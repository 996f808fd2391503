//! `sluice regress`: what became worse from one set of traces to another. Reads files; needs no daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use sluice_regress::{Limits, Report, Start, compare, junit};

use super::trace;
use crate::cli::RegressArgs;

/// Something became worse.
const WORSE: u8 = 2;

/// See the module text.
pub(crate) fn regress(args: RegressArgs) -> Result<ExitCode> {
    let limits: Limits = match &args.limits {
        Some(text) => serde_json::from_str(text).context("--limits is not understood")?,
        None => Limits::default(),
    };
    let limits =
        Limits { starts: args.starts, chance: args.chance, worse_by: args.worse_by / 100.0, ..limits };
    let report = compare(&starts(&args.base)?, &starts(&args.new)?, &limits);
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else if args.junit {
        let name = format!("{} against {}", args.new.display(), args.base.display());
        say!("{}", junit(&report, &name).trim_end());
    } else {
        in_words(&report)?;
    }
    Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(WORSE) })
}

fn starts(path: &Path) -> Result<Vec<Start>> {
    let files: Vec<PathBuf> = if path.is_dir() { trace::files(path)? } else { vec![path.to_owned()] };
    if files.is_empty() {
        bail!("there are no traces in {}", path.display());
    }
    files.iter().map(|file| trace::summary(file).map(|summary| Start::from(&summary))).collect()
}

fn in_words(report: &Report) -> Result<()> {
    say!("{} starts before, {} now", report.starts.0, report.starts.1);
    for measured in &report.measured {
        let (measure, median) = (measured.measure, |value| measured.measure.text(value));
        say!("  {:<26} {:>12} -> {:>12}", measure.name(), median(measured.base), median(measured.new));
    }
    for note in &report.notes {
        say!("  not compared: {note}");
    }
    for finding in &report.findings {
        say!("WORSE: {}\n  {}", finding.what, finding.advice);
    }
    if report.findings.is_empty() {
        say!("nothing became worse");
    }
    Ok(())
}
