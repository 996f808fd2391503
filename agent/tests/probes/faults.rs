//! Calls that fail on symbolic links the way a kernel fault lets them fail are reported, whatever made them fail.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, ReplyAttr, ReplyData,
    ReplyEntry, Request, Session,
};
use serde_json::Value;
use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{OverlayMount, mount_overlay, unmount};

use crate::rig::{Node, wait_until};

const TTL: Duration = Duration::from_secs(1);
const LINK: INodeNo = INodeNo(2);

/// A file system with one symbolic link that cannot be read: its copying up fails with ENXIO on every kernel.
struct Broken;

fn attributes(inode: INodeNo) -> FileAttr {
    let epoch = SystemTime::UNIX_EPOCH;
    let (kind, perm) = if inode == LINK { (FileType::Symlink, 0o777) } else { (FileType::Directory, 0o755) };
    FileAttr {
        ino: inode,
        size: 6,
        blocks: 0,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Broken {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("link") => reply.entry(&TTL, &attributes(LINK), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(inode));
    }

    fn readlink(&self, _: &Request, _: INodeNo, reply: ReplyData) {
        reply.error(Errno::ENXIO);
    }
}

/// Unmounts, also when the test fails.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0, UnmountOptions { lazy: true, force: false }) {
            eprintln!("{error}");
        }
    }
}

fn faults(node: &Node) -> Vec<Value> {
    let events = node.ok(&["events", "--json"]);
    let all = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|event| event["reason"] == "RenameFault").collect()
}

#[test]
fn a_rename_that_fails_with_enxio_is_reported_once_with_what_to_do() {
    let node = Node::new("");
    node.ok(&["gc"]);
    wait_until("probes are loaded", || node.log().contains("probes are loaded"));
    let (lower, merged) = (node.room("lower"), node.room("merged"));
    // `AutoUnmount` is for those who are not root; dropping the session unmounts.
    let session = Session::new(Broken, &lower, &Config::default()).and_then(Session::spawn).unwrap();
    let overlay = OverlayMount {
        lower: vec![lower],
        upper_and_work: Some((node.room("upper"), node.room("work"))),
        options: vec![],
        restrictions: Restrictions::default(),
    };
    mount_overlay(&overlay, &merged).unwrap();
    let mounted = Mounted(&merged);
    // As in a container: a mount namespace of its own, in whose overlay the process works.
    let script =
        "cd \"$1\" && mv link other; perl -e 'rename(\"link\", \"other\"); exit($! + 0)'; echo $?; sleep 2";
    let output =
        Command::new("unshare").args(["--mount", "sh", "-c", script, "sh"]).arg(&merged).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "6", "ENXIO: {output:?}");
    wait_until("the fault is reported", || !faults(&node).is_empty());
    let found = faults(&node);
    assert_eq!(found.len(), 1, "the same call again is no news: {found:#?}");
    let (kind, message) = (&found[0]["type"], found[0]["message"].as_str().unwrap());
    assert_eq!(kind, "Warning");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    for part in ["rename", "/link", "ENXIO", "mv (pid ", release.trim(), "has the fix"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(node.log().contains("RenameFault"), "it is in the log");

    // Other failures are none of this.
    let script = "cd \"$1\" && mkdir dir && ln -s x own && perl -e 'rename(\"own\", \"dir\")'";
    let other = Command::new("sh").args(["-c", script, "sh"]).arg(&merged).status().unwrap();
    assert!(other.success());
    assert_eq!(faults(&node).len(), 1);
    drop(mounted);
    session.umount_and_join().unwrap();
}
