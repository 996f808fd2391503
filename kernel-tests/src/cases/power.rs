//! A power cut in the middle of a fill, over two guests with one disk: the host destroys the first when it is told to.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::init::say;
use crate::node::{Node, wait_until};

const ROOM: &str = "/var/tmp/power";

/// Fills, and says when the power may go.
pub(super) fn fill(_: bool) -> Result<()> {
    let node = Node::new(Path::new(ROOM), "", &["--rate", "8mbit", "--delay", "5ms"])?;
    node.mount()?;
    let share = |node: &Node| -> Result<(u64, u64)> {
        let number = |field: &str| node.of_image(field)?.as_u64().context("not a number");
        Ok((number("bytes_local")?, number("bytes_total")?))
    };
    wait_until("a third of the image is local", || share(&node).map(|(local, total)| local * 3 > total))?;
    let (local, total) = share(&node)?;
    ensure!(local < total, "the image is complete already");
    println!("{local} of {total} bytes were local");
    say(&format!("@ cut power-fill {local} of {total} bytes were local"));
    std::thread::sleep(std::time::Duration::from_secs(60));
    bail!("the power was not cut");
}

/// What the cut left is sound, and the fill goes on from there.
pub(super) fn check(broken: bool) -> Result<()> {
    let node = Node::new(Path::new(ROOM), "", &[])?;
    if broken {
        println!("{} bytes were turned", damage(&node.path("root/layers"))?);
    }
    let said = node.ok(&["fsck"])?;
    println!("{said}");
    ensure!(said.ends_with(" 0 problems\n"), "{said}");
    let checked: u64 = said.split_whitespace().filter_map(|word| word.parse().ok()).max().unwrap_or(0);
    ensure!(checked > 0, "nothing outlived the cut: {said}");
    let mounted = node.mount()?;
    node.check_contents(&mounted)?;
    wait_until("the image is complete", || Ok(node.of_image("state")? == "local"))
}

/// Turns a bit of every block that is on the disk.
fn damage(layers: &Path) -> Result<u64> {
    let mut turned = 0;
    for layer in fs::read_dir(layers)? {
        let path: PathBuf = layer?.path().join("data");
        let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
        let mut at = 0;
        let mut byte = [0];
        while file.read_at(&mut byte, at)? == 1 {
            if byte != [0] {
                file.write_all_at(&[byte.map(|byte| byte ^ 1)[0]], at)?;
                turned += 1;
            }
            at += 4096;
        }
    }
    Ok(turned)
}
