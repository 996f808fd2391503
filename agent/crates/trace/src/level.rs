//! What can be seen, and by which kind of hook.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Something that can be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Capability {
    /// Opens of files.
    Open,
    /// Starts of programs.
    Exec,
    /// Pages asked for by `read` and its like, in memory or not.
    Read,
    /// Pages touched through mappings and by programs, in memory or not.
    Fault,
    /// Pages that come into the page cache, read ahead or asked for.
    Fill,
    /// How long threads sleep until bytes are there.
    Blocked,
    /// Calls that change names or attributes and fail.
    FailedCall,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Open, Self::Exec, Self::Read, Self::Fault, Self::Fill, Self::Blocked, Self::FailedCall];
}

/// By what something is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Level {
    /// The agent's own log of what it served: only what was not local, and read-ahead looks like reading.
    Log = 0,
    /// Tracepoints.
    Tracepoint = 1,
    /// Kernel probes.
    Kprobe = 2,
    /// Trampolines at functions' entries and exits.
    Fexit = 3,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Log => "agent's log",
            Self::Tracepoint => "tracepoint",
            Self::Kprobe => "kprobe",
            Self::Fexit => "fexit",
        })
    }
}

/// The level reached per capability.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Levels {
    /// What is seen, and by what.
    pub reached: BTreeMap<Capability, Level>,
    /// Which kinds of hook could not be had, and why, also where another one serves.
    pub refused: BTreeMap<Capability, String>,
}

impl Levels {
    /// The level of a capability; `None`: it is not seen.
    pub fn of(&self, capability: Capability) -> Option<Level> {
        self.reached.get(&capability).copied()
    }
}
