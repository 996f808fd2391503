//! A file whose offsets do not fit 32 bits.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use super::overlay::overlay_on;
use crate::init::say;
use crate::node::Node;

/// What the host wrote where (`xtask`'s `pack.rs`): at the beginning, across 2 GiB, at the end. The rest is a hole.
const MARKS: [(u64, &[u8]); 3] = [(0, b"first"), ((2 << 30) - 3, b"across"), ((2 << 30) + 65_536, b"last")];
const SIZE: u64 = (2 << 30) + 65_536 + 4;

/// Read beyond 2 GiB without what is before, then copied up whole by overlayfs, which kernels once refused with EOVERFLOW.
pub(super) fn file(broken: bool) -> Result<()> {
    let config = "[stream]\nfill = false\n";
    let node = Node::with_image("large", Path::new("/var/tmp/large"), config, &[])?;
    let lower = node.mount()?;
    check(&lower.join("data/huge"), SIZE).context("in the image")?;
    let local = node.of_image("bytes_local")?.as_u64().context("not a number")?;
    println!("{local} bytes of the layer were fetched to read at three places");
    let room = node.path("room");
    fs::create_dir_all(&room)?;
    if broken {
        // Where 2 GiB have no place.
        let none: Option<&str> = None;
        mount(none, &room, Some("tmpfs"), MsFlags::empty(), Some("size=16m"))?;
    }
    let merged = overlay_on(&lower, &room)?;
    let huge = merged.join("data/huge");
    let begin = std::time::Instant::now();
    let mut appended = OpenOptions::new().append(true).open(&huge).context("copy-up")?;
    say(&format!("@ note large-file 2 GiB copied up in {:.0} s", begin.elapsed().as_secs_f64()));
    appended.write_all(b"more")?;
    check(&huge, SIZE + 4).context("copied up")?;
    let mut more = [0; 4];
    File::open(&huge)?.read_exact_at(&mut more, SIZE)?;
    ensure!(&more == b"more", "appended: {more:?}");
    check(&lower.join("data/huge"), SIZE).context("in the image after that")
}

fn check(path: &Path, size: u64) -> Result<()> {
    let file = File::open(path)?;
    let found = file.metadata()?.len();
    ensure!(found == size, "{found} bytes, and not {size}");
    for (at, mark) in MARKS {
        let mut bytes = vec![0; mark.len()];
        file.read_exact_at(&mut bytes, at).with_context(|| format!("cannot read at {at}"))?;
        ensure!(bytes == mark, "at {at} is {bytes:?}");
    }
    Ok(())
}
