//! Which programs see what on this kernel: for each capability the best way that can be loaded and attached.

use std::path::Path;

use aya::{Btf as KernelTypes, Ebpf};
use sluice_trace::{Capability, Level, Levels};

use crate::attach::{self, Link};
use crate::hooks::{Hook, WAYS, Way};
use crate::probes::{Options, TRACEFS};

/// What is used of the object.
#[derive(Default)]
pub(crate) struct Chosen {
    pub(crate) levels: Levels,
    /// Attached while something is watched.
    pub(crate) recording: Vec<Hook>,
    /// Attached, and to stay so.
    pub(crate) always: Vec<Link>,
}

/// Tries the ways to each capability, best first, until one can be loaded and attached.
pub(crate) fn choose(
    bpf: &mut Ebpf,
    options: &Options,
    offsets: &sluice_events::Offsets,
    no_trampolines: Option<nix::Error>,
    stays: &mut dyn FnMut(),
) -> Chosen {
    let mut chosen = Chosen::default();
    // For programs that the kernel knows by its own type numbers. Tens of MiB, not kept.
    let mut types: Option<KernelTypes> = None;
    for way in WAYS {
        let capability = way.capability;
        if way.level > options.highest
            || !options.capabilities.contains(&capability)
            || chosen.levels.of(capability).is_some()
        {
            continue;
        }
        let refused = no_trampolines.filter(|_| way.level == Level::Fexit);
        let tried = if let Some(errno) = refused {
            Err(format!("programs at functions are refused: {errno}"))
        } else if way.is_possible(offsets) {
            if way.needs_types() && types.is_none() {
                types = kernel_types();
            }
            try_hooks(bpf, types.as_ref(), way, stays)
        } else {
            Err("the kernel's type information lacks what it needs".to_owned())
        };
        match tried {
            Ok(links) => {
                chosen.levels.reached.insert(capability, way.level);
                chosen.always.extend(links);
                if !is_permanent(capability) {
                    chosen.recording.extend_from_slice(way.hooks);
                }
            }
            Err(reason) => {
                let level = way.level;
                tracing::debug!(?capability, %level, reason, "not to be had");
                let text = chosen.levels.refused.entry(capability).or_default();
                text.push_str(if text.is_empty() { "" } else { "; " });
                text.push_str(&format!("{level}: {reason}"));
            }
        }
    }
    chosen
}

/// Whether its programs are attached all the time: they cost nothing until something fails.
fn is_permanent(capability: Capability) -> bool {
    capability == Capability::FailedCall
}

/// Loads and attaches; returns what is to stay attached.
///
/// What is not to stay is tried all the same, except system-call tracepoints, which take 70 ms each to detach (6.18).
fn try_hooks(
    bpf: &mut Ebpf,
    types: Option<&KernelTypes>,
    way: &Way,
    stays: &mut dyn FnMut(),
) -> Result<Vec<Link>, String> {
    let is_permanent = is_permanent(way.capability);
    for hook in way.hooks {
        attach::load(bpf, types, *hook).map_err(|error| words(&error))?;
    }
    let mut links = Vec::new();
    for hook in way.hooks {
        match hook {
            Hook::Syscalls(_, names) if !is_permanent => {
                let events = Path::new(TRACEFS).join("events/syscalls");
                if !names.iter().any(|name| events.join(name).exists()) {
                    return Err(format!("no tracepoint of {names:?}"));
                }
            }
            hook => {
                links.extend(attach::attach(bpf, *hook).map_err(|error| words(&error))?);
                // These take long to detach, and no other way is tried after theirs. What else is attached goes if its way fails.
                if is_permanent && matches!(hook, Hook::Syscalls(..)) {
                    stays();
                }
            }
        }
    }
    if !is_permanent {
        return Ok(Vec::new());
    }
    stays();
    Ok(links)
}

pub(crate) fn kernel_types() -> Option<KernelTypes> {
    // That they cannot be had means that trampolines cannot, which the attempt then says.
    KernelTypes::from_sys_fs().map_err(|error| tracing::debug!(%error, "no trampolines")).ok()
}

/// An error and its causes in one line; the verifier's log is left to the first line.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut text = String::new();
    for cause in causes {
        let cause = cause.to_string();
        let line = cause.lines().next().unwrap_or_default();
        // Some repeat their causes.
        let line = line.split(" Verifier output").next().unwrap_or_default().trim_end_matches(['.', ' ']);
        if !text.contains(line) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(line);
        }
    }
    text
}
