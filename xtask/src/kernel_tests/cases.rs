//! The cases: what runs in a guest, on which kernels, and for how long at most.

use crate::images::Kernel;

/// What a kernel must have for a case to have a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    /// EROFS with a device per layer.
    ErofsDevices,
    /// FUSE over io_uring.
    FuseUring,
    /// The same with zero copy.
    FuseZeroCopy,
}

impl Needs {
    /// What this kernel lacks, with its number: a kernel that should have it and has it not fails the case.
    pub(super) fn lacks(self, kernel: &Kernel) -> Option<&'static str> {
        let (major, minor, what) = match self {
            Self::Nothing => return None,
            Self::ErofsDevices => (5, 16, "no EROFS with several devices before 5.16"),
            Self::FuseUring => (6, 14, "no FUSE over io_uring before 6.14"),
            Self::FuseZeroCopy => (7, 3, "no FUSE over io_uring with zero copy before 7.3"),
        };
        (!kernel.at_least(major, minor)).then_some(what)
    }
}

/// Which guest a case runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// One guest with others, after one another.
    Shared,
    /// A guest of its own, since there is no way back.
    Own,
    /// A guest of its own that lacks this module, unless the case is broken on purpose.
    Without(&'static str),
    /// Two guests on one disk: the first, which runs this case, is destroyed when it says so.
    AfterCut(&'static str),
}

/// One row of the matrix.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: &'static str,
    /// For people.
    pub(super) about: &'static str,
    pub(super) needs: Needs,
    pub(super) place: Place,
    /// Part of `--quick`.
    pub(super) quick: bool,
    /// Without hardware help on a busy machine.
    pub(super) seconds: u64,
    pub(super) command: Run,
}

/// What PID 1 starts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Run {
    /// The guest program's case of this name.
    Guest,
    /// A crate's own test program, with variables and arguments: the suite that runs natively.
    Suite {
        program: &'static str,
        variables: &'static [&'static str],
        arguments: &'static [&'static str],
        /// A variable that breaks what is watched over, and the test that must fail then: it is enough, the others only wait.
        broken: (&'static str, &'static str),
    },
}

const fn guest(name: &'static str, about: &'static str) -> Case {
    Case {
        name,
        about,
        needs: Needs::Nothing,
        place: Place::Shared,
        quick: false,
        seconds: 600,
        command: Run::Guest,
    }
}

/// All cases, in the order in which a guest runs them.
pub(super) const CASES: [Case; 21] = [
    Case { quick: true, ..guest("start", "a container starts from a streamed image, time to ready") },
    Case {
        quick: true,
        ..guest("overlay", "renames, links, copy-up, whiteouts, attributes, mmap, exec on a streamed image")
    },
    Case {
        quick: true,
        ..guest(
            "overlay-control",
            "a symbolic link is renamed in a FUSE lower: fails on the kernel with the fault, as it must",
        )
    },
    guest(
        "rename-fault",
        "`doctor` knows the fault; every call on links works in a container; one that fails on FUSE is reported",
    ),
    Case {
        seconds: 900,
        ..guest("large-file", "a file of more than 2 GiB, read at its end, copied up whole")
    },
    Case {
        command: Run::Suite {
            program: "stack",
            variables: &["BLOCKFS_WAYS=classic"],
            arguments: &["--test-threads=1", "bare_"],
            broken: ("BLOCKFS_BROKEN=hole", "bare_"),
        },
        ..guest("fuse-loop", "a block file and its loop device, handed over while in use, without EROFS")
    },
    Case {
        needs: Needs::ErofsDevices,
        seconds: 600,
        command: Run::Suite {
            program: "stack",
            variables: &["BLOCKFS_WAYS=classic"],
            arguments: &["--test-threads=1"],
            broken: ("BLOCKFS_BROKEN=hole", "files_are_right"),
        },
        ..guest(
            "fuse-classic",
            "block files, loop devices, EROFS, hand-over while in use: the suite of blockfs, classic FUSE",
        )
    },
    Case {
        needs: Needs::FuseUring,
        seconds: 600,
        command: Run::Suite {
            program: "stack",
            variables: &["BLOCKFS_WAYS=io_uring"],
            arguments: &["--test-threads=1"],
            broken: ("BLOCKFS_BROKEN=hole", "files_are_right"),
        },
        ..guest("fuse-io_uring", "the same, FUSE over io_uring")
    },
    Case {
        needs: Needs::FuseZeroCopy,
        seconds: 600,
        command: Run::Suite {
            program: "stack",
            variables: &["BLOCKFS_WAYS=zero_copy"],
            arguments: &["--test-threads=1"],
            broken: ("BLOCKFS_BROKEN=hole", "files_are_right"),
        },
        ..guest("fuse-zero_copy", "the same, FUSE over io_uring with zero copy")
    },
    guest("one-device", "metadata and layers in one EROFS device"),
    Case {
        seconds: 900,
        command: Run::Suite {
            program: "probes",
            variables: &[],
            arguments: &["--test-threads=1"],
            broken: ("PROBES_BROKEN=nothing", "reads_mappings_and_programs"),
        },
        ..guest("probes", "probes load, attach, fire, with every kind of hook: the suite of probes")
    },
    Case {
        needs: Needs::FuseUring,
        ..guest("uring-off", "FUSE over io_uring switched off and on by the module's parameter")
    },
    guest("doctor", "`sluice doctor`: everything can be seen by probes, by what kind of hook"),
    guest(
        "btf-missing",
        "no descriptions of the kernel's types: containers start, and it is said what is not seen",
    ),
    guest("killed", "kill -9 of the daemon while its image is read; the next one takes over"),
    guest("store-full", "no room on the store's disk"),
    guest("clock", "the wall clock jumps by a year, forth and back"),
    guest("batch", "a Batch task's memory and processors are limited by control groups of version 2"),
    // Version 1 may keep its controllers for a while after that.
    guest("cgroup-v1", "control groups of version 1"),
    Case { place: Place::Own, ..guest("lockdown", "the kernel locked down to confidentiality") },
    Case {
        place: Place::Without("erofs"),
        ..guest("module-missing", "no EROFS: the image is unpacked, with the reason")
    },
];

/// Those after a power cut.
pub(super) const AFTER_CUT: Case = Case {
    place: Place::AfterCut("power-fill"),
    ..guest("power-check", "power cut in the middle of a fill: the store is sound, the fill goes on")
};

/// Every case.
pub(super) fn all() -> impl Iterator<Item = &'static Case> {
    CASES.iter().chain([&AFTER_CUT])
}
