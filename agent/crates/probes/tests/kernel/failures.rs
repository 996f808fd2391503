//! Calls that fail on symbolic links are reported.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::Path;
use std::process::Command;

use crate::rig::{Image, Stage, run, with_every_engine};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, renameat};
use nix::unistd::linkat;
use sluice_probes::{Device, Event, Probes};
use sluice_trace::{Call, Capability, FailedCall, Level, What};

const EEXIST: u32 = 17;
const EISDIR: u32 = 21;
const EROFS: u32 = 30;

fn fill(tree: &Path) {
    fs::create_dir_all(tree.join("usr/lib/target")).expect("made");
    fs::write(tree.join("usr/lib/file"), b"content").expect("written");
    symlink("target", tree.join("usr/lib/link")).expect("linked");
}

/// Failures on the stage's overlay or image.
fn failures(probes: &mut Probes, stage: &Stage) -> Vec<(Event, FailedCall)> {
    let overlay = Device::from_stat(fs::metadata(&stage.merged).expect("is there").dev());
    let mut found = Vec::new();
    let keep = |event: Event| {
        if let What::Failed(call) = event.record.what.clone()
            && [stage.device, overlay].contains(&event.device)
        {
            found.push((event, call));
        }
    };
    probes.drain(keep).expect("drained");
    found
}

/// Which calls a level can name: inside the kernel all renames are one.
fn is(call: Call, wanted: Call, level: Level) -> bool {
    match (level, wanted) {
        (Level::Tracepoint, wanted) => call == wanted,
        (_, Call::Rename | Call::Renameat | Call::Renameat2) => call == Call::AnyRename,
        (_, Call::Link | Call::Linkat) => call == Call::AnyLink,
        _ => call == Call::AnyAttributes,
    }
}

#[test]
fn a_failed_rename_of_a_symlink_is_reported_with_what_it_was() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let level = probes.levels().of(Capability::FailedCall).expect("seen");
        let stage = Stage::new(&image);
        let directory = File::open(stage.path("usr/lib")).expect("opens");
        let link = stage.path("usr/lib/link");
        let renamed = renameat(&directory, "link", &directory, "target");
        assert_eq!(renamed, Err(Errno::EISDIR), "a directory cannot be replaced by a symbolic link");
        let linked = linkat(&directory, "link", &directory, "file", AtFlags::empty());
        assert_eq!(linked, Err(Errno::EEXIST));

        let found = failures(probes, &stage);
        let (event, call) =
            found.iter().find(|(_, one)| one.errno == EISDIR).expect("the rename is reported");
        assert!(is(call.call, Call::Renameat, level), "{call:?}");
        assert_eq!(call.on_symlink(), Some(true), "{call:?}");
        assert_eq!(call.inode, Some(fs::symlink_metadata(&link).expect("is there").ino()), "{call:?}");
        assert_eq!((call.whole_path, call.magic), (true, 0x794C_7630), "{call:?}");
        assert_eq!((call.path.as_slice(), call.new_path.as_slice()), (&b"usr/lib/link"[..], &b"target"[..]));
        let process = &event.record.process;
        assert_eq!(process.tgid, std::process::id());
        assert_eq!(format!("mnt:[{}]", process.mnt_ns), namespace());
        assert!(event.record.time_ns > 0);
        // A link to a name that exists is refused before `vfs_link`, which only system-call tracepoints see.
        let of_link = found.iter().find(|(_, one)| one.errno == EEXIST);
        assert_eq!(of_link.is_some(), level == Level::Tracepoint, "{found:?}");
        if let Some((_, call)) = of_link {
            assert_eq!((call.call, call.on_symlink()), (Call::Linkat, Some(true)), "{call:?}");
        }
    });
}

fn namespace() -> String {
    fs::read_link("/proc/self/ns/mnt").expect("read").to_string_lossy().into_owned()
}

#[test]
fn the_caller_may_be_gone_and_its_path_relative() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        let relative = "rename('../lib/./link', 'target') and exit 1; exit 0";
        // As in a container: the overlay is the root.
        let absolute = "chroot('../..'); rename('/usr/lib/link', '/usr/lib/target') and exit 1; exit 0";
        for script in [relative, absolute] {
            let mut perl = Command::new("perl");
            let caller = run(perl.args(["-e", script]).current_dir(stage.path("usr/lib")));
            let found = failures(probes, &stage);
            let by_caller = found.iter().find(|(event, _)| event.record.process.tgid == caller);
            let (event, call) = by_caller.unwrap_or_else(|| panic!("{script}: {found:#?}"));
            assert_eq!(call.path, b"usr/lib/link", "{call:?}");
            assert_eq!(call.on_symlink(), Some(true), "{call:?}");
            assert_eq!((call.errno, event.record.process.comm.as_str()), (EISDIR, "perl"));
        }
    });
}

#[test]
fn what_succeeds_or_is_elsewhere_is_not_reported() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        fs::rename(stage.path("usr/lib/link"), stage.path("usr/lib/moved")).expect("renamed");
        lchown(stage.path("usr/lib/moved"), Some(1), Some(1)).expect("changed");
        // Not on an overlay, nor on a watched file system.
        let outside = File::open(image.tree().join("usr/lib")).expect("opens");
        assert_eq!(renameat(&outside, "link", &outside, "target"), Err(Errno::EISDIR));
        let mut found = Vec::new();
        probes.drain(|event| found.push(event)).expect("drained");
        let overlay = Device::from_stat(fs::metadata(&stage.merged).expect("is there").dev());
        let disk = Device::from_stat(fs::metadata(image.tree()).expect("is there").dev());
        found.retain(|event| [overlay, disk, stage.device].contains(&event.device));
        assert!(found.is_empty(), "{found:#?}");
    });
}

#[test]
fn on_a_watched_read_only_image_the_errno_is_erofs() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        if probes.levels().of(Capability::FailedCall) != Some(Level::Tracepoint) {
            // The kernel refuses read-only mounts before the functions that other levels watch: nothing to be seen.
            return;
        }
        let stage = Stage::new(&image);
        probes.watch(stage.device).expect("watched");
        // A path is looked up where it begins: by the descriptor or the working directory.
        let script = "rename($ARGV[0], $ARGV[1]) and exit 1; exit 0";
        let mut perl = Command::new("perl");
        let caller = run(perl.args(["-e", script, "lib/link", "x"]).current_dir(stage.image.join("usr")));
        probes.unwatch(stage.device).expect("unwatched");
        let found = failures(probes, &stage);
        let by_caller = found.iter().find(|(event, _)| event.record.process.tgid == caller);
        let (event, call) = by_caller.expect("reported");
        assert_eq!((event.device, call.errno), (stage.device, EROFS));
        assert_eq!(
            (call.path.as_slice(), call.inode),
            (&b"usr/lib/link"[..], Some(stage.inode("usr/lib/link")))
        );
        assert_eq!(call.on_symlink(), Some(true));
    });
}
