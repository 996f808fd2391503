//! PID 1 of a guest: modules, mounts, the plan, power-off.
//!
//! What is told to the host goes to the second serial line, one line each, beginning with `@`: `@ up`, `@ begin CASE SECONDS`,
//! `@ end CASE ok|failed|late SECONDS`, `@ done`. What a command printed stands between, behind `| `. The first serial line is
//! the kernel's alone, so nothing of his comes between.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, chroot};

const RESULTS: &str = "/dev/ttyS1";
const ROOM: &str = "/room";

/// See the module text. The kernel panics when this returns, which the host takes for what it is.
pub(crate) fn main() -> ExitCode {
    if let Err(error) = live() {
        say(&format!("@ broken {error:#}"));
        eprintln!("init: {error:#}");
    }
    nix::unistd::sync();
    // Without ACPI there is no power-off; QEMU takes a reset for one.
    if let Err(error) = fs::write("/proc/sysrq-trigger", "b") {
        eprintln!("init: cannot switch off: {error}");
    }
    std::thread::sleep(Duration::from_secs(60));
    ExitCode::FAILURE
}

fn live() -> Result<()> {
    for (kind, dir) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(dir)?;
        mount_on(kind, dir, MsFlags::empty(), "")?;
    }
    say("@ up");
    load_modules()?;
    let plan = read("/plan")?;
    make_room()?;
    mount_the_kernels()?;
    let set =
        |path: &str, value: &str| fs::write(path, value).with_context(|| format!("cannot write {path}"));
    set("/proc/sys/kernel/hung_task_timeout_secs", "0").or_else(|error| say_note(&format!("{error:#}")))?;
    command(&["/usr/bin/busybox", "ip", "link", "set", "lo", "up"])?;
    let system = mount_points()?;
    for line in plan.lines() {
        let mut words = line.split('\t');
        let (Some(name), Some(seconds)) = (words.next(), words.next()) else { bail!("plan: {line}") };
        let words: Vec<&str> = words.collect();
        if name == "shell" {
            shell(&system)?;
            continue;
        }
        carry_out(name, seconds.parse()?, &words, &system)?;
    }
    say("@ done");
    Ok(())
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// A module that does not load is told: the case that needs it fails by itself.
fn load_modules() -> Result<()> {
    let mut modules: Vec<_> =
        fs::read_dir("/modules")?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    modules.sort();
    for module in modules {
        let path = module.to_string_lossy().into_owned();
        if let Err(error) = command(&["/busybox", "insmod", &path]) {
            say_note(&format!("{path}: {error:#}"))?;
        }
    }
    Ok(())
}

/// The root: tmpfs, so that it can be written and runc can leave it; programs from the first disk; a file system to write
/// on from the second.
fn make_room() -> Result<()> {
    fs::create_dir_all(ROOM)?;
    mount_on("tmpfs", ROOM, MsFlags::empty(), "")?;
    let at = |path: &str| format!("{ROOM}{path}");
    for dir in ["/disk", "/dev", "/proc", "/sys", "/tmp", "/run", "/var/tmp", "/root", "/guest", "/usr"] {
        fs::create_dir_all(at(dir))?;
    }
    device("ext4", "/dev/vda", &at("/disk"), MsFlags::MS_RDONLY)?;
    device("ext4", "/dev/vdb", &at("/var/tmp"), MsFlags::empty())?;
    bind(&at("/disk/usr"), &at("/usr"))?;
    let copied = command(&["/busybox", "cp", "-a", &at("/disk/etc"), &at("/etc")]);
    copied.context("cannot copy /etc")?;
    for name in ["bin", "sbin", "lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{name}"), at(&format!("/{name}")))?;
    }
    fs::copy("/init", at("/guest/guest"))?;
    for dir in ["/dev", "/proc", "/sys"] {
        let none: Option<&str> = None;
        mount(Some(dir), at(dir).as_str(), none, MsFlags::MS_MOVE, none)?;
    }
    std::env::set_current_dir(ROOM)?;
    let none: Option<&str> = None;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context("cannot move the root")?;
    chroot(".")?;
    std::env::set_current_dir("/")?;
    fs::create_dir_all("/var/tmp/target").context("the disk to write on")?;
    Ok(())
}

/// Devices appear in their own time.
fn device(kind: &str, device: &str, dir: &str, flags: MsFlags) -> Result<()> {
    let begin = Instant::now();
    while !Path::new(device).exists() {
        if begin.elapsed() > Duration::from_secs(30) {
            bail!("there is no {device}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    mount(Some(device), dir, Some(kind), flags, Some("")).with_context(|| format!("cannot mount {device}"))
}

fn bind(from: &str, to: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND, none).with_context(|| format!("cannot bind {from}"))
}

fn mount_on(kind: &str, dir: &str, flags: MsFlags, data: &str) -> Result<()> {
    mount(Some("none"), dir, Some(kind), flags, Some(data))
        .with_context(|| format!("cannot mount {kind} on {dir}"))
}

/// What systems have mounted.
fn mount_the_kernels() -> Result<()> {
    for dir in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(dir)?;
    }
    // Without it runc does not start where Tomoyo is (Debian's 5.10): that looks for the path of what is executed by descriptor.
    std::os::unix::fs::symlink("/proc/self/fd", "/dev/fd")?;
    mount_on("devpts", "/dev/pts", MsFlags::empty(), "ptmxmode=0666")?;
    mount_on("tmpfs", "/dev/shm", MsFlags::empty(), "")?;
    mount_on("cgroup2", "/sys/fs/cgroup", MsFlags::empty(), "")?;
    mount_on("tracefs", "/sys/kernel/tracing", MsFlags::empty(), "")?;
    mount_on("securityfs", "/sys/kernel/security", MsFlags::empty(), "")?;
    mount_on("bpf", "/sys/fs/bpf", MsFlags::empty(), "")
}

fn command(words: &[&str]) -> Result<()> {
    let (program, arguments) = words.split_first().context("no command")?;
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{words:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A person at the second serial line.
fn shell(system: &[String]) -> Result<()> {
    let open = || OpenOptions::new().read(true).write(true).open(RESULTS);
    let mut shell = Command::new("/usr/bin/busybox");
    shell.args(["setsid", "-c", "sh"]).env("PATH", "/guest:/usr/lib/kernel-tests:/usr/sbin:/usr/bin");
    shell.stdin(open()?).stdout(open()?).stderr(open()?).current_dir("/var/tmp");
    shell.spawn()?.wait()?;
    end_everything(system)
}

/// Runs one command of the plan, and ends all that it leaves.
fn carry_out(name: &str, seconds: u64, words: &[&str], system: &[String]) -> Result<()> {
    say(&format!("@ begin {name} {seconds}"));
    let said = "/tmp/output";
    let output = File::create(said)?;
    let (program, arguments) = words.split_first().context("a plan without a command")?;
    let begin = Instant::now();
    let child = Command::new(program)
        .args(arguments)
        .current_dir("/var/tmp")
        .env("PATH", "/usr/sbin:/usr/bin")
        .env("TMPDIR", "/var/tmp")
        .env("HOME", "/root")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let verdict = wait_for(Pid::from_raw(i32::try_from(child.id())?), Duration::from_secs(seconds))?;
    end_everything(system)?;
    let text = fs::read(said)?;
    for line in String::from_utf8_lossy(&text).lines() {
        say(&format!("| {line}"));
    }
    say(&format!("@ end {name} {verdict} {:.1}", begin.elapsed().as_secs_f64()));
    Ok(())
}

/// Waits as PID 1 must: for orphans, too.
fn wait_for(child: Pid, at_most: Duration) -> Result<&'static str> {
    let begin = Instant::now();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                return Ok(if code == 0 { "ok" } else { "failed" });
            }
            Ok(WaitStatus::Signaled(pid, _, _)) if pid == child => return Ok("failed"),
            Ok(WaitStatus::StillAlive) => {}
            Ok(_) => continue,
            Err(errno) => return Err(errno).context("cannot wait"),
        }
        if begin.elapsed() > at_most {
            return Ok("late");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn mount_points() -> Result<Vec<String>> {
    let mounts = read("/proc/self/mounts")?;
    Ok(mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect())
}

/// Each case finds the system as the first one did: no processes, and no mounts where `system` has none.
fn end_everything(system: &[String]) -> Result<()> {
    let begin = Instant::now();
    loop {
        match kill(Pid::from_raw(-1), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(errno) => return Err(errno).context("cannot end what a case left"),
        }
        let mut any = false;
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            any = true;
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        let mut left = mount_points()?;
        left.retain(|dir| !system.contains(dir));
        if (!any && left.is_empty()) || begin.elapsed() > Duration::from_secs(5) {
            break;
        }
        for dir in left.iter().rev() {
            if let Err(errno) = umount2(dir.as_str(), MntFlags::MNT_DETACH) {
                say_note(&format!("{dir} stays mounted: {errno}"))?;
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn say_note(text: &str) -> Result<()> {
    say(&format!("| {text}"));
    Ok(())
}

/// Tells the host a line, whole.
pub(crate) fn say(line: &str) {
    let told = OpenOptions::new()
        .write(true)
        .open(RESULTS)
        .and_then(|mut out| out.write_all(format!("{line}\n").as_bytes()));
    if let Err(error) = told {
        eprintln!("init: cannot say `{line}`: {error}");
    }
}
