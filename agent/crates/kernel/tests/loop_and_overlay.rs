//! Loop devices and overlays on the running kernel. Needs root, as the agent does.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;

use sluice_kernel::loop_device::{self, LoopDevice, LoopError, LoopOptions};
use sluice_kernel::mount::{self, OverlayMount, Restrictions, UnmountOptions};
use sluice_kernel::{mount_overlay, mounts, unmount};

fn backing(byte: u8, blocks: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new_in("/var/tmp").expect("temporary file");
    file.write_all(&vec![byte; blocks * 4096]).expect("written");
    file.as_file().sync_all().expect("synced");
    file
}

#[test]
fn a_device_reads_its_file_and_the_file_is_exchanged_in_use() {
    let (first, second, short) = (backing(1, 16), backing(2, 16), backing(3, 15));
    let open = |file: &tempfile::NamedTempFile| File::open(file.path()).expect("opens");
    let device = LoopDevice::attach(open(&first).as_fd(), LoopOptions::default()).expect("attached");
    let status = device.status().expect("status");
    assert!(status.read_only && status.autoclear, "{status:?}");
    let listed = loop_device::list().expect("listed");
    let own = listed.iter().find(|entry| entry.number == device.number()).expect("is listed");
    assert_eq!(own.backing_file, first.path());
    assert_eq!(fs::read(device.path()).expect("read"), vec![1; 16 * 4096]);
    device.set_read_ahead_kib(64).expect("set");
    let refused = device.change_backing(open(&short).as_fd());
    assert!(matches!(refused, Err(LoopError::Request { .. })), "another size must be refused");
    device.change_backing(open(&second).as_fd()).expect("exchanged");
    assert_eq!(fs::read(device.path()).expect("read"), vec![2; 16 * 4096]);
    device.detach().expect("detached");
}

#[test]
fn more_devices_than_the_default_eight_can_be_had() {
    let file = backing(5, 1);
    let open = File::open(file.path()).expect("opens");
    let attach = || LoopDevice::attach(open.as_fd(), LoopOptions::default()).expect("attached");
    let devices: Vec<_> = (0..12).map(|_| attach()).collect();
    for device in &devices {
        assert_eq!(fs::read(device.path()).expect("read"), vec![5; 4096]);
    }
}

#[test]
fn an_overlay_of_many_long_and_odd_paths_mounts() {
    let room = tempfile::tempdir().expect("directory");
    let mut lower = Vec::new();
    for number in 0..60 {
        let directory = room.path().join(format!("{number},a:b\\c")).join("x".repeat(250));
        fs::create_dir_all(&directory).expect("made");
        fs::write(directory.join(format!("file{number}")), "x").expect("written");
        lower.push(directory);
    }
    let make = |name: &str| -> PathBuf {
        let path = room.path().join(name);
        fs::create_dir(&path).expect("made");
        path
    };
    let (tmpfs, target) = (make("scratch"), make("merged"));
    nix::mount::mount(Some("none"), &tmpfs, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
        .expect("tmpfs");
    let (upper, work) = (make("scratch/upper"), make("scratch/work"));
    let restrictions = Restrictions { no_dev: true, ..Restrictions::default() };
    let overlay =
        OverlayMount { lower, upper_and_work: Some((upper.clone(), work)), options: vec![], restrictions };
    let mounted = mount_overlay(&overlay, &target);
    if let Err(error) = &mounted {
        unmount(&tmpfs, UnmountOptions::default()).expect("unmounted");
        panic!("{error}: {:?}", std::error::Error::source(error));
    }
    assert!(mount::is_mount_point(&target).expect("parsed"));
    let seen = fs::read_dir(&target).expect("read").count();
    fs::write(target.join("new"), "y").expect("written");
    let kinds: Vec<_> =
        mounts().expect("parsed").into_iter().filter(|m| m.target == target).map(|m| m.kind).collect();
    let through = fs::read(upper.join("new"));
    unmount(&target, UnmountOptions::default()).expect("unmounted");
    unmount(&tmpfs, UnmountOptions::default()).expect("unmounted");
    assert_eq!(seen, 60);
    assert_eq!(kinds, [b"overlay".to_vec()]);
    assert_eq!(through.expect("in the upper"), b"y");
}

#[test]
fn a_refused_mount_says_why() {
    let room = tempfile::tempdir().expect("directory");
    let overlay = OverlayMount {
        lower: vec![room.path().join("missing")],
        upper_and_work: None,
        options: vec![],
        restrictions: Restrictions::default(),
    };
    let error = mount_overlay(&overlay, room.path()).expect_err("nothing is there");
    assert!(matches!(error, mount::MountError::Mount { kind: "overlay", .. }), "{error}");
}
