//! What this node can do, capability by capability: for `sluice doctor`, and for the agent's own start.

pub(crate) mod fault;
pub(crate) mod links;

use std::path::Path;

use serde::Serialize;
use sluice_blockfs::{Choice, Way};
use sluice_kernel::abilities::{Abilities, Ability, CgroupLayout, fuse_zero_copy};
use sluice_probes::{Options, Probes};
use sluice_trace::{Capability, Levels};

use self::links::{Links, Outcome, Tried};
use crate::config::Config;

/// All that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Diagnosis {
    pub(crate) kernel: String,
    /// Images can be streamed.
    pub(crate) streaming: bool,
    pub(crate) checks: Vec<Check>,
    pub(crate) probes: Vec<Seen>,
    /// Operations on symbolic links of lower directories.
    pub(crate) links: Vec<Check>,
}

/// One thing that the node has or has not.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) ok: bool,
    /// Without it nothing can be streamed.
    pub(crate) needed: bool,
    pub(crate) reason: String,
}

/// What probes see of one kind of thing.
#[derive(Debug, Serialize)]
pub(crate) struct Seen {
    pub(crate) capability: Capability,
    /// By what; none: it is not seen.
    pub(crate) level: Option<String>,
    /// What could not be had, and why.
    pub(crate) refused: Option<String>,
}

impl Diagnosis {
    /// Tries everything. Blocks the thread, for a second or two.
    pub(crate) fn make(config: &Config) -> Self {
        let abilities = Abilities::probe();
        let links = Links::probe(&rooms(config));
        let zero_copy = fuse_zero_copy(&abilities.fuse_uring);
        let mut checks = checks(&abilities, &zero_copy);
        checks.push(way(config.blocks.choice, &abilities.fuse_uring, &zero_copy));
        let links = links_checks(&abilities.release, &links);
        let streaming = checks.iter().chain(&links).all(|check| check.ok || !check.needed);
        Self { kernel: abilities.release.clone(), streaming, checks, probes: seen(config), links }
    }
}

/// Directories in which scratch overlays may be possible.
pub(crate) fn rooms(config: &Config) -> [&Path; 5] {
    [&config.state, &config.root, Path::new("/var/tmp"), Path::new("/tmp"), Path::new("/dev/shm")]
}

fn checks(abilities: &Abilities, zero_copy: &Ability) -> Vec<Check> {
    let check = |name: &str, needed, ability: &Ability| Check {
        name: name.to_owned(),
        ok: ability.available,
        needed,
        reason: ability.reason.clone(),
    };
    let mut all = vec![
        check("FUSE", true, &abilities.fuse),
        check("FUSE over io_uring", false, &abilities.fuse_uring),
        check("FUSE over io_uring, zero copy", false, zero_copy),
        check("loop devices", true, &abilities.loop_control),
        check("EROFS", true, &abilities.erofs),
        check("EROFS with several devices", false, &abilities.erofs_devices),
        check("overlayfs", true, &abilities.overlay),
        check("mount interface of Linux 5.2", false, &abilities.new_mount),
    ];
    let groups = match abilities.cgroup {
        CgroupLayout::Unified => "version 2",
        CgroupLayout::Legacy => "version 1: containers are told apart by their mount namespaces alone",
        CgroupLayout::Missing => "none is mounted: no container can be run",
    };
    let ok = abilities.cgroup != CgroupLayout::Missing;
    all.push(Check { name: "control groups".to_owned(), ok, needed: false, reason: groups.to_owned() });
    let runtime = sluice_container::find_runtime(None);
    all.push(Check {
        name: "container runtime".to_owned(),
        ok: runtime.is_ok(),
        needed: false,
        reason: runtime.map_or_else(|error| error.to_string(), |path| path.display().to_string()),
    });
    all
}

/// The way that a daemon with this configuration serves block files in; `status` tells that of the one that runs.
fn way(choice: Choice, io_uring: &Ability, zero_copy: &Ability) -> Check {
    let way = choice.way(io_uring.available, zero_copy.available);
    let ok = match way {
        Way::Classic => true,
        Way::IoUring => io_uring.available,
        Way::ZeroCopy => zero_copy.available,
    };
    let mut reason = format!("{way}, by the configuration");
    if choice == Choice::ZeroCopy && !zero_copy.available {
        reason.push_str(&format!("; zero copy: {}", zero_copy.reason));
    }
    Check { name: "way of block files".to_owned(), ok, needed: false, reason }
}

fn seen(config: &Config) -> Vec<Seen> {
    let loaded = match config.probes {
        true => {
            Probes::load(&Options::default()).map_err(|error| format!("{:#}", anyhow::Error::from(error)))
        }
        false => Err("switched off in the configuration".to_owned()),
    };
    let levels = loaded.as_ref().map(Probes::levels);
    let of = |capability| match levels {
        Ok(Levels { reached, refused }) => Seen {
            capability,
            level: reached.get(&capability).map(ToString::to_string),
            refused: refused.get(&capability).cloned(),
        },
        Err(reason) => Seen { capability, level: None, refused: Some(reason.clone()) },
    };
    Capability::ALL.map(of).into()
}

fn links_checks(release: &str, links: &Links) -> Vec<Check> {
    let fault = match (links.has_fault(), fault::is_affected(release)) {
        (Some(true), _) => format!(
            "this kernel has bug 217850 (in {}; mended in {}): calls fail on overlays over FUSE and NFS, not on ours",
            fault::AFFECTED_TEXT,
            fault::FIXED_TEXT
        ),
        (Some(false), _) => "healthy: this kernel does not have bug 217850".to_owned(),
        (None, Some(true)) => format!(
            "could not be tried; by its version this kernel has bug 217850, mended in {}",
            fault::FIXED_TEXT
        ),
        (None, _) => "could not be tried; by its version this kernel does not have bug 217850".to_owned(),
    };
    let has_fault = links.has_fault().or(fault::is_affected(release)).unwrap_or(false);
    vec![
        of_outcome("symbolic links on streamed images", &links.on_erofs, "all operations work"),
        Check {
            name: "kernel's handling of symbolic links".to_owned(),
            ok: !has_fault,
            needed: false,
            reason: match &links.on_noatime {
                Ok(tried) => said(fault, tried),
                Err(reason) => format!("{fault} ({reason})"),
            },
        },
    ]
}

/// What could not be tried counts as good: the kernel's version speaks besides.
fn of_outcome(name: &str, outcome: &Outcome, good: &str) -> Check {
    let (ok, reason) = match outcome {
        Ok(tried) if tried.iter().all(|one| one.failure.is_none()) => (true, good.to_owned()),
        Ok(tried) => (false, said("they are pulled the ordinary way".to_owned(), tried)),
        Err(reason) => (true, format!("could not be tried: {reason}")),
    };
    Check { name: name.to_owned(), ok, needed: true, reason }
}

fn said(mut text: String, tried: &[Tried]) -> String {
    for Tried { operation, failure } in tried {
        if let Some(failure) = failure {
            text.push_str(&format!("; {operation}: {failure}"));
        }
    }
    text
}
