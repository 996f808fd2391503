//! This program's file, which may have been replaced on the disk since it was started.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What the kernel adds to the name of a file that is gone (proc_pid_exe(5)).
const GONE: &str = " (deleted)";

/// The program that runs, to be started again: as it is, whatever stands in its place now.
pub(crate) fn own() -> Result<PathBuf> {
    let found = std::env::current_exe().context("cannot find the sluice binary")?;
    Ok(if found.exists() { found } else { PathBuf::from("/proc/self/exe") })
}

/// Where it was started from: what is there now may be another version.
pub(crate) fn place() -> Result<PathBuf> {
    let found = std::env::current_exe().context("cannot find the sluice binary")?;
    Ok(without_mark(&found))
}

fn without_mark(path: &Path) -> PathBuf {
    if path.exists() {
        return path.to_path_buf();
    }
    path.to_str().and_then(|text| text.strip_suffix(GONE)).map_or_else(|| path.to_path_buf(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_has_its_old_place() {
        assert_eq!(without_mark(Path::new("/no/sluice (deleted)")), Path::new("/no/sluice"));
        assert_eq!(without_mark(Path::new("/no/sluice")), Path::new("/no/sluice"));
        let own = own().expect("it runs");
        assert_eq!(without_mark(&own), own);
        assert_eq!(place().expect("it runs"), own);
    }
}
