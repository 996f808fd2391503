//! What a container sees and may change: mounts, binds, network, cgroups.

use std::fs;

use sluice_container::{Bind, Network, SpecOptions, mount_read_only};
use sluice_kernel::mount::{UnmountOptions, unmount};

use crate::root::{RUNTIMES, Root};

#[test]
fn binds_are_writable_or_not() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let shared = root.dir.path().join("shared");
        fs::create_dir(&shared).expect("create");
        fs::write(shared.join("given"), "from the node").expect("write");
        let bind = |end: &str| Bind::parse(&format!("{}:/data/in{end}", shared.display())).expect("bind");
        let script = "cat /data/in/given; echo from the container >/data/in/made";
        let options = SpecOptions { binds: vec![bind("")], ..SpecOptions::default() };
        assert_eq!(root.script(script, options).text(), "from the node", "{runtime}");
        assert_eq!(fs::read_to_string(shared.join("made")).expect("made"), "from the container\n");
        fs::remove_file(shared.join("made")).expect("remove");
        let options = SpecOptions { binds: vec![bind(":ro")], ..SpecOptions::default() };
        let refused = root.script(script, options);
        assert_ne!(refused.code, Some(0), "{runtime}");
        assert_eq!(refused.stdout, "from the node", "{runtime}: {}", refused.stderr);
        assert!(!shared.join("made").exists());
    }
}

#[test]
fn the_network_is_the_nodes_or_none() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let node = fs::read_link("/proc/self/ns/net").expect("namespace").display().to_string();
        let script = "readlink /proc/self/ns/net; ls /sys/class/net";
        let host = root.script(script, SpecOptions::default());
        assert!(host.text().starts_with(&node), "{runtime}: {host:?}");
        if let Ok(hosts) = fs::read_to_string("/etc/hosts") {
            assert_eq!(root.script("cat /etc/hosts", SpecOptions::default()).stdout, hosts, "{runtime}");
        }
        let none = root.script(script, SpecOptions { network: Network::None, ..SpecOptions::default() });
        let (namespace, interfaces) = none.text().split_once('\n').expect("two lines");
        assert_ne!(namespace, node, "{runtime}");
        assert!(
            interfaces.lines().all(|name| name == "lo" || name.ends_with('0')),
            "{runtime}: {interfaces}"
        );
        assert!(!interfaces.lines().any(|name| name.starts_with("eth")), "{runtime}: {interfaces}");
    }
}

#[test]
fn processes_host_name_and_ipc_are_its_own() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        for namespace in ["pid", "mnt", "uts", "ipc"] {
            let node = fs::read_link(format!("/proc/self/ns/{namespace}")).expect("namespace");
            let inside = root.script(&format!("readlink /proc/self/ns/{namespace}"), SpecOptions::default());
            assert_ne!(inside.text(), node.display().to_string(), "{runtime}");
        }
        assert_eq!(root.script("echo $$", SpecOptions::default()).text(), "1", "{runtime}");
    }
}

/// With the node's network too: a bind of the node's /sys would leave the mounts below it writable.
#[test]
fn the_kernels_files_cannot_be_written() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        for network in [Network::Host, Network::None] {
            let options = || SpecOptions { network, ..SpecOptions::default() };
            let writable = "while read -r id parent device from target rest; do case $target in /sys*) \
                            mkdir $target/x 2>/dev/null && echo $target;; esac; done </proc/self/mountinfo; true";
            assert_eq!(root.script(writable, options()).text(), "", "{runtime} {network:?}");
            for script in [
                "mkdir /sys/fs/cgroup/x",
                "for dir in /sys/fs/cgroup/*; do mkdir $dir/x && exit 0; done; exit 1",
                "echo x >/proc/sys/kernel/domainname",
                "echo b >/proc/sysrq-trigger",
                "touch /sys/kernel/x",
            ] {
                assert_ne!(root.script(script, options()).code, Some(0), "{runtime} {network:?}: {script}");
            }
            let masked = root.script("cat /proc/timer_list /proc/keys; ls /sys/firmware", options());
            assert_eq!(masked.stdout, "", "{runtime}");
        }
    }
}

#[test]
fn devices_are_those_of_every_container() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let script = "echo x >/dev/null && read -r -n1 x </dev/zero; ls /dev";
        let listed = root.script(script, SpecOptions::default());
        for device in
            ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "mqueue", "stdin"]
        {
            assert!(listed.stdout.lines().any(|line| line == device), "{runtime}: {device} in {listed:?}");
        }
        for line in listed.stdout.lines() {
            assert!(
                !line.starts_with("loop") && !line.starts_with("vd") && line != "fuse",
                "{runtime}: {line}"
            );
        }
    }
}

#[test]
fn several_lower_directories_topmost_first() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let top = root.dir.path().join("top");
        fs::create_dir_all(top.join("etc")).expect("create");
        fs::write(top.join("etc/which"), "top").expect("write");
        fs::write(root.lower.join("etc/which"), "bottom").expect("write");
        let mut options = root.options();
        options.lower_dirs.insert(0, top);
        let spec = SpecOptions { command: vec!["cat /etc/which".to_owned()], ..SpecOptions::default() };
        let bundle = sluice_container::Bundle::create(options, &spec).expect("bundle");
        let output = bundle.command().output().expect("runtime");
        bundle.remove(false).expect("remove");
        assert_eq!(output.stdout, b"top", "{runtime}: {output:?}");
        root.assert_nothing_left();
    }
}

#[test]
fn read_only_mounts_of_one_and_of_several() {
    let dir = tempfile::tempdir().expect("dir");
    let [one, two, target] = ["one", "two", "target"].map(|name| dir.path().join(name));
    for path in [&one, &two, &target] {
        fs::create_dir(path).expect("create");
    }
    fs::write(one.join("a"), "one").expect("write");
    fs::write(two.join("a"), "two").expect("write");
    for lower in [vec![one.clone()], vec![one, two]] {
        mount_read_only(&lower, &target).expect("mount");
        let text = fs::read_to_string(target.join("a"));
        let refused = fs::write(target.join("b"), "");
        unmount(&target, UnmountOptions::default()).expect("unmount");
        assert_eq!(text.expect("read"), "one");
        assert_eq!(refused.expect_err("read-only").kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }
}
