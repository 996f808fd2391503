//! `cargo xtask test`: everything that passes without hardware of its own.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::images::{self, Gone};
use crate::run::{cargo, show};
use crate::{ebpf, foreign, kernel_tests, oracle, packages, tidy, watched};

/// Installs what tests need and runs them; root, FUSE and loop devices are needed.
pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    if std::fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta)).ok() != Some(0)
    {
        bail!("the tests mount file systems and run containers: run them as root");
    }
    let began = Instant::now();
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    foreign::install()?;
    tidy::tidy()?;
    ebpf::build()?;
    // The guests' kernels come meanwhile. Whether they did is seen when guests need them.
    let kernels = filter.is_none().then(|| std::thread::spawn(|| images::kernels(&[], Gone::Follows)));
    let tools = began.elapsed();
    let mut command = cargo();
    command.arg("--config").arg(watched::as_runner()?).args(["test", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.arg(filter);
    }
    let tested = show(&mut command);
    let tests = began.elapsed() - tools;
    println!(
        "took: {} s to have the tools, {} s to build and run the tests",
        tools.as_secs(),
        tests.as_secs()
    );
    tested?;
    if filter.is_some() {
        return Ok(());
    }
    oracle::oracle()?;
    if let Some(Ok(Err(error))) = kernels.map(std::thread::JoinHandle::join) {
        println!("kernels: {error:#}");
    }
    kernel_tests::kernel_tests(&kernel_tests::Args::for_tests())?;
    println!("took: {} s in all", began.elapsed().as_secs());
    Ok(())
}
