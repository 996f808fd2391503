//! Calls on symbolic links in containers, where the kernel has the fault and where not: ours work, others' that fail are reported.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use super::overlay::{links, names, overlay_on};
use crate::node::{Node, wait_until};
use crate::server;

/// `doctor` knows whether this kernel has the fault; in a container of a streamed image every operation works in either case; one
/// that fails in an overlay on FUSE is reported. Without the fault the FUSE server's own answer makes it fail.
pub(super) fn fault(broken: bool) -> Result<()> {
    let faulty = fs::read_to_string("/proc/cmdline")?.contains("kernel-tests.fault");
    let node = Node::new(Path::new("/var/tmp/rename"), "[stream]\nfill = false\n", &[])?;
    let found = doctors_word(&node)?;
    ensure!(found != faulty, "doctor says that links are handled well: {found}");
    let image = node.image();
    let inside = ["run", "-v", "/guest:/guest", &image, "/guest/guest", "case", "rename-inside"];
    println!("{}", node.ok(&inside)?);

    let lower = node.path("lower");
    // Broken: nothing fails, so there is nothing to report.
    let _server;
    if faulty && broken {
        fs::create_dir_all(&lower)?;
        std::os::unix::fs::symlink("target", lower.join("link"))?;
    } else {
        _server = server::mount(&lower, !faulty && !broken)?;
    }
    let merged = overlay_on(&lower, &node.path("room"))?;
    let mut said = None;
    // Probes are loaded beside the daemon's start: the first calls may not be seen.
    wait_until("the rename that fails is reported", || {
        let moved = fs::rename(merged.join("link"), merged.join("moved"));
        let errno = moved.err().and_then(|error| error.raw_os_error());
        ensure!(errno == Some(Errno::ENXIO as i32), "the rename did not fail with ENXIO, but {errno:?}");
        let events = node.ok(&["events", "--json"])?;
        said = events.lines().find(|line| line.contains("RenameFault")).map(str::to_owned);
        Ok(said.is_some())
    })?;
    let said = said.unwrap_or_default();
    println!("{said}");
    ensure!(said.contains("link") && said.contains("ENXIO"), "the report: {said}");
    let blamed = if faulty { "bug 217850" } else { "has the fix of that fault" };
    ensure!(said.contains(blamed), "not `{blamed}`: {said}");
    Ok(())
}

fn doctors_word(node: &Node) -> Result<bool> {
    let said = node.ok(&["doctor", "--json"])?;
    let diagnosis: serde_json::Value = serde_json::from_str(&said)?;
    let links = diagnosis.get("links").and_then(serde_json::Value::as_array).context("no links")?;
    println!("{links:?}");
    let of = |name: &str| {
        let found = links.iter().find(|check| check.get("name").is_some_and(|one| one == name));
        found.and_then(|check| check.get("ok")?.as_bool()).with_context(|| format!("no `{name}` in {said}"))
    };
    ensure!(of("symbolic links on streamed images")?, "{links:?}");
    of("kernel's handling of symbolic links")
}

/// In the container.
pub(super) fn inside(_: bool) -> Result<()> {
    let data = Path::new("/data");
    let wrong: Vec<_> = links(data).into_iter().chain(names(data)).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("in the container every operation gave what it should");
    Ok(())
}
