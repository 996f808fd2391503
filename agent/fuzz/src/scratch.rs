//! Files for parsers that read files: in a directory of this process.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The directory; it is in memory where there is such a place.
pub fn dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let top = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        top.join(format!("sluice-fuzz-{}", std::process::id()))
    })
}

/// Writes one; where it is.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir().join(name);
    std::fs::create_dir_all(path.parent().expect("it is in the directory")).expect("a directory");
    std::fs::write(&path, bytes).expect("written");
    path
}

/// Removes what this process wrote.
pub fn remove() {
    drop(std::fs::remove_dir_all(dir()));
}
