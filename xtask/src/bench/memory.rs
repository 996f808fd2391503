//! `cargo xtask bench memory`: resident memory of the daemon and of the server of block files, many images being mounted.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::image_maker;
use crate::run::{output, script, target};
use crate::sluice::{Registry, Sluice};
use crate::{packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images, each with a layer of its own
    #[arg(long, default_value_t = 10)]
    images: usize,
    /// Files of each
    #[arg(long, default_value_t = 30_000)]
    files: usize,
    /// How block files are served: classic or io_uring
    #[arg(long, default_value = "classic")]
    way: String,
    /// An existing binary of sluice instead of a release build of this tree
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Bytes of the daemon, and of both processes together.
const TARGET: u64 = 40_000_000;
/// Longer than probes stay attached for starts to come, and than freed memory stays.
const SETTLED: Duration = Duration::from_secs(12);

/// Runs it.
pub(crate) fn memory(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let images = make(args.images, args.files)?;
    let work = target().join("sluice-bench/memory");
    let registry = Registry::start(&binary, &images, "10gbit", "0ms")?;
    let config = format!(
        "index_store = \"file://{}\"\n[stream]\nfill = false\n[blocks]\nway = {:?}\n",
        work.join("indexes").display(),
        args.way
    );
    let names: Vec<String> = (0..args.images).map(|number| registry.image(&name(number))).collect();
    let indexing = Sluice::new(&binary, &work.join("index"), &config)?;
    names.iter().try_for_each(|image| indexing.run(&["index", image]).map(|_| ()))?;
    let node = Sluice::new(&binary, &work.join("node"), &config)?;
    node.start_daemon()?;
    say(&node, "no image")?;
    for (number, image) in names.iter().enumerate() {
        let dir = node.path(&name(number));
        fs::create_dir_all(&dir)?;
        node.run(&["mount", image, &dir.to_string_lossy()])?;
    }
    say(&node, &format!("{} images of {} files, idle", args.images, args.files))?;
    for number in 0..args.images {
        output(Command::new("find").arg(node.path(&name(number))).args(["-size", "+1G"]))?;
    }
    say(&node, "after a find over all")?;
    script("sync; echo 3 > /proc/sys/vm/drop_caches", &[])?;
    for number in 0..args.images {
        script("cat \"$1\"/files/000*/00* > /dev/null", &[&node.path(&name(number))])?;
    }
    say(&node, "after reads of 1,000 files of each")
}

/// Images of `files` small files; no layer is another's.
fn make(images: usize, files: usize) -> Result<PathBuf> {
    let dir = target().join(format!("sluice-bench/memory-{files}"));
    let tree = dir.join("tree");
    for number in 0..files {
        let path = tree.join(format!("files/{:04}/{:03}", number / 100, number % 100));
        if number % 100 == 0 {
            fs::create_dir_all(path.parent().unwrap_or(&tree))?;
        }
        fs::write(path, format!("{number}\n").repeat(number % 50))?;
    }
    for number in 0..images {
        if !dir.join("images").join(name(number)).join("index.json").exists() {
            println!("making image {} of {images}", number + 1);
            fs::write(tree.join("files/own"), number.to_string())?;
            image_maker::pack_members(&dir.join("images"), &name(number), &tree, &[&["files"]])?;
        }
    }
    Ok(dir.join("images"))
}

fn name(number: usize) -> String {
    format!("image{number}")
}

fn say(node: &Sluice, when: &str) -> Result<()> {
    // After a start its probes stay attached for a while.
    std::thread::sleep(SETTLED);
    let status = node.status()?;
    let number = |pointer: &str| {
        status.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} is told"))
    };
    let (daemon, server) = (number("/resident_bytes")?, number("/blocks/resident_bytes")?);
    let together = proportional(number("/pid")?)? + proportional(number("/blocks/pid")?)?;
    println!(
        "{when}: daemon {:.1} MB, server of block files {:.1} MB, together {:.1} MB (shared pages once); {} 40 MB",
        daemon as f64 / 1e6,
        server as f64 / 1e6,
        together as f64 / 1e6,
        if daemon.max(together) <= TARGET { "met: <=" } else { "NOT MET: <=" }
    );
    Ok(())
}

/// Bytes of a process, of shared pages its share: both processes run one program (smaps_rollup, proc_pid_smaps(5)).
fn proportional(pid: u64) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss is told")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
