//! A root file system of the node's own shell and tools, and containers of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use sluice_container::{Bundle, BundleOptions, SpecOptions};
use sluice_kernel::mount::{UnmountOptions, unmount};

/// The suite runs with each of them.
pub(crate) const RUNTIMES: [&str; 2] = ["runc", "crun"];
const TOOLS: [&str; 11] =
    ["sh", "cat", "id", "ls", "mkdir", "readlink", "sleep", "stat", "touch", "tty", "rm"];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n";
const GROUP: &str = "root:x:0:\napp:x:1001:\nextra:x:1002:app\nmore:x:1003:app,root\n";
pub(crate) const CONFIG: &str =
    r#"{"config":{"Entrypoint":["/bin/sh","-c"],"Cmd":["echo from the image"],"Env":["FROM=image"]}}"#;

/// What containers are made of; removed with its directory when dropped.
pub(crate) struct Root {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) lower: PathBuf,
    pub(crate) runtime: PathBuf,
}

impl Root {
    pub(crate) fn new(runtime: &str) -> Self {
        let runtime = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"]
            .map(|dir| Path::new(dir).join(runtime))
            .into_iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("these tests need {runtime} installed"));
        let dir = tempfile::tempdir().expect("dir");
        let runtime = if is_hybrid() && runtime.ends_with("crun") {
            without_hybrid(&runtime, dir.path())
        } else {
            runtime
        };
        let lower = dir.path().join("lower");
        for name in ["etc", "home/app", "root", "tmp", "bin"] {
            fs::create_dir_all(lower.join(name)).expect("create");
        }
        for open in ["", "home", "bin", "etc"] {
            fs::set_permissions(lower.join(open), fs::Permissions::from_mode(0o755)).expect("mode");
        }
        fs::set_permissions(lower.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("mode");
        fs::write(lower.join("etc/passwd"), PASSWD).expect("write");
        fs::write(lower.join("etc/group"), GROUP).expect("write");
        for tool in TOOLS {
            copy_tool(tool, &lower);
        }
        Self { dir, lower, runtime }
    }

    pub(crate) fn options(&self) -> BundleOptions {
        BundleOptions {
            dir: self.dir.path().join("containers"),
            id: format!(
                "test-{}",
                self.dir.path().file_name().expect("name").to_string_lossy().replace('.', "")
            ),
            lower_dirs: vec![self.lower.clone()],
            image_config: CONFIG.to_owned(),
            runtime: self.runtime.clone(),
        }
    }

    /// Runs to the end; asserts that nothing stays.
    pub(crate) fn run(&self, options: &SpecOptions) -> Outcome {
        let bundle = Bundle::create(self.options(), options).expect("bundle");
        let output = bundle.command().stdin(Stdio::null()).output().expect("runtime");
        bundle.remove(false).expect("remove");
        self.assert_nothing_left();
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a shell script with what else is asked for.
    pub(crate) fn script(&self, script: &str, options: SpecOptions) -> Outcome {
        self.run(&SpecOptions { command: vec![script.to_owned()], ..options })
    }

    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new(), "mounts stay");
        let containers = self.dir.path().join("containers");
        let left: Vec<_> = fs::read_dir(&containers)
            .expect("containers")
            .map(|entry| entry.expect("entry").file_name())
            .filter(|name| name != ".runtime")
            .collect();
        assert!(left.is_empty(), "bundles stay: {left:?}");
        let state = containers.join(".runtime");
        let states = fs::read_dir(&state).map_or(0, Iterator::count);
        assert_eq!(states, 0, "the runtime keeps state in {}", state.display());
    }

    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        let mounts = sluice_kernel::mounts().expect("mounts");
        mounts
            .into_iter()
            .map(|mount| mount.target)
            .filter(|target| target.starts_with(self.dir.path()))
            .collect()
    }
}

impl Drop for Root {
    /// A failed test must not leave mounts, nor the directory be removed through them.
    fn drop(&mut self) {
        for target in self.mounts() {
            if let Err(error) = unmount(&target, UnmountOptions { lazy: true, force: false }) {
                eprintln!("{error}");
            }
        }
    }
}

/// What a container left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Its output, if it was successful.
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout.trim_end()
    }
}

/// A container whose script has said `ready`.
pub(crate) struct Running {
    pub(crate) bundle: Bundle,
    pub(crate) child: Child,
    output: BufReader<ChildStdout>,
}

impl Running {
    pub(crate) fn start(root: &Root, script: &str) -> Self {
        let options = SpecOptions { command: vec![script.to_owned()], ..SpecOptions::default() };
        let bundle = Bundle::create(root.options(), &options).expect("bundle");
        let mut child =
            bundle.command().stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("runtime starts");
        let mut output = BufReader::new(child.stdout.take().expect("stdout"));
        let mut line = String::new();
        output.read_line(&mut line).expect("read");
        assert_eq!(line, "ready\n");
        Self { bundle, child, output }
    }

    /// The rest of its output and its exit code.
    pub(crate) fn finish(&mut self) -> (String, Option<i32>) {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).expect("read");
        (rest, self.child.wait().expect("wait").code())
    }
}

/// Whether cgroup v1 and v2 both have controllers. runc takes that; crun (1.8) refuses.
fn is_hybrid() -> bool {
    fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").is_ok_and(|list| !list.trim().is_empty())
}

/// The runtime as on a node with cgroup v1 only: in a mount namespace of its own where v2 is not mounted.
fn without_hybrid(runtime: &Path, dir: &Path) -> PathBuf {
    let path = dir.join(runtime.file_name().expect("name"));
    let inner = format!("umount /sys/fs/cgroup/unified && exec {} \"$@\"", runtime.display());
    let script = format!("#!/bin/sh\nexec unshare --mount --propagation slave sh -c '{inner}' sh \"$@\"\n");
    fs::write(&path, script).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    path
}

fn copy_tool(tool: &str, root: &Path) {
    let path = ["/bin", "/usr/bin"]
        .map(|dir| Path::new(dir).join(tool))
        .into_iter()
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("these tests need {tool} installed"));
    fs::copy(&path, root.join("bin").join(tool)).expect("copy");
    for library in libraries(&path) {
        let target = root.join(library.strip_prefix("/").expect("absolute"));
        if !target.exists() {
            fs::create_dir_all(target.parent().expect("parent")).expect("create");
            fs::copy(&library, &target).expect("copy");
        }
    }
}

fn libraries(program: &Path) -> BTreeSet<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect()
}
