//! `cargo xtask kernel-tests`: what users are promised, on every kernel they run, in guests.
//!
//! Guests are QEMU's, with KVM where it boots a kernel and without elsewhere. Each kernel boots once for most cases; those from
//! which there is no way back have a guest of their own.

mod cases;
mod emulator;
mod guest;
mod job;
mod pack;
mod report;

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::cases::Case;
use self::emulator::Emulator;
use self::guest::Boot;
use self::pack::Pack;
use self::report::{Report, Verdict};
use crate::images::{self, Gone, Kernel};
use crate::run::{target, top};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these kernels: names in vm-images/kernels.toml, or paths of your own (a directory as a kernel's package unpacks
    /// to, or a vmlinuz-RELEASE)
    #[arg(long, value_name = "NAME|PATH")]
    kernel: Vec<String>,
    /// Only these cases
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Only a few cases, for a quick answer on all kernels
    #[arg(long)]
    quick: bool,
    /// Where a locked kernel is gone from its suite, take what that offers now
    #[arg(long)]
    follow: bool,
    /// Break on purpose what each case watches over: every case must fail
    #[arg(long)]
    broken: bool,
    /// Keep the guests' disks
    #[arg(long)]
    keep: bool,
    /// A shell in a guest instead of cases
    #[arg(long)]
    shell: bool,
    /// Write docs/kernels.md from this run, which must be a whole one
    #[arg(long, conflicts_with_all = ["kernel", "case", "quick", "broken"])]
    docs: bool,
    /// Guests at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

impl Args {
    /// A quick answer on all kernels, whatever became of the locked ones.
    pub(crate) fn for_tests() -> Self {
        Self {
            kernel: Vec::new(),
            case: Vec::new(),
            quick: true,
            follow: true,
            broken: false,
            keep: false,
            shell: false,
            docs: false,
            jobs: 2,
        }
    }
}

/// See the module text.
pub(crate) fn kernel_tests(args: &Args) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the kernels of vm-images are for x86_64");
    }
    let wanted = wanted(args)?;
    let gone = if args.follow { Gone::Follows } else { Gone::Fails };
    let kernels = images::kernels(&args.kernel, gone)?;
    let emulator = Emulator::install()?;
    let pack = Pack::make(wanted.iter().any(|case| case.name == "large-file"))?;
    let emulator = with_kvm_if_it_works(emulator, &pack, &kernels)?;
    if args.shell {
        return shell(&pack, kernels.first().context("no kernel")?, &emulator);
    }
    let begin = Instant::now();
    let left = Mutex::new(job::boots(&kernels, &wanted));
    let outcomes = Mutex::new(Vec::new());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    // The lock is not held while a guest runs.
                    let job = lock(&left).pop();
                    let Some(job) = job else { return };
                    match job.carry_out(&pack, args, &emulator) {
                        Ok(found) => lock(&outcomes).extend(found),
                        Err(error) => {
                            println!("{}: {error:#}", job.name());
                            *lock(&failed) = Some(error.context(job.name()));
                            return;
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let report = Report { kernels: &kernels, outcomes, broken: args.broken };
    let place = target().join("kernel-tests");
    report.write(&place)?;
    for outcome in report.failures() {
        println!("--- {} on {}\n{}", outcome.case, outcome.kernel, outcome.said);
    }
    println!("{}", report.table());
    let count = |verdict| report.outcomes.iter().filter(|one| one.verdict == verdict).count();
    let (passed, bad, absent) = (count(Verdict::Ok), count(Verdict::Failed), count(Verdict::Absent));
    println!("results: {0}/results.json, {0}/junit.xml", place.display());
    if args.docs {
        std::fs::write(top().join("docs/kernels.md"), report.page())?;
    }
    let verdict = if bad == 0 && passed > 0 { "ok" } else { "FAILED" };
    println!(
        "test result: {verdict}. {passed} passed; {bad} failed; {absent} ignored; kernels: {}; by {}; finished in {:.0}s",
        kernels.len(),
        emulator.accelerator,
        begin.elapsed().as_secs_f64()
    );
    if verdict == "ok" { Ok(()) } else { bail!("{bad} cases failed in guests") }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wanted(args: &Args) -> Result<Vec<&'static Case>> {
    if let Some(unknown) = args.case.iter().find(|name| !cases::all().any(|case| case.name == **name)) {
        let known: Vec<_> = cases::all().map(|case| case.name).collect();
        bail!("no case `{unknown}`: there are {}", known.join(", "));
    }
    let named = |case: &&Case| args.case.is_empty() || args.case.iter().any(|name| name == case.name);
    Ok(cases::all().filter(|case| named(case) && (case.quick || !args.quick)).collect())
}

/// KVM, where a guest's first program runs under it; found out once for each start of this machine.
fn with_kvm_if_it_works(emulator: Emulator, pack: &Pack, kernels: &[Kernel]) -> Result<Emulator> {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if open.is_err() {
        return Ok(emulator);
    }
    let with_kvm = emulator.with_kvm();
    let this_start = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let known = target().join("kernel-tests/accelerator");
    if let Ok(text) = std::fs::read_to_string(&known)
        && let Some((start, accelerator)) = text.split_once(' ')
        && start == this_start.trim()
    {
        return Ok(if accelerator == with_kvm.accelerator { with_kvm } else { emulator });
    }
    let kernel = kernels.first().context("no kernel")?;
    let (initramfs, scratch) = (pack.initramfs("trial", kernel, None, "")?, pack.scratch("trial")?);
    let boot = Boot {
        kernel,
        initramfs: &initramfs,
        programs: &pack.programs,
        scratch: &scratch,
        options: "",
        log: pack.log("trial"),
        emulator: &with_kvm,
    };
    let found = if guest::boots(&boot, KVM_BOOT) { with_kvm } else { emulator };
    println!("guests run by {}", found.accelerator);
    std::fs::write(known, format!("{} {}", this_start.trim(), found.accelerator))?;
    Ok(found)
}

/// With hardware help a guest is up in two.
const KVM_BOOT: Duration = Duration::from_secs(12);

fn shell(pack: &Pack, kernel: &Kernel, emulator: &Emulator) -> Result<()> {
    let (initramfs, scratch) =
        (pack.initramfs("shell", kernel, None, "shell\t0\t-\n")?, pack.scratch("shell")?);
    let log: &Path = &pack.log("shell");
    guest::shell(&Boot {
        kernel,
        initramfs: &initramfs,
        programs: &pack.programs,
        scratch: &scratch,
        options: "",
        log: log.to_path_buf(),
        emulator,
    })
}
