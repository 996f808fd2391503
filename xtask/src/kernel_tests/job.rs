//! One guest's work: booted, begun anew where a guest was lost, judged.

use anyhow::Result;

use super::Args;
use super::cases::{Case, Place, Run};
use super::emulator::Emulator;
use super::guest::{self, Boot, Ended, Heard};
use super::pack::Pack;
use super::report::{Outcome, Verdict};
use crate::images::Kernel;

/// A guest that the emulator spoilt proves nothing: how often it is begun anew.
const TRIES: u32 = 5;

/// Cases that one guest runs.
pub(super) struct Job<'a> {
    kernel: &'a Kernel,
    cases: Vec<&'static Case>,
}

/// Longest last, since they are taken from the end.
pub(super) fn boots<'a>(kernels: &'a [Kernel], wanted: &[&'static Case]) -> Vec<Job<'a>> {
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

impl Job<'_> {
    pub(super) fn name(&self) -> String {
        let own = self
            .cases
            .first()
            .filter(|case| case.place != Place::Shared)
            .map(|case| format!("-{}", case.name));
        format!("{}{}", self.kernel.name, own.unwrap_or_default())
    }

    /// Boots what it needs; what came of its cases.
    pub(super) fn carry_out(&self, pack: &Pack, args: &Args, emulator: &Emulator) -> Result<Vec<Outcome>> {
        let kernel = self.kernel;
        let mut outcomes = Vec::new();
        let mut left = Vec::new();
        for case in &self.cases {
            match case.needs.lacks(kernel) {
                Some(lacks) => outcomes.push(Outcome {
                    kernel: kernel.name.clone(),
                    case: case.name,
                    verdict: Verdict::Absent,
                    seconds: 0.0,
                    notes: Vec::new(),
                    said: lacks.to_owned(),
                }),
                None => left.push(*case),
            }
        }
        let mut spoilt = 0;
        while !left.is_empty() {
            let heard = self.boot(&left, pack, args, emulator)?;
            let died = heard.died.as_deref().unwrap_or_default();
            let again = heard.spoilt && spoilt < TRIES;
            let before = left.len();
            left.retain(|case| {
                let ended = heard.ended.iter().find(|ended| ended.name == case.name);
                let Some(ended) = ended.filter(|ended| !again || ended.verdict != "lost") else {
                    return true;
                };
                let why = if ended.verdict == "lost" { died } else { "" };
                outcomes.push(judged(kernel, case, Some(ended), why, args.broken));
                false
            });
            if again {
                spoilt += 1;
                println!("{}: the emulator spoilt the guest, which is begun anew: {died}", self.name());
            } else if left.len() == before {
                // It does not get as far as a case.
                outcomes.extend(left.drain(..).map(|case| judged(kernel, case, None, died, args.broken)));
            } else if !left.is_empty() {
                println!("{}: the guest was lost, the cases left get another one: {died}", self.name());
            }
        }
        Ok(outcomes)
    }

    /// One guest for these cases, of which all are of one place, on a new disk.
    fn boot(&self, cases: &[&'static Case], pack: &Pack, args: &Args, emulator: &Emulator) -> Result<Heard> {
        let name = self.name();
        let scratch = pack.scratch(&name)?;
        let boot = |plan: &str, without: Option<&str>, part: &str| -> Result<Heard> {
            let name = format!("{name}{part}");
            let initramfs = pack.initramfs(&name, self.kernel, without, plan)?;
            let boot = Boot {
                kernel: self.kernel,
                initramfs: &initramfs,
                programs: &pack.programs,
                scratch: &scratch,
                options: if self.kernel.name.ends_with("-fault") { "kernel-tests.fault" } else { "" },
                log: pack.log(&name),
                emulator,
            };
            println!("{name}: boots");
            guest::run(&boot)
        };
        let place = cases.first().map_or(Place::Shared, |case| case.place);
        if let (Place::AfterCut(before), Some(case)) = (place, cases.first()) {
            let plan = format!("{before}\t{}\t/guest/guest\tcase\t{before}\n", case.seconds);
            let mut heard = boot(&plan, None, "-cut")?;
            if !heard.cut {
                // The case is what comes after.
                heard.ended.iter_mut().for_each(|ended| {
                    ended.name = case.name.to_owned();
                    ended.verdict = "lost".to_owned();
                });
                heard.died.get_or_insert_with(|| "it did not ask for its power to be cut".to_owned());
                return Ok(heard);
            }
        }
        let without = match place {
            Place::Without(module) if !args.broken => Some(module),
            _ => None,
        };
        let plan: String = cases.iter().map(|case| line(case, args.broken)).collect();
        let heard = boot(&plan, without, "")?;
        if args.keep {
            println!("{name}: kept {}", scratch.display());
        } else {
            std::fs::remove_file(&scratch)?;
        }
        Ok(heard)
    }
}

fn line(case: &Case, broken: bool) -> String {
    let mut words = vec![case.name.to_owned(), case.seconds.to_string()];
    match case.command {
        Run::Guest => {
            words.extend(["/guest/guest", "case", case.name].map(str::to_owned));
            words.extend(broken.then(|| "--broken".to_owned()));
        }
        Run::Suite { program, variables, arguments, broken: (mutation, test) } => {
            words.push("/usr/bin/env".to_owned());
            words.extend(variables.iter().map(|one| (*one).to_owned()));
            words.extend(broken.then(|| mutation.to_owned()));
            words.push(format!("/usr/lib/kernel-tests/{program}"));
            words.extend(arguments.iter().map(|one| (*one).to_owned()));
            words.extend((broken && !arguments.contains(&test)).then(|| test.to_owned()));
        }
    }
    words.join("\t") + "\n"
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

#[cfg(test)]
mod tests {
    use super::super::cases::CASES;
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
