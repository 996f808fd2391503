//! `cargo xtask test`: everything that passes without hardware of its own.

use anyhow::{Result, bail};

use crate::run::{cargo, show};
use crate::{ebpf, foreign, oracle, packages, tidy};

/// Installs what tests need and runs them; root, FUSE and loop devices are needed.
pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    if std::fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta)).ok() != Some(0)
    {
        bail!("the tests mount file systems and run containers: run them as root");
    }
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    foreign::install()?;
    tidy::tidy()?;
    ebpf::build()?;
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.arg(filter);
    }
    show(&mut command)?;
    if filter.is_some() {
        return Ok(());
    }
    oracle::oracle()
}
