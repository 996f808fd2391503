//! Signals, terminals, removal while running, and what is kept.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_container::{Bundle, SpecOptions};

use crate::root::{RUNTIMES, Root, Running};

const WAIT: &str = "while :; do sleep 0.05; done";

#[test]
fn signals_arrive() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
        ] {
            let name = signal.as_str().trim_start_matches("SIG");
            let script = format!("trap 'echo got {name}; exit 42' {name}; echo ready; {WAIT}");
            let mut running = Running::start(&root, &script);
            let pid = i32::try_from(running.child.id()).expect("pid");
            kill(Pid::from_raw(pid), signal).expect("signal");
            assert_eq!(running.finish(), (format!("got {name}\n"), Some(42)), "{runtime}: {signal}");
            running.bundle.remove(false).expect("remove");
            root.assert_nothing_left();
        }
    }
}

/// As when the agent is told to stop, and the container's process does not care.
#[test]
fn removal_ends_a_running_container() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let mut running = Running::start(&root, &format!("trap '' TERM INT; echo ready; {WAIT}"));
        assert_eq!(root.mounts().len(), 1, "{runtime}");
        running.bundle.remove(false).expect("remove");
        let (_, code) = running.finish();
        assert_ne!(code, Some(0), "{runtime}");
        root.assert_nothing_left();
        running.bundle.remove(false).expect("again");
    }
}

#[test]
fn what_the_container_wrote_is_kept_if_asked_for() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let script = "echo kept >/tmp/file; rm /etc/group".to_owned();
        let options = SpecOptions { command: vec![script], ..SpecOptions::default() };
        let bundle = Bundle::create(root.options(), &options).expect("bundle");
        assert!(bundle.command().status().expect("runtime").success());
        bundle.remove(true).expect("remove");
        assert!(root.mounts().is_empty());
        assert_eq!(fs::read_to_string(bundle.upper().join("tmp/file")).expect("kept"), "kept\n");
        assert!(root.lower.join("etc/group").exists(), "{runtime}: the lower directory was written to");
        let beside = bundle.upper().parent().expect("bundle").read_dir().expect("read").count();
        assert_eq!(beside, 1, "{runtime}: more than the upper directory is kept");
        bundle.remove(false).expect("remove");
        root.assert_nothing_left();
    }
}

#[test]
fn a_bundle_does_not_take_anothers_name() {
    let root = Root::new("runc");
    let first = Bundle::create(root.options(), &SpecOptions::default()).expect("first");
    Bundle::create(root.options(), &SpecOptions::default()).expect_err("second");
    assert_eq!(root.mounts().len(), 1, "the first one is harmed");
    first.remove(false).expect("remove");
    root.assert_nothing_left();
}

/// The mount must be found again, or removal would go through it.
#[test]
fn a_state_directory_behind_a_link() {
    let root = Root::new("runc");
    let real = root.dir.path().join("containers");
    fs::create_dir(&real).expect("create");
    let link = root.dir.path().join("link");
    std::os::unix::fs::symlink(&real, &link).expect("link");
    let mut options = root.options();
    options.dir = link;
    let bundle = Bundle::create(options, &SpecOptions::default()).expect("bundle");
    assert!(bundle.command().output().expect("runtime").status.success());
    bundle.remove(false).expect("remove");
    root.assert_nothing_left();
}

#[test]
fn a_terminal_is_passed_through() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let script = "tty; test -t 0 && test -t 1 && echo $TERM; exit 9".to_owned();
        let options = SpecOptions { command: vec![script], terminal: true, ..SpecOptions::default() };
        let bundle = Bundle::create(root.options(), &options).expect("bundle");
        // script(1) gives the runtime a terminal, and its exit code.
        let command = bundle.command();
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let line = words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
        let output = Command::new("script")
            .args(["--quiet", "--return", "--command", &line, "/dev/null"])
            .stdin(Stdio::null())
            .output()
            .expect("these tests need script(1)");
        bundle.remove(false).expect("remove");
        let text = String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n");
        assert_eq!(output.status.code(), Some(9), "{runtime}: {text}");
        assert!(text.contains("/dev/pts/0") || text.contains("/dev/console"), "{runtime}: {text}");
        assert!(text.contains("xterm"), "{runtime}: {text}");
        root.assert_nothing_left();
    }
}
