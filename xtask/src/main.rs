//! Development commands of the project: `cargo xtask demo`, `cargo xtask test` and their like.
//!
//! They drive the `sluice` binary from outside, as a user does, and install what a fresh machine lacks.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "commands speak to a terminal")]

mod bench;
mod containerd;
mod demo;
mod dist;
mod ebpf;
mod foreign;
mod fuzz;
mod image_maker;
mod images;
mod install;
mod kernel_tests;
mod kill;
mod measure;
mod oracle;
mod packages;
mod run;
mod sluice;
mod soak;
mod suites;
mod systemd;
mod test;
mod tidy;
mod watched;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development commands of Sluice.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a container from a streamed image beside a full pull, and compare
    Demo(demo::Args),
    /// Run all tests that need no hardware of their own
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Benchmarks
    Bench {
        #[command(subcommand)]
        bench: Bench,
    },
    /// Fuzz the parsers of outside bytes
    Fuzz(fuzz::Args),
    /// A node under faults of all kinds: no wrong byte, no failed read, no deadlock, and all is complete in the end
    Soak(soak::Args),
    /// The process behind the soak's disk
    #[command(hide = true)]
    SoakDisk(soak::disk::server::Args),
    /// Build the eBPF programs, and install what that needs
    Ebpf,
    /// Kill the daemon at random times while containers use a streamed image
    Kill(kill::Args),
    /// Compare `sluice mount` with `umoci unpack`, path by path
    Oracle,
    /// Fetch the kernels that test guests boot
    Images(images::Args),
    /// Test what is promised on every kernel of vm-images, in guests
    KernelTests(kernel_tests::Args),
    /// Install Sluice on this node: program, configuration, units, containerd's proxy plugin
    Install(install::Args),
    /// Undo what `install` did
    Uninstall(install::Args),
    /// Run the tests with a real containerd of another Debian suite
    TestContainerd(suites::Args),
    /// Try the installed units under a real systemd, in namespaces of its own
    TestSystemd(systemd::Args),
    /// Make packages
    Dist {
        #[command(subcommand)]
        dist: Dist,
    },
    /// Check dependency directions, file headers and other house rules
    Tidy,
    /// Run a test program: one that hangs is ended, what failed runs once more (`cargo xtask test` uses it)
    #[command(hide = true)]
    Watched(watched::Args),
}

#[derive(Debug, Subcommand)]
enum Dist {
    /// A Debian package
    Deb(dist::Args),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Time to ready: containerd's full pull, sluice's first pull, sluice streamed
    Start(bench::Args),
    /// Reading files: ours beside ext4, overlayfs on both, through each way
    Read(bench::read::Args),
    /// The same working set in images of different sizes
    Size(bench::size::Args),
    /// Resident memory with many images mounted
    Memory(bench::memory::Args),
    /// What recording by probes costs a storm of opens and programs started
    Probes(bench::probes::Args),
    /// From CRI PullImage to the command's end: overlayfs, sluice, stargz
    Cri(bench::cri::Args),
    /// Lazy loaders of others beside `sluice run`: nydus, by its programs' paths
    Peers(bench::peers::Args),
    /// Many containers, a storm of starts, ten thousand blocked reads, fairness between containers
    Load(bench::load::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Demo(args) => demo::demo(&args),
        Command::Test { filter } => test::test(filter.as_deref()),
        Command::Bench { bench: Bench::Start(args) } => bench::start(&args),
        Command::Bench { bench: Bench::Size(args) } => bench::size::size(&args),
        Command::Bench { bench: Bench::Memory(args) } => bench::memory::memory(&args),
        Command::Bench { bench: Bench::Probes(args) } => bench::probes::probes(&args),
        Command::Bench { bench: Bench::Read(args) } => bench::read::read(&args),
        Command::Bench { bench: Bench::Cri(args) } => bench::cri::run(&args),
        Command::Bench { bench: Bench::Peers(args) } => bench::peers::peers(&args),
        Command::Bench { bench: Bench::Load(args) } => bench::load::load(&args),
        Command::Fuzz(args) => fuzz::fuzz(&args),
        Command::Soak(args) => soak::soak(&args),
        Command::SoakDisk(args) => soak::disk::server::serve(&args),
        Command::Ebpf => ebpf::build().map(|object| println!("{}", object.display())),
        Command::Kill(args) => kill::kill(&args),
        Command::Oracle => oracle::oracle(),
        Command::Images(args) => images::images(&args),
        Command::KernelTests(args) => kernel_tests::kernel_tests(&args),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::TestContainerd(args) => suites::test(&args),
        Command::TestSystemd(args) => systemd::test(&args),
        Command::Dist { dist: Dist::Deb(args) } => dist::deb(&args),
        Command::Tidy => tidy::tidy(),
        Command::Watched(args) => watched::watched(&args),
    }
}
