//! The runtime specification of a container, from its image's configuration and what the user asked for.
//!
//! Defaults (capabilities, masked paths, mounts) are those of Docker and containerd.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{ContainerError, users};

const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];
// Docker's, and the tmpfs that runc (1.1) leaves writable above the cgroup v1 hierarchies.
const READ_ONLY: [&str; 6] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys/fs/cgroup"];
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A directory or file of the node in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the node.
    pub source: String,
    /// In the container.
    pub target: String,
    /// Not writable there.
    pub read_only: bool,
}

impl Bind {
    /// Reads `SRC:DST[:ro]`.
    pub fn parse(text: &str) -> Result<Self, ContainerError> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, target, read_only) = match parts.as_slice() {
            [source, target] | [source, target, "rw"] => (source, target, false),
            [source, target, "ro"] => (source, target, true),
            _ => return Err(ContainerError::Bind(text.to_owned())),
        };
        if !source.starts_with('/') || !target.starts_with('/') {
            return Err(ContainerError::Bind(text.to_owned()));
        }
        Ok(Self { source: (*source).to_owned(), target: (*target).to_owned(), read_only })
    }
}

/// The container's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// The node's.
    #[default]
    Host,
    /// Loopback only.
    None,
}

/// What the user asked for.
#[derive(Debug, Clone, Default)]
pub struct SpecOptions {
    /// Instead of the image's entry point.
    pub entrypoint: Option<String>,
    /// Instead of the image's command.
    pub command: Vec<String>,
    /// `KEY=VALUE`, over the image's.
    pub env: Vec<String>,
    /// Instead of the image's.
    pub workdir: Option<String>,
    /// Instead of the image's: `USER[:GROUP]`.
    pub user: Option<String>,
    /// What is bound into the container.
    pub binds: Vec<Bind>,
    /// Its network.
    pub network: Network,
    /// There is a terminal.
    pub terminal: bool,
    /// Control group in which the container's is made, absolute; none: `/sluice`.
    pub cgroup_parent: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct ImageFile {
    #[serde(default)]
    config: Option<ImageConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ImageConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
}

/// The specification as JSON. `root` is the mounted root file system.
pub(crate) fn build(
    id: &str,
    root: &Path,
    image_config: &str,
    options: &SpecOptions,
) -> Result<Value, ContainerError> {
    let image: ImageFile = serde_json::from_str(image_config).map_err(ContainerError::Config)?;
    let image = image.config.unwrap_or_default();
    let user = users::resolve(root, options.user.as_deref().or(image.user.as_deref()).unwrap_or(""))?;
    let workdir = options.workdir.clone().or(image.working_dir.clone()).filter(|dir| !dir.is_empty());
    // The runtime makes it if it is not there, but wants it absolute.
    let workdir = workdir.map_or_else(|| "/".to_owned(), |dir| format!("/{}", dir.trim_start_matches('/')));
    let mut namespaces: Vec<Value> =
        ["pid", "mount", "uts", "ipc", "cgroup"].iter().map(|kind| json!({ "type": kind })).collect();
    if options.network == Network::None {
        namespaces.push(json!({"type": "network"}));
    }
    let hostname: String = id.chars().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect();
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": options.terminal,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
            "args": arguments(&image, options)?,
            "env": environment(&image, options, &user.home),
            "cwd": workdir,
            "capabilities": {
                "bounding": CAPABILITIES, "permitted": CAPABILITIES, "effective": CAPABILITIES,
            },
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": hostname,
        "mounts": mounts(options),
        "annotations": { "org.opencontainers.image.stopSignal": image.stop_signal.unwrap_or_default() },
        "linux": {
            "cgroupsPath": format!("{}/{id}", options.cgroup_parent.as_deref().unwrap_or("/sluice")),
            "namespaces": namespaces,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": { "devices": devices() },
        },
    });
    Ok(spec)
}

fn arguments(image: &ImageConfig, options: &SpecOptions) -> Result<Vec<String>, ContainerError> {
    // A given entry point takes the image's command away with the image's entry point.
    let (entrypoint, cmd) = match &options.entrypoint {
        Some(entrypoint) => (vec![entrypoint.clone()], Vec::new()),
        None => (image.entrypoint.clone().unwrap_or_default(), image.cmd.clone().unwrap_or_default()),
    };
    let cmd = if options.command.is_empty() { cmd } else { options.command.clone() };
    let args: Vec<String> = entrypoint.into_iter().chain(cmd).collect();
    if args.is_empty() { Err(ContainerError::NoCommand) } else { Ok(args) }
}

fn environment(image: &ImageConfig, options: &SpecOptions, home: &str) -> Vec<String> {
    let mut env: Vec<String> = image.env.clone().unwrap_or_default();
    let set = |env: &mut Vec<String>, entry: &str, replace: bool| {
        let key = entry.split('=').next().unwrap_or(entry);
        let same = |one: &String| one.split('=').next() == Some(key);
        if replace {
            env.retain(|one| !same(one));
        }
        if !env.iter().any(same) {
            env.push(entry.to_owned());
        }
    };
    set(&mut env, DEFAULT_PATH, false);
    set(&mut env, &format!("HOME={home}"), false);
    if options.terminal {
        set(&mut env, "TERM=xterm", false);
    }
    for entry in &options.env {
        set(&mut env, entry, true);
    }
    env
}

fn mounts(options: &SpecOptions) -> Vec<Value> {
    let mount = |target: &str, kind: &str, source: &str, flags: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": flags });
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ];
    // A bind of the node's /sys would bring the writable mounts below it along: cgroups, debugfs, bpf.
    mounts.push(mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]));
    if options.network == Network::Host {
        for file in ["/etc/resolv.conf", "/etc/hosts"].into_iter().filter(|file| Path::new(file).exists()) {
            mounts.push(mount(file, "bind", file, &["bind", "ro"]));
        }
    }
    for bind in &options.binds {
        let access = if bind.read_only { "ro" } else { "rw" };
        mounts.push(mount(&bind.target, "bind", &bind.source, &["rbind", "rprivate", access]));
    }
    mounts
}

/// Docker's device rules: nothing but what every container may use.
fn devices() -> Vec<Value> {
    let allow = |major: u32, minor: Option<u32>| json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm" });
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    rules.extend([3, 5, 7, 8, 9].map(|minor| allow(1, Some(minor))));
    rules.extend([0, 2].map(|minor| allow(5, Some(minor))));
    rules.push(allow(136, None));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        r#"{"config":{"Entrypoint":["/init"],"Cmd":["a","b"],"Env":["A=1","HOME=/h"],"WorkingDir":"/w"}}"#;

    #[test]
    fn the_configuration_and_what_overrides_it() {
        let root = tempfile::tempdir().expect("dir");
        let spec = build("x", root.path(), CONFIG, &SpecOptions::default()).expect("spec");
        assert_eq!(spec["process"]["args"], json!(["/init", "a", "b"]));
        assert_eq!(spec["process"]["cwd"], "/w");
        let options = SpecOptions {
            entrypoint: Some("sh".to_owned()),
            env: vec!["A=2".to_owned()],
            network: Network::None,
            ..SpecOptions::default()
        };
        let spec = build("x", root.path(), CONFIG, &options).expect("spec");
        assert_eq!(spec["process"]["args"], json!(["sh"]));
        let env = spec["process"]["env"].as_array().expect("env").clone();
        assert!(
            env.contains(&json!("A=2")) && !env.contains(&json!("A=1")) && env.contains(&json!("HOME=/h"))
        );
        assert!(matches!(
            build("x", root.path(), "{}", &SpecOptions::default()),
            Err(ContainerError::NoCommand)
        ));
    }

    #[test]
    fn binds() {
        let bind = Bind::parse("/a:/b:ro").expect("bind");
        assert!(bind.read_only && bind.target == "/b");
        for wrong in ["a:/b", "/a", "/a:/b:x", "/a:/b:ro:x"] {
            assert!(Bind::parse(wrong).is_err(), "{wrong}");
        }
    }
}
