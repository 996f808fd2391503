//! One guest: QEMU started, listened to, ended.
//!
//! The kernel's console and the guest's words come over a serial line each, through sockets. A panic, a lock-up or a warning
//! of the kernel ends the guest at once.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::emulator::Emulator;
use crate::images::Kernel;

/// What a kernel says when something is wrong with it, and no test may be believed any more.
const SIGNS: [&str; 8] = [
    "Kernel panic",
    "BUG: ",
    "WARNING: CPU",
    "soft lockup",
    "hard LOCKUP",
    "general protection fault",
    "detected stall",
    "Oops: ",
];
const MEMORY_MIB: u32 = 1024;
/// From QEMU's start until PID 1 speaks, and between its cases, without hardware help on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// PID 1 ends a case that takes too long. If it does not, the guest hangs.
const GRACE: Duration = Duration::from_secs(60);

/// What a guest boots, and from what.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    /// Programs, read-only.
    pub(super) programs: &'a Path,
    /// What the guest writes on.
    pub(super) scratch: &'a Path,
    /// Added to the kernel's command line.
    pub(super) options: &'a str,
    /// Where the console's log goes.
    pub(super) log: PathBuf,
    pub(super) emulator: &'a Emulator,
}

/// What came of a case.
#[derive(Debug, Clone, Default)]
pub(super) struct Ended {
    pub(super) name: String,
    /// `ok`, `failed` or `late` as PID 1 says; `lost` if it does not say.
    pub(super) verdict: String,
    pub(super) seconds: f64,
    pub(super) said: Vec<String>,
    pub(super) notes: Vec<String>,
}

/// What came of a guest.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) ended: Vec<Ended>,
    /// Why the guest was ended before it was done.
    pub(super) died: Option<String>,
    /// It was the emulator's fault, not the kernel's.
    pub(super) spoilt: bool,
    /// It asked for its power to be cut.
    pub(super) cut: bool,
}

enum Word {
    Guest(String),
    Kernel(String),
    /// One of the lines is closed.
    End,
}

/// Boots, listens until the guest is done, and ends it.
pub(super) fn run(boot: &Boot<'_>) -> Result<Heard> {
    let sockets = Sockets::new()?;
    let mut child = Ending(
        qemu(boot, &sockets.arguments())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start QEMU")?,
    );
    let (sender, words) = mpsc::channel();
    let listened = sockets.listen(&mut child.0, &sender);
    if let Err(error) = listened {
        let mut said = String::new();
        child.0.kill()?;
        if let Some(mut err) = child.0.stderr.take() {
            err.read_to_string(&mut said)?;
        }
        return Err(error.context(said));
    }
    drop(sender);
    let mut console = std::io::BufWriter::new(std::fs::File::create(&boot.log)?);
    let name = boot.log.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let heard = listen(&words, &name, boot.emulator, &mut console);
    drop(child);
    heard
}

/// Whether the guest's first program runs before the time is up.
pub(super) fn boots(boot: &Boot<'_>, within: Duration) -> bool {
    let run = || -> Result<bool> {
        let sockets = Sockets::new()?;
        let mut child =
            Ending(qemu(boot, &sockets.arguments()).stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
        let (sender, words) = mpsc::channel();
        sockets.listen(&mut child.0, &sender)?;
        drop(sender);
        let deadline = Instant::now() + within;
        loop {
            match words.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Word::Guest(line)) if line == "@ up" => return Ok(true),
                Ok(Word::End) | Err(_) => return Ok(false),
                Ok(_) => {}
            }
        }
    };
    run().unwrap_or(false)
}

/// A guest for a person at this terminal.
pub(super) fn shell(boot: &Boot<'_>) -> Result<()> {
    let arguments = [
        "-chardev".to_owned(),
        format!("file,id=console,path={}", boot.log.display()),
        "-chardev".to_owned(),
        "stdio,id=results,signal=off".to_owned(),
    ];
    println!("the kernel's console is in {}", boot.log.display());
    crate::run::show(&mut qemu(boot, &arguments))
}

fn qemu(boot: &Boot<'_>, lines: &[String]) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let emulator = boot.emulator;
    command
        .args(["-M", &format!("q35,accel={}", emulator.accelerator), "-cpu", emulator.cpu(), "-smp", "1"])
        .args([
            "-m",
            &MEMORY_MIB.to_string(),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(&boot.kernel.vmlinuz)
        .arg("-initrd")
        .arg(boot.initramfs)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 loglevel=5 panic=-1 no_timer_check mitigations=off nokaslr {} random.trust_cpu=on \
             watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120 {}",
            emulator.clock(),
            boot.options
        ))
        .args(["-device", "virtio-rng-pci"])
        .arg("-drive")
        .arg(format!("file={},if=virtio,format=raw,readonly=on", boot.programs.display()))
        .arg("-drive")
        .arg(format!(
            "file={},if=virtio,format=raw,cache=unsafe,discard=unmap,detect-zeroes=unmap",
            boot.scratch.display()
        ))
        .args(lines)
        .args(["-serial", "chardev:console", "-serial", "chardev:results"]);
    command
}

/// What the guest says until it ends, is ended by time or by its kernel's words, or asks for it.
fn listen(
    words: &Receiver<Word>,
    name: &str,
    emulator: &Emulator,
    console: &mut impl std::io::Write,
) -> Result<Heard> {
    let (mut heard, mut now) = (Heard::default(), None::<Ended>);
    let (mut deadline, mut done) = (Instant::now() + BOOT, false);
    loop {
        match words.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Word::Kernel(line)) => {
                writeln!(console, "{line}")?;
                heard.spoilt |= heard.died.is_some() && emulator.is_to_blame(&line);
                if !done && heard.died.is_none() && SIGNS.iter().any(|sign| line.contains(sign)) {
                    heard.died = Some(format!("the kernel says: {line}"));
                    // Whatever the case says after this.
                    heard.ended.extend(now.take().map(|now| Ended { verdict: "lost".to_owned(), ..now }));
                    // What follows tells why; it is not waited for long.
                    deadline = Instant::now() + Duration::from_secs(3);
                }
            }
            Ok(Word::Guest(line)) => {
                let mut fields = line.split(' ');
                match (fields.next(), fields.next()) {
                    // What it says after its kernel's last words is not believed.
                    _ if heard.died.is_some() => {}
                    (Some("@"), Some("up")) => deadline = Instant::now() + BOOT,
                    (Some("@"), Some("begin")) => {
                        let name = fields.next().unwrap_or_default().to_owned();
                        let seconds = fields.next().and_then(|text| text.parse().ok()).unwrap_or_default();
                        deadline = Instant::now() + Duration::from_secs(seconds) + GRACE;
                        now = Some(Ended { name, ..Ended::default() });
                    }
                    (Some("@"), Some("note")) => {
                        let note = fields.skip(1).collect::<Vec<_>>().join(" ");
                        now.iter_mut().for_each(|now| now.notes.push(note.clone()));
                    }
                    (Some("@"), Some("end")) => {
                        let mut ended = now.take().unwrap_or_default();
                        ended.name = fields.next().unwrap_or_default().to_owned();
                        ended.verdict = fields.next().unwrap_or_default().to_owned();
                        ended.seconds = fields.next().and_then(|text| text.parse().ok()).unwrap_or_default();
                        println!("{name}: {} {} in {:.0} s", ended.name, ended.verdict, ended.seconds);
                        heard.ended.push(ended);
                        deadline = Instant::now() + BOOT;
                    }
                    (Some("@"), Some("cut")) => {
                        heard.cut = true;
                        return Ok(heard);
                    }
                    (Some("@"), Some("done")) => done = true,
                    (Some("@"), Some("broken")) => heard.died = Some(line.clone()),
                    _ => {
                        now.iter_mut().for_each(|now| now.said.push(line.trim_start_matches("| ").to_owned()))
                    }
                }
            }
            Ok(Word::End) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                heard.died.get_or_insert_with(|| "nothing was heard of it for too long".to_owned());
                break;
            }
        }
    }
    if !done && heard.died.is_none() {
        heard.died = Some("the guest ended before it was done".to_owned());
    }
    heard.ended.extend(now.map(|now| Ended { verdict: "lost".to_owned(), ..now }));
    Ok(heard)
}

/// QEMU, ended when this is dropped.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("cannot end QEMU: {error}");
        }
    }
}

/// Where QEMU connects its serial lines. In a short path: a socket's has at most 107 bytes.
struct Sockets {
    dir: PathBuf,
    console: UnixListener,
    results: UnixListener,
}

impl Sockets {
    fn new() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sluice-guest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir)?;
        let console = UnixListener::bind(dir.join("console"))?;
        let results = UnixListener::bind(dir.join("results"))?;
        Ok(Self { dir, console, results })
    }

    fn arguments(&self) -> Vec<String> {
        ["console", "results"]
            .iter()
            .flat_map(|name| {
                ["-chardev".to_owned(), format!("socket,id={name},path={}", self.dir.join(name).display())]
            })
            .collect()
    }

    /// Takes both lines and reads them in threads of their own.
    fn listen(&self, child: &mut Child, words: &Sender<Word>) -> Result<()> {
        let lines = [(&self.console, Word::Kernel as fn(String) -> Word), (&self.results, Word::Guest)];
        for (listener, word) in lines {
            listener.set_nonblocking(true)?;
            let begin = Instant::now();
            let stream: UnixStream = loop {
                match listener.accept() {
                    Ok((stream, _)) => break stream,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
                if let Some(status) = child.try_wait()? {
                    bail!("QEMU ended: {status}");
                }
                if begin.elapsed() > Duration::from_secs(60) {
                    bail!("QEMU does not open its serial lines");
                }
                std::thread::sleep(Duration::from_millis(10));
            };
            stream.set_nonblocking(false)?;
            let words = words.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    line.clear();
                    if words.send(word(text)).is_err() {
                        return;
                    }
                }
                // Nobody may listen any more, which is how guests are ended.
                drop(words.send(Word::End));
            });
        }
        Ok(())
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(words: Vec<Word>) -> Heard {
        let (sender, receiver) = mpsc::channel();
        words.into_iter().for_each(|word| sender.send(word).expect("heard"));
        drop(sender);
        listen(&receiver, "test", &Emulator::tcg(), &mut std::io::sink()).expect("listened")
    }

    fn guest(lines: &[&str]) -> Vec<Word> {
        lines.iter().map(|line| Word::Guest((*line).to_owned())).collect()
    }

    #[test]
    fn verdicts_are_read() {
        let heard = heard(guest(&[
            "@ up",
            "@ begin a 5",
            "| test result: ok",
            "@ note a 1 s to ready",
            "@ end a ok 2.5",
            "@ begin b 5",
            "@ end b failed 1.0",
            "@ done",
        ]));
        let [a, b] = heard.ended.as_slice() else { panic!("{heard:?}") };
        assert_eq!((a.name.as_str(), a.verdict.as_str(), a.seconds), ("a", "ok", 2.5));
        assert_eq!(
            (a.said.as_slice(), a.notes.as_slice()),
            (&["test result: ok".to_owned()][..], &["1 s to ready".to_owned()][..])
        );
        assert_eq!(b.verdict, "failed");
        assert_eq!(heard.died, None);
    }

    #[test]
    fn a_guest_that_ends_early_has_no_verdict() {
        let heard = heard(guest(&["@ up", "@ begin a 5"]));
        assert_eq!(heard.ended.first().map(|ended| ended.verdict.as_str()), Some("lost"));
        assert!(heard.died.is_some());
    }

    #[test]
    fn the_kernels_complaints_end_a_guest() {
        let mut words = guest(&["@ up", "@ begin a 5"]);
        words.push(Word::Kernel("[    1.0] WARNING: CPU: 0 PID: 1 at fs/x.c:1".to_owned()));
        words.extend(guest(&["@ end a ok 1.0", "@ done"]));
        let heard = heard(words);
        assert!(heard.died.is_some_and(|why| why.contains("fs/x.c")), "a warning is told");
        assert_eq!(heard.ended.first().map(|ended| ended.verdict.as_str()), Some("lost"));
    }

    #[test]
    fn the_emulators_fault_is_told_from_the_kernels() {
        let died = |flags: &str| {
            let dump = ["traps: PANIC: double fault, error_code: 0x0", "Oops: double fault: 0000 [#1]"];
            let mut words = guest(&["@ up", "@ begin a 5"]);
            words.extend(dump.map(|line| Word::Kernel(line.to_owned())));
            words.push(Word::Kernel(format!("RSP: 0018:ffa0000000013a20 EFLAGS: {flags}")));
            heard(words)
        };
        assert!(died("3e9f6b4a").spoilt);
        let own = died("00010246");
        assert!(!own.spoilt && own.died.is_some_and(|why| why.contains("double fault")));
    }

    #[test]
    fn a_guest_may_ask_for_its_power_to_be_cut() {
        assert!(heard(guest(&["@ up", "@ begin a 5", "@ cut a 1 of 2", "@ end a ok 1"])).cut);
    }
}
