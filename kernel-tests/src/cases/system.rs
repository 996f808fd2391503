//! The node on systems that lack something, or are set up in another way.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount, umount};
use serde_json::json;

use crate::init::say;
use crate::node::{Node, checked};

/// A container runs while most of its image is in the registry.
pub(super) fn start(broken: bool) -> Result<()> {
    let link = ["--rate", "100mbit", "--delay", "2ms"];
    let node = Node::new(Path::new("/var/tmp/start"), "[stream]\nfill = false\n", &link)?;
    if broken {
        // A start that waits for all of its image.
        node.ok(&["pull", &node.image()])?;
    }
    node.ok(&["gc"])?;
    let begin = Instant::now();
    let said = node.ok(&["run", &node.image(), "sh", "-c", "cat /data/small; echo ready"])?;
    let took = begin.elapsed();
    ensure!(said == "small\nready\n", "the container said {said:?}");
    streamed(&node)?;
    say(&format!("@ note start {:.2} s to ready", took.as_secs_f64()));
    Ok(())
}

/// The image was neither unpacked nor fetched whole.
fn streamed(node: &Node) -> Result<()> {
    let state = node.of_image("state")?;
    ensure!(state == "streaming", "the image's state is {state}; the daemon's log:\n{}", node.log());
    let (local, total) = (node.of_image("bytes_local")?, node.of_image("bytes_total")?);
    let (local, total) = (local.as_u64().unwrap_or(0), total.as_u64().unwrap_or(0));
    println!("{local} of {total} bytes are local");
    ensure!(local > 0 && local < total * 3 / 4, "{local} of {total} bytes were fetched");
    Ok(())
}

/// The same with version 1 of control groups.
pub(super) fn cgroup_v1(broken: bool) -> Result<()> {
    if !broken {
        umount("/sys/fs/cgroup").context("cannot leave control groups of version 2")?;
        let none: Option<&str> = None;
        mount(Some("none"), "/sys/fs/cgroup", Some("tmpfs"), MsFlags::empty(), none)?;
    }
    let mut mounted = Vec::new();
    for controller in ["cpu", "cpuset", "devices", "freezer", "memory", "pids", "blkio"] {
        let dir = Path::new("/sys/fs/cgroup").join(controller);
        if broken || fs::create_dir_all(&dir).is_err() {
            continue;
        }
        // A kernel may have given up some of them.
        match mount(Some("cgroup"), &dir, Some("cgroup"), MsFlags::empty(), Some(controller)) {
            Ok(()) => mounted.push(controller),
            Err(errno) => {
                println!("no {controller} of version 1: {errno}");
                fs::remove_dir(&dir)?;
            }
        }
    }
    let checked =
        if mounted.is_empty() { Err(anyhow::anyhow!("no control group of version 1")) } else { start(false) };
    println!("version 1: {mounted:?}");
    if !broken {
        for controller in mounted {
            nix::mount::umount2(
                &Path::new("/sys/fs/cgroup").join(controller),
                nix::mount::MntFlags::MNT_DETACH,
            )?;
        }
        umount("/sys/fs/cgroup")?;
        let none: Option<&str> = None;
        mount(Some("none"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none)?;
    }
    checked
}

/// The kernel locked down as far as it goes. There is no way back: the case has a guest of its own.
pub(super) fn lockdown(broken: bool) -> Result<()> {
    let switch = "/sys/kernel/security/lockdown";
    if !broken {
        fs::write(switch, "confidentiality").with_context(|| format!("cannot write {switch}"))?;
    }
    let now = fs::read_to_string(switch)?;
    ensure!(now.contains("[confidentiality]"), "lockdown is {now}");
    start(false)
}

/// FUSE over io_uring refused by the system's owner: the classic way serves, and says why. Allowed: it is used.
pub(super) fn uring_off(broken: bool) -> Result<()> {
    let parameter = "/sys/module/fuse/parameters/enable_uring";
    fs::write(parameter, "N").with_context(|| format!("cannot write {parameter}"))?;
    let none: Option<&str> = None;
    if !broken {
        fs::write("/var/tmp/off", "N\n")?;
        mount(Some("/var/tmp/off"), parameter, none, MsFlags::MS_BIND, none)?;
        mount(none, parameter, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
    }
    let config = "[stream]\nfill = false\n[blocks]\nway = \"auto\"\n";
    let off = way(Path::new("/var/tmp/off-node"), config)?;
    ensure!(off == "classic", "switched off, and served so: {off}");
    umount(parameter)?;
    let on = way(Path::new("/var/tmp/on-node"), config)?;
    ensure!(on == "io_uring", "switched on, and served so: {on}");
    // What may be had is said without serving anything.
    let node = Node::new(Path::new("/var/tmp/zero-copy-node"), "[blocks]\nway = \"zero_copy\"\n", &[])?;
    let said = node.ok(&["doctor", "--json"])?;
    drop(node);
    let zero_copy =
        way(Path::new("/var/tmp/zero-copy-way"), "[stream]\nfill = false\n[blocks]\nway = \"zero_copy\"\n")?;
    ensure!(said.contains(&format!("{zero_copy}, by the configuration")), "served by {zero_copy}: {said}");
    Ok(())
}

/// What `sluice doctor` says of this kernel: everything can be seen by probes, and how.
pub(super) fn doctor(broken: bool) -> Result<()> {
    let config = if broken { "[probes]\nenabled = false\n" } else { "" };
    let levels = levels(Path::new("/var/tmp/doctor"), config)?;
    let unseen: Vec<_> =
        levels.iter().filter(|(_, level)| level == "none").map(|(name, _)| name.as_str()).collect();
    ensure!(!levels.is_empty() && unseen.is_empty(), "not seen by probes: {unseen:?}");
    let mut kinds: Vec<_> = levels.iter().map(|(_, level)| level.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    say(&format!("@ note doctor probes by {}", kinds.join(", ")));
    Ok(())
}

/// A kernel without descriptions of its types: containers start all the same, and it is said what is not seen for want of them.
pub(super) fn btf_missing(broken: bool) -> Result<()> {
    if !broken {
        hide("/sys/kernel/btf")?;
    }
    let levels = levels(Path::new("/var/tmp/btf"), "")?;
    let by_types: Vec<_> =
        levels.iter().filter(|(_, level)| ["fexit", "kprobe"].contains(&level.as_str())).collect();
    ensure!(!levels.is_empty() && by_types.is_empty(), "seen by what needs types: {by_types:?}");
    start(false)
}

/// A Batch job's task has the memory and processors that it asked for, by control groups of version 2.
pub(super) fn batch(broken: bool) -> Result<()> {
    let node = Node::new(Path::new("/var/tmp/batch"), "[stream]\nfill = false\n", &[])?;
    let group =
        "IFS=: read -r _ _ group < /proc/self/cgroup; cd /sys/fs/cgroup${group%/*}; cat memory.max cpu.max";
    let hungry = ["sh", "-c", "busybox dd if=/dev/zero of=/dev/null bs=100000000 count=1"];
    let streamed = json!({ "imageUri": node.image(), "commands": hungry, "enableImageStreaming": true });
    let mut task = json!({ "runnables": [{ "script": { "text": group } }, { "container": streamed }] });
    if !broken && let Some(task) = task.as_object_mut() {
        task.insert("computeResource".into(), json!({ "cpuMilli": "500", "memoryMib": "64" }));
    }
    let job = json!({ "taskGroups": [{ "taskSpec": task }] });
    let document = node.path("job.json");
    fs::write(&document, job.to_string())?;
    let output =
        node.run(&["batch", "submit", &document.to_string_lossy(), "--job-id", "bounded", "--wait"])?;
    let (logs, described) =
        (node.ok(&["batch", "logs", "bounded"])?, node.ok(&["batch", "describe", "bounded"])?);
    println!("{logs}\n{described}");
    ensure!(logs.contains("67108864") && logs.contains("50000 100000"), "the task's limits are not there");
    ensure!(!output.status.success(), "a task of 64 MiB took 100 MB");
    ensure!(described.contains("137"), "the task was not ended for its memory");
    node.ok(&["batch", "delete", "bounded"]).map(|_| ())
}

/// Nothing is in this directory any more.
fn hide(dir: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some("none"), dir, Some("tmpfs"), MsFlags::empty(), none)
        .with_context(|| format!("cannot hide {dir}"))
}

/// What probes can see, and by which kind of hook.
fn levels(dir: &Path, config: &str) -> Result<Vec<(String, String)>> {
    let node = Node::new(dir, config, &[])?;
    let said = node.ok(&["doctor", "--json"])?;
    let diagnosis: serde_json::Value = serde_json::from_str(&said)?;
    ensure!(diagnosis.get("streaming") == Some(&true.into()), "streaming is impossible here: {said}");
    let probes = diagnosis.get("probes").and_then(serde_json::Value::as_array).context("no probes")?;
    let text = |probe: &serde_json::Value, name: &str| {
        probe.get(name).and_then(serde_json::Value::as_str).unwrap_or("none").to_owned()
    };
    let levels: Vec<_> =
        probes.iter().map(|probe| (text(probe, "capability"), text(probe, "level"))).collect();
    println!("{levels:?}\n{said}");
    drop(node);
    Ok(levels)
}

/// Metadata and layers in one EROFS device, as kernels before 5.16 need it: contents are right, and one device is all there is.
pub(super) fn one_device(broken: bool) -> Result<()> {
    let config = format!("[blocks]\none_device = {}\n", !broken);
    let node = Node::new(Path::new("/var/tmp/one"), &config, &[])?;
    let mounted = node.mount()?;
    node.check_contents(&mounted)?;
    let mut devices = Vec::new();
    for block in fs::read_dir("/sys/block")? {
        let backing = fs::read_to_string(block?.path().join("loop/backing_file")).unwrap_or_default();
        devices.extend((!backing.is_empty()).then(|| backing.trim().to_owned()));
    }
    println!("{devices:?}");
    ensure!(devices.len() == 1, "an image of two layers is on {} devices", devices.len());
    Ok(())
}

/// How a node's blocks are served, by its own word, after its image was read.
fn way(dir: &Path, config: &str) -> Result<String> {
    let node = Node::new(dir, config, &[])?;
    let mounted = node.mount()?;
    node.check_contents(&mounted)?;
    let status = node.status()?;
    println!("{:?}", status.get("blocks"));
    node.ok(&["node", "drain"])?;
    let way = status.pointer("/blocks/way").and_then(serde_json::Value::as_str);
    way.map(str::to_owned).with_context(|| format!("it is not said how blocks are served: {status}"))
}

/// A kernel without EROFS: the image is pulled the ordinary way, and the reason told. The host leaves the module out.
pub(super) fn module_missing(_: bool) -> Result<()> {
    let node = Node::new(Path::new("/var/tmp/missing"), "", &[])?;
    let output = node.run(&["run", &node.image(), "cat", "/data/small"])?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && out == "small\n", "{out}{err}{}", node.log());
    println!("{err}");
    if !(err.contains("is not streamed") && err.to_lowercase().contains("erofs")) {
        bail!("it is not told why the image was unpacked: {err}");
    }
    ensure!(node.of_image("state")? == "unpacked", "the image is {}", node.of_image("state")?);
    checked(&mut node.command(&["fsck"])).map(|_| ())
}
