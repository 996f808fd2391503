//! `xtask watched`: a test program, run so that nothing it does can stop the whole run, and a test that failed has to fail alone too.
//!
//! The tests mount file systems, kill daemons and share a busy machine. Two things must not happen for that: a run that says nothing until
//! somebody ends it, and one that fails by what another test did to the machine. So a program that is silent for [`SILENCE`] is told about
//! (what each of its threads waits for) and killed with all that it started; and the tests that failed, or had not ended, run once more, one
//! after the other. What passes only then is reported as such, in a line of its own that `.ci/run` prints; what fails again has failed.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run::output;

/// Longest time between two lines of a program. The longest tests take a tenth of it on two cores.
const SILENCE: Duration = Duration::from_secs(300);

/// Longest time for a program to end after it was silent for a moment and has ended: who it started may hold its output open.
const REST: Duration = Duration::from_millis(300);

/// As many tests may run again; more that fail are no accident.
const AGAIN_AT_MOST: usize = 4;

/// Marks whatever a watched program starts, in the environment that it inherits.
const MARK: &str = "SLUICE_WATCHED";

/// A test program and its arguments, as cargo gives them to a runner.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// What the runner of all test programs is called, for cargo's `--config`.
pub(crate) fn as_runner() -> Result<String> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    Ok(format!("target.\"cfg(all())\".runner = [{program:?}, \"watched\", \"--\"]"))
}

/// Runs the program, and what failed in it once more.
pub(crate) fn watched(args: &Args) -> Result<()> {
    let [program, arguments @ ..] = args.command.as_slice() else { bail!("which program?") };
    let first = run(program, arguments, SILENCE)?;
    if first.passed() {
        return Ok(());
    }
    let Some(names) = first.to_run_again(program)? else { bail!("{program} failed: {}", first.said()) };
    println!("\nagain, one after the other: {}", shown(&names));
    let mut alone: Vec<String> = vec!["--exact".to_owned(), "--test-threads=1".to_owned()];
    alone.extend(names.iter().cloned());
    let second = run(program, if names.is_empty() { arguments } else { &alone }, SILENCE)?;
    if !second.passed() {
        bail!("{program} failed twice: {}, then {}", first.said(), second.said());
    }
    println!("again: {} passed when run alone, and had failed before ({})", shown(&names), first.said());
    Ok(())
}

fn shown(names: &BTreeSet<String>) -> String {
    if names.is_empty() {
        return "all".to_owned();
    }
    names.iter().cloned().collect::<Vec<_>>().join(", ")
}

/// How a run of a program went.
#[derive(Debug, Default)]
struct Outcome {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
    /// `None`: it was killed because it was silent.
    status: Option<ExitStatus>,
}

impl Outcome {
    fn passed(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    fn said(&self) -> String {
        match self.status {
            None => format!("it hung ({} s without a word)", SILENCE.as_secs()),
            Some(status) => match status.signal() {
                Some(signal) => format!("signal {signal}"),
                None => status.to_string(),
            },
        }
    }

    /// Takes a line as libtest prints it: `test NAME ... ok`.
    fn take(&mut self, line: &str) {
        let Some((name, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        else {
            return;
        };
        // "NAME - should panic" is one of libtest's additions.
        let name = name.split(" - ").next().unwrap_or(name).to_owned();
        match result.trim_end() {
            "FAILED" => self.failed.insert(name),
            _ => self.passed.insert(name),
        };
    }

    /// Names of what has to run again; none: the whole program, which has no names; `None`: too many.
    fn to_run_again(&self, program: &str) -> Result<Option<BTreeSet<String>>> {
        let listed = Command::new(program)
            .arg("--list")
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let all: BTreeSet<String> =
            listed.lines().filter_map(|line| line.strip_suffix(": test")).map(ToOwned::to_owned).collect();
        // Programs without libtest may have no list, and take no names.
        let has_names = self.passed.union(&self.failed).all(|name| all.contains(name)) && !all.is_empty();
        if !has_names {
            return Ok(Some(BTreeSet::new()));
        }
        let names: BTreeSet<String> = all.difference(&self.passed).cloned().collect();
        Ok((!names.is_empty() && names.len() <= AGAIN_AT_MOST).then_some(names))
    }
}

/// Runs a program with its output shown, and kills all that it started when it is silent for too long.
fn run(program: &str, arguments: &[String], silence: Duration) -> Result<Outcome> {
    let mark = format!("{}-{:?}", std::process::id(), Instant::now());
    let mut child = Command::new(program)
        .args(arguments)
        .env(MARK, &mark)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let lines = lines_of(&mut child)?;
    let mut outcome = Outcome::default();
    let mut last_word = Instant::now();
    loop {
        match lines.recv_timeout(REST) {
            Ok(line) => {
                last_word = Instant::now();
                outcome.take(&line);
                print!("{line}");
                std::io::stdout().flush().context("cannot write")?;
            }
            Err(RecvTimeoutError::Disconnected) => {
                outcome.status = Some(child.wait().context("cannot wait")?);
                return Ok(outcome);
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(status) = child.try_wait().context("cannot wait")? {
                    outcome.status = Some(status);
                    return Ok(outcome);
                }
                if last_word.elapsed() > silence {
                    println!(
                        "\n{program} said nothing for {} s; what its processes wait for:",
                        SILENCE.as_secs()
                    );
                    end_all(&mark);
                    // One that the kernel holds cannot be waited for.
                    std::thread::sleep(Duration::from_secs(1));
                    child.try_wait().context("cannot wait")?;
                    return Ok(outcome);
                }
            }
        }
    }
}

/// The lines that a program prints, with their ends.
fn lines_of(child: &mut Child) -> Result<Receiver<String>> {
    let printed = child.stdout.take().context("no output")?;
    let (send, lines) = channel();
    std::thread::spawn(move || {
        let mut printed = BufReader::new(printed);
        let mut line = Vec::new();
        while printed.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    Ok(lines)
}

/// Says what the threads of all marked processes wait for, and kills them.
fn end_all(mark: &str) {
    // Twice: who is killed may just have started another.
    for round in 0..2 {
        for process in marked(mark) {
            if round == 0 {
                tell(&process);
            }
            let pid = process.file_name().unwrap_or_default();
            if let Err(error) = output(Command::new("kill").arg("-KILL").arg(pid)) {
                println!("    {error:#}");
            }
        }
    }
}

/// Directories under /proc of the processes whose environment has the mark.
fn marked(mark: &str) -> Vec<PathBuf> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let wanted = format!("{MARK}={mark}").into_bytes();
    // A process that ends meanwhile has no environment to be read.
    let has_mark = |path: &PathBuf| {
        fs::read(path.join("environ")).is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == wanted))
    };
    processes.filter_map(|entry| Some(entry.ok()?.path())).filter(has_mark).collect()
}

/// Prints a process's command line and, per thread, its name and where in the kernel it is.
fn tell(process: &std::path::Path) {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    println!("{}: {}", process.display(), read(process.join("cmdline")).replace('\0', " "));
    let Ok(threads) = fs::read_dir(process.join("task")) else { return };
    for thread in threads.filter_map(|entry| Some(entry.ok()?.path())) {
        let stack = read(thread.join("stack"));
        let calls: Vec<&str> =
            stack.lines().map(|line| line.split_once("] ").map_or(line, |(_, call)| call)).collect();
        println!("    {} {}", read(thread.join("comm")).trim(), calls.join(" < "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program as a shell script; each run is counted in a file.
    fn script(dir: &std::path::Path, text: &str) -> String {
        let path = dir.join("program");
        fs::write(&path, format!("#!/bin/sh\necho run \"$@\" >> {0}/runs\n{text}\n", dir.display()))
            .expect("write");
        output(Command::new("chmod").arg("755").arg(&path)).expect("chmod");
        path.display().to_string()
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("sluice-watched-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("dir");
        dir
    }

    const LIST: &str = "case \"$*\" in --list) printf 'a: test\\nb: test\\n'; exit;; esac";

    #[test]
    fn what_failed_runs_again_alone() {
        let dir = dir("again");
        let program = script(
            &dir,
            &format!(
                "{LIST}\ncase \"$*\" in *--exact*) echo 'test b ... ok'; exit;; esac\necho 'test a ... ok'; echo 'test b ... FAILED'; exit 101"
            ),
        );
        watched(&Args { command: vec![program] }).expect("passes at last");
        let runs = fs::read_to_string(dir.join("runs")).expect("runs");
        assert_eq!(runs, "run\nrun --list\nrun --exact --test-threads=1 b\n");
        fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn what_fails_twice_has_failed() {
        let dir = dir("twice");
        let program =
            script(&dir, &format!("{LIST}\necho 'test a ... ok'; echo 'test b ... FAILED'; exit 101"));
        let error = watched(&Args { command: vec![program] }).expect_err("fails");
        assert!(error.to_string().contains("failed twice"), "{error}");
        fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn what_hangs_is_killed_with_all_that_it_started() {
        let dir = dir("hangs");
        let program =
            script(&dir, "setsid sleep 1000 & echo $! > $(dirname $0)/pid; echo 'test a ... ok'; wait");
        let outcome = run(&program, &[], Duration::from_secs(1)).expect("ends");
        assert!(outcome.status.is_none() && outcome.passed.contains("a"), "{outcome:?}");
        let pid = fs::read_to_string(dir.join("pid")).expect("a pid");
        let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
        assert!(status.is_empty() || status.contains("State:\tZ"), "it lives: {status}");
        fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn who_holds_the_output_open_is_not_waited_for() {
        let dir = dir("open");
        let program = script(&dir, "sleep 60 & echo $! > $(dirname $0)/pid; echo 'test a ... ok'");
        let began = Instant::now();
        watched(&Args { command: vec![program] }).expect("passes");
        assert!(began.elapsed() < Duration::from_secs(30));
        let pid = fs::read_to_string(dir.join("pid")).expect("a pid");
        output(Command::new("kill").arg(pid.trim())).expect("killed");
        fs::remove_dir_all(dir).expect("removed");
    }
}
