//! overlayfs on an image's mount: what programs do to files that lie in a lower layer.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::{TimeSpec, TimeValLike};

use crate::node::{Node, checked};
use crate::server;

/// Which answer is right.
type Answer = Result<(), Errno>;

/// An overlay on `lower`, writable in `room`.
pub(super) fn overlay_on(lower: &Path, room: &Path) -> Result<PathBuf> {
    let (upper, work, merged) = (room.join("upper"), room.join("work"), room.join("merged"));
    for dir in [&upper, &work, &merged] {
        fs::create_dir_all(dir)?;
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context("cannot mount the overlay")?;
    Ok(merged)
}

/// The file system that is mounted on `dir`.
fn kind_of(dir: &Path) -> Result<String> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = fields.rfind(|fields| fields.get(1).is_some_and(|one| Path::new(one) == dir));
    Ok(found.and_then(|fields| fields.get(2).map(|kind| (*kind).to_owned())).unwrap_or_default())
}

/// Every operation on a streamed image's files, all right on every kernel.
pub(super) fn overlay(broken: bool) -> Result<()> {
    let node = Node::new(Path::new("/var/tmp/overlay"), "[stream]\nfill = false\n", &[])?;
    let mounted = node.mount()?;
    ensure!(kind_of(&mounted)? == "erofs", "the image is not streamed: {}", kind_of(&mounted)?);
    let _server;
    let root = if broken {
        let lower = node.path("lower");
        _server = server::mount(&lower, true)?;
        overlay_on(&lower, &node.path("room"))?
    } else {
        overlay_on(&mounted, &node.path("room"))?
    };
    let data = if broken { root.clone() } else { root.join("data") };
    let mut wrong = links(&data);
    if !broken {
        wrong.extend(names(&data));
        for (what, done) in
            [("contents", contents(&data)), ("attributes", attributes(&data)), ("programs", programs(&root))]
        {
            wrong.extend(done.err().map(|error| format!("{what}: {error:#}")));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The same renames on a FUSE lower: they show whether this kernel has the fault that the arrangement keeps away.
pub(super) fn control(broken: bool) -> Result<()> {
    let room = Path::new("/var/tmp/control");
    let lower = room.join("lower");
    let faulty = fs::read_to_string("/proc/cmdline")?.contains("kernel-tests.fault");
    // Broken: where links must move, a server that cannot say where they lead; where they must not, no FUSE at all.
    let _server;
    if faulty && broken {
        fs::create_dir_all(&lower)?;
        symlink("target", lower.join("link"))?;
    } else {
        _server = server::mount(&lower, broken)?;
    }
    let merged = overlay_on(&lower, room)?;
    let moved = fs::rename(merged.join("link"), merged.join("renamed"));
    let errno = moved.err().and_then(|error| error.raw_os_error()).unwrap_or(0);
    let expected = if faulty { Errno::ENXIO as i32 } else { 0 };
    println!("rename of a symbolic link in a FUSE lower: errno {errno}");
    ensure!(errno == expected, "errno {errno}, and not {expected}");
    Ok(())
}

fn compare(what: &str, found: Answer, right: Answer) -> Option<String> {
    (found != right).then(|| format!("{what}: {found:?}, and not {right:?}"))
}

fn errno(result: std::io::Result<()>) -> Answer {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
}

/// The rename family, and its relatives, on symbolic links.
pub(super) fn links(data: &Path) -> Vec<String> {
    let at = |name: &str| data.join(name);
    let rename2 = |from: &str, to: &str, flags| renameat2(AT_FDCWD, &at(from), AT_FDCWD, &at(to), flags);
    let now = TimeSpec::seconds(1_600_000_000);
    let exchange = || -> Answer {
        errno(symlink("other", at("other")))?;
        rename2("link3", "other", RenameFlags::RENAME_EXCHANGE)
    };
    let mv = Command::new("mv").arg(at("link7")).arg(at("link7-moved")).output();
    let mv = mv.map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
    let mut wrong: Vec<String> = [
        ("rename", errno(fs::rename(at("link"), at("link-moved"))), Ok(())),
        ("renameat2", rename2("link1", "link1-moved", RenameFlags::empty()), Ok(())),
        ("NOREPLACE", rename2("link2", "link2-moved", RenameFlags::RENAME_NOREPLACE), Ok(())),
        ("EXCHANGE", exchange(), Ok(())),
        // overlayfs keeps whiteouts for itself.
        ("WHITEOUT", rename2("link4", "link4-moved", RenameFlags::RENAME_WHITEOUT), Err(Errno::EINVAL)),
        ("link", errno(fs::hard_link(at("link4"), at("link4-hard"))), Ok(())),
        ("lchown", errno(lchown(at("link5"), Some(1), Some(1))), Ok(())),
        ("utimensat", utimensat(AT_FDCWD, &at("link6"), &now, &now, UtimensatFlags::NoFollowSymlink), Ok(())),
        ("unlink", errno(fs::remove_file(at("link8"))), Ok(())),
    ]
    .into_iter()
    .filter_map(|(what, found, right)| compare(&format!("{what} of a symbolic link"), found, right))
    .collect();
    if !matches!(&mv, Ok(said) if said.is_empty()) {
        wrong.push(format!("mv of a symbolic link: {mv:?}"));
    }
    for moved in ["link-moved", "link1-moved", "link2-moved", "other", "link4-hard", "link7-moved"] {
        match fs::read_link(at(moved)) {
            Ok(target) if target == Path::new("target") => {}
            other => wrong.push(format!("{moved} leads to {other:?}")),
        }
    }
    if fs::symlink_metadata(at("link8")).is_ok() {
        wrong.push("a removed link is there".to_owned());
    }
    wrong
}

/// Files, directories and pipes: renames and removals.
pub(super) fn names(data: &Path) -> Vec<String> {
    let at = |name: &str| data.join(name);
    let mut wrong: Vec<String> = [
        ("rename of a file", errno(fs::rename(at("file0"), at("file0-moved"))), Ok(())),
        // Without redirect_dir: programs copy then, as over any file system's border.
        ("rename of a directory", errno(fs::rename(at("dir"), at("dir-moved"))), Err(Errno::EXDEV)),
        ("rename of a pipe", errno(fs::rename(at("fifo"), at("fifo-moved"))), Ok(())),
        ("removal of a file", errno(fs::remove_file(at("file1"))), Ok(())),
        ("removal of a directory", errno(fs::remove_dir_all(at("gone"))), Ok(())),
        ("its name again", errno(fs::create_dir(at("gone"))), Ok(())),
    ]
    .into_iter()
    .filter_map(|(what, found, right)| compare(what, found, right))
    .collect();
    let pipe = fs::symlink_metadata(at("fifo-moved")).is_ok_and(|meta| meta.file_type().is_fifo());
    let empty = fs::read_dir(at("gone")).is_ok_and(|mut entries| entries.next().is_none());
    for (what, right) in [
        ("a moved pipe is a pipe", pipe),
        ("a moved file is at its old place no more", !at("file0").exists()),
        ("a removed file is gone", !at("file1").exists()),
        ("a directory made where one was is empty", empty),
    ] {
        if !right {
            wrong.push(format!("not so: {what}"));
        }
    }
    wrong
}

/// Copy-up keeps what was there, whole and in part.
fn contents(data: &Path) -> Result<()> {
    let before = fs::read(data.join("file2"))?;
    OpenOptions::new().append(true).open(data.join("file2"))?.write_all(b"more")?;
    let after = fs::read(data.join("file2"))?;
    ensure!(after == [&before[..], b"more"].concat(), "appended: {} bytes of {}", after.len(), before.len());
    // Open for reading before, and written through another descriptor: the reader sees it, as on any file system.
    let mut reader = File::open(data.join("file3"))?;
    OpenOptions::new().write(true).open(data.join("file3"))?.write_all(b"changed")?;
    let mut seen = [0; 7];
    reader.read_exact(&mut seen)?;
    ensure!(&seen == b"changed", "a reader does not see what was written: {seen:?}");
    // One name of two: overlayfs breaks hard links without an index.
    let links = fs::metadata(data.join("hard1"))?.nlink();
    ensure!(links == 2, "{links} names of a hard link");
    let script = "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\n\
                  b=bytes(m)\nm[0:4]=b'MAPS'\nm.flush()\nassert open(sys.argv[1],'rb').read()==b'MAPS'+b[4:]\n";
    checked(Command::new("python3").arg("-c").arg(script).arg(data.join("file4"))).context("mmap")?;
    Ok(())
}

fn attributes(data: &Path) -> Result<()> {
    let get =
        |path: &Path| checked(Command::new("getfattr").args(["--only-values", "-n", "user.test"]).arg(path));
    let path = data.join("attributed");
    ensure!(get(&path)? == "value", "the attribute of the image: {}", get(&path)?);
    checked(Command::new("setfattr").args(["-n", "user.more", "-v", "1"]).arg(&path))?;
    ensure!(get(&path)? == "value", "the attribute after copy-up");
    let before = fs::metadata(data.join("file5"))?;
    lchown(data.join("file5"), Some(7), Some(8))?;
    let after = fs::metadata(data.join("file5"))?;
    ensure!((after.uid(), after.gid(), after.size()) == (7, 8, before.size()), "chown");
    ensure!(after.mtime() == before.mtime(), "a copy-up changed the time");
    Ok(())
}

/// Programs run from the lower layer, and after they were copied up.
fn programs(root: &Path) -> Result<()> {
    let program = root.join("bin/busybox");
    let say = || checked(Command::new(&program).args(["echo", "hello"]));
    ensure!(say()? == "hello\n", "a program of the image");
    lchown(&program, Some(0), Some(1))?;
    ensure!(say()? == "hello\n", "a program that was copied up");
    let running = Command::new(&program).args(["sleep", "5"]).spawn();
    let mut running = running.context("a program in use")?;
    fs::rename(&program, root.join("bin/moved")).context("a program in use is renamed")?;
    running.kill()?;
    running.wait()?;
    Ok(())
}
