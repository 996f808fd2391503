//! `cargo xtask kernel-tests`: what users are promised, on every kernel they run, in guests.
//!
//! Guests are QEMU's, with KVM where it boots a kernel and without elsewhere. Each kernel boots once for most cases; those from
//! which there is no way back have a guest of their own.

mod cases;
mod guest;
mod pack;
mod report;

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::cases::{Case, Place, Run};
use self::guest::{Boot, Ended};
use self::pack::Pack;
use self::report::{Outcome, Report, Verdict};
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
    /// Write docs/kernels.md from this run
    #[arg(long)]
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
    let pack = Pack::make()?;
    let accelerator = accelerator(&pack, &kernels)?;
    if args.shell {
        return shell(&pack, kernels.first().context("no kernel")?, &accelerator);
    }
    let begin = Instant::now();
    let left = Mutex::new(boots(&kernels, &wanted));
    let outcomes = Mutex::new(Vec::new());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    // The lock is not held while a guest runs.
                    let job = lock(&left).pop();
                    let Some(job) = job else { return };
                    match carry_out(&job, &pack, args, &accelerator) {
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
        "test result: {verdict}. {passed} passed; {bad} failed; {absent} ignored; kernels: {}; by {accelerator}; finished in {:.0}s",
        kernels.len(),
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

/// One guest's work.
struct Job<'a> {
    kernel: &'a Kernel,
    cases: Vec<&'static Case>,
}

impl Job<'_> {
    fn name(&self) -> String {
        let own = self
            .cases
            .first()
            .filter(|case| case.place != Place::Shared)
            .map(|case| format!("-{}", case.name));
        format!("{}{}", self.kernel.name, own.unwrap_or_default())
    }
}

/// Longest last, since they are taken from the end.
fn boots<'a>(kernels: &'a [Kernel], wanted: &[&'static Case]) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for kernel in kernels {
        for case in wanted.iter().filter(|case| case.place != Place::Shared) {
            jobs.push(Job { kernel, cases: vec![case] });
        }
    }
    for kernel in kernels {
        let cases: Vec<_> = wanted.iter().copied().filter(|case| case.place == Place::Shared).collect();
        if !cases.is_empty() {
            jobs.push(Job { kernel, cases });
        }
    }
    jobs
}

fn line(case: &Case, broken: bool) -> String {
    let mut words = vec![case.name.to_owned(), case.seconds.to_string()];
    match case.command {
        Run::Guest => {
            words.extend(["/guest/guest", "case", case.name].map(str::to_owned));
            words.extend(broken.then(|| "--broken".to_owned()));
        }
        Run::Suite { program, variables, arguments, broken: mutation } => {
            words.push("/usr/bin/env".to_owned());
            words.extend(variables.iter().map(|one| (*one).to_owned()));
            words.extend(broken.then(|| mutation.to_owned()));
            words.push(format!("/usr/lib/kernel-tests/{program}"));
            words.extend(arguments.iter().map(|one| (*one).to_owned()));
        }
    }
    words.join("\t") + "\n"
}

/// Boots what a job needs; what came of its cases.
fn carry_out(job: &Job<'_>, pack: &Pack, args: &Args, accelerator: &str) -> Result<Vec<Outcome>> {
    let (kernel, name) = (job.kernel, job.name());
    let mut outcomes = Vec::new();
    let mut cases = Vec::new();
    for case in &job.cases {
        match case.needs.lacks(kernel) {
            Some(lacks) => outcomes.push(Outcome {
                kernel: kernel.name.clone(),
                case: case.name,
                verdict: Verdict::Absent,
                seconds: 0.0,
                notes: Vec::new(),
                said: lacks.to_owned(),
            }),
            None => cases.push(*case),
        }
    }
    let Some(first) = cases.first() else { return Ok(outcomes) };
    let scratch = pack.scratch(&name)?;
    let boot = |plan: &str, without: Option<&str>, part: &str| -> Result<guest::Heard> {
        let name = format!("{name}{part}");
        let initramfs = pack.initramfs(&name, kernel, without, plan)?;
        let fault = if kernel.name.ends_with("-fault") { "kernel-tests.fault" } else { "" };
        let boot = Boot {
            kernel,
            initramfs: &initramfs,
            programs: &pack.programs,
            scratch: &scratch,
            options: fault,
            log: pack.log(&name),
            accelerator,
        };
        let seconds = cases.iter().map(|case| case.seconds).sum::<u64>() + 60;
        println!("{name}: boots");
        guest::run(&boot, Duration::from_secs(seconds))
    };
    if let Place::AfterCut(before) = first.place {
        let heard =
            boot(&format!("{before}\t{}\t/guest/guest\tcase\t{before}\n", first.seconds), None, "-cut")?;
        if !heard.cut {
            let said: Vec<String> = heard.ended.iter().flat_map(|ended| ended.said.clone()).collect();
            outcomes.push(judged(
                kernel,
                first,
                None,
                &format!("{:?}: {}", heard.died, said.join("\n")),
                args.broken,
            ));
            return Ok(outcomes);
        }
    }
    let without = match first.place {
        Place::Without(module) if !args.broken => Some(module),
        _ => None,
    };
    let plan: String = cases.iter().map(|case| line(case, args.broken)).collect();
    let heard = boot(&plan, without, "")?;
    for case in &cases {
        let ended = heard.ended.iter().find(|ended| ended.name == case.name);
        outcomes.push(judged(kernel, case, ended, heard.died.as_deref().unwrap_or_default(), args.broken));
    }
    if args.keep {
        println!("{name}: kept {}", scratch.display());
    } else {
        std::fs::remove_file(&scratch)?;
    }
    Ok(outcomes)
}

/// A case's verdict. Broken on purpose, it is right when it failed by itself, and not by a guest that was lost.
fn judged(kernel: &Kernel, case: &'static Case, ended: Option<&Ended>, died: &str, broken: bool) -> Outcome {
    let ran = ended
        .is_some_and(|ended| !matches!(case.command, Run::Suite { .. }) || tests_passed(&ended.said) > 0);
    let right = match ended.map(|ended| ended.verdict.as_str()) {
        Some("ok") => !broken && ran,
        Some("failed" | "late") => broken,
        _ => false,
    };
    let mut said = ended.map(|ended| ended.said.join("\n")).unwrap_or_default();
    for more in [died, ended.map_or("it did not run", |ended| ended.verdict.as_str())] {
        if !more.is_empty() {
            said = format!("{said}\n{more}");
        }
    }
    Outcome {
        kernel: kernel.name.clone(),
        case: case.name,
        verdict: if right { Verdict::Ok } else { Verdict::Failed },
        seconds: ended.map_or(0.0, |ended| ended.seconds),
        notes: ended.map(|ended| ended.notes.clone()).unwrap_or_default(),
        said,
    }
}

/// How many tests a suite says passed: one that ran none proves nothing.
fn tests_passed(said: &[String]) -> u32 {
    let counts = said
        .iter()
        .filter_map(|line| line.split_once("test result: ok. ")?.1.split(' ').next()?.parse::<u32>().ok());
    counts.sum()
}

/// KVM, where a guest's first program runs under it; found out once for each start of this machine.
fn accelerator(pack: &Pack, kernels: &[Kernel]) -> Result<String> {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if open.is_err() {
        return Ok("tcg".to_owned());
    }
    let this_start = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let known = target().join("kernel-tests/accelerator");
    if let Ok(text) = std::fs::read_to_string(&known)
        && let Some((start, accelerator)) = text.split_once(' ')
        && start == this_start.trim()
    {
        return Ok(accelerator.to_owned());
    }
    let kernel = kernels.first().context("no kernel")?;
    let (initramfs, scratch) = (pack.initramfs("trial", kernel, None, "")?, pack.scratch("trial")?);
    let log = pack.log("trial");
    let boot = Boot {
        kernel,
        initramfs: &initramfs,
        programs: &pack.programs,
        scratch: &scratch,
        options: "",
        log,
        accelerator: "kvm",
    };
    let works = guest::boots(&boot, KVM_BOOT);
    let found = if works { "kvm" } else { "tcg" };
    println!("guests run by {found}");
    std::fs::write(known, format!("{} {found}", this_start.trim()))?;
    Ok(found.to_owned())
}

/// With hardware help a guest is up in two.
const KVM_BOOT: Duration = Duration::from_secs(12);

fn shell(pack: &Pack, kernel: &Kernel, accelerator: &str) -> Result<()> {
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
        accelerator,
    })
}

#[cfg(test)]
mod tests {
    use super::cases::CASES;
    use super::*;

    fn kernel(release: &str) -> Kernel {
        Kernel { name: "k".into(), release: release.into(), vmlinuz: "x".into(), modules: Vec::new() }
    }

    fn ended(verdict: &str, said: &str) -> Ended {
        Ended { verdict: verdict.into(), said: vec![said.into()], ..Ended::default() }
    }

    #[test]
    fn a_suite_that_ran_nothing_and_a_guest_that_was_lost_are_failures() {
        let suite = CASES.iter().find(|case| case.name == "fuse-classic").expect("is there");
        let verdict =
            |ended: Option<&Ended>, broken| judged(&kernel("6.1"), suite, ended, "", broken).verdict;
        assert_eq!(verdict(Some(&ended("ok", "test result: ok. 3 passed; 0 failed")), false), Verdict::Ok);
        assert_eq!(
            verdict(Some(&ended("ok", "test result: ok. 0 passed; 0 failed")), false),
            Verdict::Failed
        );
        assert_eq!(verdict(Some(&ended("lost", "")), false), Verdict::Failed);
        assert_eq!(verdict(Some(&ended("lost", "")), true), Verdict::Failed);
        assert_eq!(verdict(None, true), Verdict::Failed);
        assert_eq!(verdict(Some(&ended("failed", "")), true), Verdict::Ok);
        assert_eq!(verdict(Some(&ended("ok", "test result: ok. 3 passed")), true), Verdict::Failed);
    }

    #[test]
    fn only_old_kernels_lack_something() {
        let lacking =
            |release: &str| CASES.iter().filter(|case| case.needs.lacks(&kernel(release)).is_some()).count();
        assert!(lacking("5.10.0") > lacking("6.1.0") && lacking("6.1.0") > 0);
        assert_eq!(lacking("7.3.4"), 0);
    }
}
