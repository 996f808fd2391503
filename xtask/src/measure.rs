//! Time to ready: from the question for an image to the command's output, in several ways.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::containerd::Containerd;
use crate::run::script;
use crate::sluice::{Registry, Sluice};

/// How long a start's trace may take.
const TRACE_PATIENCE: Duration = Duration::from_secs(5);

/// A way to start a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    /// containerd: pull, unpack, run.
    FullPull,
    /// sluice, no index published: everything is pulled, and indexed on the way.
    FirstPull,
    /// sluice, with an index.
    Streamed,
    /// The same, and another node published a profile.
    Profile,
    /// The same, and a start pack.
    Pack,
    /// sluice, everything local.
    Local,
}

impl std::fmt::Display for Way {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use clap::ValueEnum as _;
        let named = self.to_possible_value();
        formatter.write_str(named.as_ref().map_or("", clap::builder::PossibleValue::get_name))
    }
}

impl Way {
    pub(crate) const ALL: [Self; 6] =
        [Self::FullPull, Self::FirstPull, Self::Streamed, Self::Profile, Self::Pack, Self::Local];

    /// For tables.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::FullPull => "containerd, full pull",
            Self::FirstPull => "sluice, first pull (no index)",
            Self::Streamed => "sluice, streamed",
            Self::Profile => "sluice, with profile",
            Self::Pack => "sluice, with profile and start pack",
            Self::Local => "sluice, everything local",
        }
    }
}

/// One start.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Start {
    /// Until the command's output was there and the container had ended.
    pub(crate) ready_s: f64,
    /// Bytes of bodies the registry sent until then.
    pub(crate) bytes: u64,
    /// Peak resident memory of the daemon.
    pub(crate) peak_bytes: u64,
    /// What its trace says, if it left one.
    pub(crate) traced: Option<Traced>,
}

/// What the trace of a start says, until ready and without the background fill.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Traced {
    /// Bytes of contents that the container touched.
    pub(crate) touched_bytes: u64,
    /// Bytes of contents that came.
    pub(crate) brought_bytes: u64,
    /// Round trips that followed each other.
    pub(crate) round_trips_in_turn: u64,
}

/// What starts are measured with. The image is in the registry several times, by what is published beside it, so that all of it
/// comes through the link.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    binary: &'a Path,
    work: PathBuf,
    /// Where the image is.
    pub(crate) registry: Registry,
    containerd: &'a Containerd,
    name: &'a str,
    command: &'a [&'a str],
    /// What the command must say.
    says: Option<&'static str>,
}

/// What is published beside the image in its repository.
const PUBLISHED: [&str; 4] = ["plain", "index", "profile", "pack"];

impl<'a> Bench<'a> {
    /// Serves the image `name` of `images` through a link, e.g. `1gbit`, `2ms`.
    pub(crate) fn new(
        (binary, work, containerd): (&'a Path, PathBuf, &'a Containerd),
        (images, name): (&Path, &'a str),
        (rate, delay): (&str, &str),
        (command, says): (&'a [&'a str], Option<&'static str>),
    ) -> Result<Self> {
        let layouts = work.join("layouts");
        for published in PUBLISHED {
            let layout = layouts.join(format!("{name}-{published}"));
            script(
                r#"rm -rf "$2"; mkdir -p "$2"; cp -al "$1"/blobs "$1"/oci-layout "$2""#,
                &[&images.join(name), &layout],
            )?;
            // The image alone: others may have published something beside it.
            let mut index: Value =
                serde_json::from_slice(&std::fs::read(images.join(name).join("index.json"))?)?;
            let manifests = index.get_mut("manifests").and_then(Value::as_array_mut);
            let tag = "/annotations/org.opencontainers.image.ref.name";
            let tagged = |one: &Value| one.pointer(tag).and_then(Value::as_str) == Some("latest");
            manifests.context("a layout without manifests")?.retain(tagged);
            std::fs::write(layout.join("index.json"), index.to_string())?;
        }
        let registry = Registry::start(binary, &layouts, rate, delay)?;
        Ok(Self { binary, work, registry, containerd, name, command, says })
    }

    /// The image beside which this is published.
    pub(crate) fn image(&self, published: &str) -> String {
        self.registry.image(&format!("{}-{published}", self.name))
    }

    /// That image's layout, which the registry serves.
    pub(crate) fn layout(&self, published: &str) -> PathBuf {
        self.work.join("layouts").join(format!("{}-{published}", self.name))
    }

    /// The container's specification for the runtime, as `sluice run` writes it.
    pub(crate) fn spec(&self) -> Result<String> {
        let sluice = Sluice::new(self.binary, &self.work.join("spec"), "")?;
        let (runtime, spec) = (sluice.path("runtime"), sluice.path("spec.json"));
        let program = "if [ \"$3\" = run ]; then exec cp \"$5/config.json\" \"${0%/*}/spec.json\"; fi";
        std::fs::write(&runtime, format!("#!/bin/sh\n{program}\n"))?;
        script("chmod +x \"$1\"", &[&runtime])?;
        let run = ["run", "--runtime", &runtime.to_string_lossy(), &self.image("index")];
        sluice.run(&[&run[..], self.command].concat())?;
        std::fs::read_to_string(&spec).context("sluice wrote no specification")
    }

    /// A CI pipeline publishes the image's index; what it says of it.
    pub(crate) fn index(&self) -> Result<String> {
        let sluice = Sluice::new(self.binary, &self.work.join("index"), "")?;
        sluice.run(&["index", &self.image("index")])
    }

    /// Another node starts the container once and publishes what it learned: without a start pack, and with one. Bytes of the pack.
    pub(crate) fn learn(&self) -> Result<u64> {
        let mut pack = 0;
        for published in ["profile", "pack"] {
            let image = self.image(published);
            let sluice = Sluice::new(self.binary, &self.work.join("learning"), "")?;
            sluice.run(&["index", &image])?;
            sluice.run(&[&["trace", "record", &image][..], self.command].concat())?;
            sluice.run(&["pull", &image])?;
            let push: &[&str] = if published == "pack" { &["--pack"] } else { &[] };
            let said = sluice.run(&[&["profile", "push"][..], push, &[&image]].concat())?;
            let bytes = said.split_once("start pack of ").and_then(|(_, rest)| rest.split(' ').next());
            pack = bytes.map_or(Ok(pack), str::parse).context("the size of the start pack is not told")?;
        }
        Ok(pack)
    }

    /// Starts a container once, from nothing local and cold caches.
    pub(crate) fn start(&self, way: Way) -> Result<Start> {
        match way {
            Way::FullPull => {
                let image = self.image("plain");
                self.cold()?;
                let start = Instant::now();
                let said = self.containerd.pull_and_run(&image, self.command)?;
                let measured = self.measured(start, &said, 0)?;
                self.containerd.forget(&image)?;
                Ok(measured)
            }
            Way::FirstPull => self.with_sluice("publish_index = false\n", "plain", false),
            Way::Streamed => self.with_sluice("[prefetch]\nenabled = false\n", "index", false),
            Way::Profile => self.with_sluice("", "profile", false),
            Way::Pack => self.with_sluice("", "pack", false),
            Way::Local => self.with_sluice("", "index", true),
        }
    }

    /// A streamed start of which nothing is known, with these guesses, e.g. `elf+file`; `none`.
    pub(crate) fn guessing(&self, switches: &str) -> Result<Start> {
        let words: Vec<&str> = switches.split('+').filter(|word| *word != "none").collect();
        self.with_sluice(&format!("[prefetch]\nguess = {words:?}\n"), "index", false)
    }

    /// A new node; with `pulled`, everything is local before the start is measured.
    fn with_sluice(&self, config: &str, published: &str, pulled: bool) -> Result<Start> {
        let image = self.image(published);
        let sluice = Sluice::new(self.binary, &self.work.join("sluice"), config)?;
        sluice.start_daemon()?;
        if pulled {
            sluice.run(&["pull", &image])?;
        }
        self.cold()?;
        let start = Instant::now();
        let said = sluice.run(&[&["run", &image][..], self.command].concat())?;
        let mut measured = self.measured(start, &said, 0)?;
        let peak = sluice.status()?.get("resident_peak_bytes").and_then(Value::as_u64);
        measured.peak_bytes = peak.context("the daemon does not tell its memory")?;
        measured.traced = traced(&sluice)?;
        Ok(measured)
    }

    /// Empties the page cache but for the programs that start containers, and sets the registry's counters to zero: a node without the
    /// image has started others.
    pub(crate) fn cold(&self) -> Result<()> {
        let programs = "sync; echo 3 > /proc/sys/vm/drop_caches
            { \"$1\" --version; runc --version; ctr --version; containerd-shim-runc-v2 -v; } > /dev/null";
        script(programs, &[self.binary])?;
        self.registry.reset()
    }

    /// What was measured since `start`, if the container said what it should.
    pub(crate) fn measured(&self, start: Instant, said: &str, peak_bytes: u64) -> Result<Start> {
        let ready_s = start.elapsed().as_secs_f64();
        if let Some(word) = self.says.filter(|word| !said.contains(word)) {
            bail!("the container said `{said}` instead of `{word}`");
        }
        Ok(Start { ready_s, bytes: self.registry.bytes_sent()?, peak_bytes, traced: None })
    }
}

/// What the trace of the one start says. It is written when the container has ended, which nobody waits for; without probes a start
/// that reads nothing through the agent has none.
fn traced(sluice: &Sluice) -> Result<Option<Traced>> {
    let began = Instant::now();
    while sluice.run(&["trace", "list"])?.is_empty() {
        if began.elapsed() > TRACE_PATIENCE {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(Some(serde_json::from_str(&sluice.run(&["trace", "show", "--json"])?)?))
}

/// The middle of some numbers.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match (numbers.len() % 2, numbers.get(middle), numbers.get(middle.saturating_sub(1))) {
        (0, Some(high), Some(low)) => (high + low) / 2.0,
        (_, Some(one), _) => *one,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).is_nan());
    }
}
