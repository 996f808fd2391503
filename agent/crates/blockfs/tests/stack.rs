//! FUSE, loop devices and EROFS of the running kernel, one on the other. Needs root, as the agent does.

mod rig;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rig::{BLOCK, Mood, Room, attach_all, check, forget, mount_image, runtime, wait_until, ways};
use sluice_blockfs::{BlockFs, BlockSource, Choice, Device, ImageMount, Options, Way};

const MIB: u64 = 1 << 20;

fn two_layers() -> Room {
    Room::new(&[vec![6 * MIB + 5, 1, 4096, 4097], vec![300, 3 * MIB, 40_000]])
}

/// Four threads, each through all files, beginning at different ones.
fn read_in_parallel(room: &Room, root: &Path) {
    std::thread::scope(|scope| {
        for start in 0..4 {
            scope.spawn(move || {
                let (before, after) = room.samples.split_at(start);
                after.iter().chain(before).for_each(|sample| check(root, sample));
            });
        }
    });
}

#[test]
fn files_are_right_whether_bytes_wait_or_not() {
    ways().into_iter().for_each(files_are_right_whether_bytes_wait_or_not_by);
}

fn files_are_right_whether_bytes_wait_or_not_by(way: Way) {
    let (runtime, room) = (runtime(), two_layers());
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    for (number, mood) in [Mood::Local, Mood::Mixed, Mood::Pieces, Mood::OnDisk].into_iter().enumerate() {
        sources.iter().for_each(|source| source.set(mood));
        let image = mount_image(&room, attach_all(&blockfs, &sources), &format!("image{number}"));
        read_in_parallel(&room, image.dir());
        image.unmount().expect("unmounts");
    }
    assert!(sources.iter().all(|source| source.waited.load(Ordering::Relaxed) > 0));
    assert!(sources.iter().all(|source| source.hit.load(Ordering::Relaxed) > 0));
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// What a kernel without EROFS of several devices has all the same.
#[test]
fn bare_block_files_and_devices_are_right_and_handed_over() {
    ways().into_iter().for_each(bare_block_files_and_devices_are_right_and_handed_over_by);
}

fn bare_block_files_and_devices_are_right_and_handed_over_by(way: Way) {
    const SIZE: u64 = 6 * MIB;
    let (runtime, room) = (runtime(), Room::new(&[vec![SIZE]]));
    let (blockfs, source) = (room.blockfs(&runtime, way), &room.sources()[0]);
    let path = blockfs.add("layer0", Arc::clone(source) as Arc<dyn BlockSource>).expect("added").remove(0);
    let device = Device::attach(&path).expect("attaches");
    let check = |path: &Path| {
        forget(path);
        assert!(fs::read(path).expect("reads") == rig::expected(0, 0, SIZE as usize), "{}", path.display());
    };
    for mood in [Mood::Local, Mood::Mixed, Mood::Pieces, Mood::OnDisk] {
        source.set(mood);
        check(&path);
        check(device.path());
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                check(device.path());
            }
        });
        let handed_over = device.hand_over(&room.layers[0]);
        done.store(true, Ordering::Relaxed);
        handed_over.expect("handed over");
    });
    source.set(Mood::Fail(5));
    blockfs.unmount().expect("unmounts");
    check(device.path());
    drop(device);
    room.assert_released();
}

#[test]
fn a_layer_is_handed_over_while_it_is_read() {
    ways().into_iter().for_each(a_layer_is_handed_over_while_it_is_read_by);
}

fn a_layer_is_handed_over_while_it_is_read_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&[vec![16 * MIB], vec![8 * MIB, 5]]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    sources.iter().for_each(|source| source.set(Mood::Mixed));
    let devices = attach_all(&blockfs, &sources);
    let image = mount_image(&room, devices.clone(), "image");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    room.check(image.dir());
                    room.forget(image.dir());
                }
            });
        }
        std::thread::sleep(Duration::from_millis(300));
        // A layer is handed over when it is complete: nobody waits for the network then.
        sources.iter().for_each(|source| source.set(Mood::OnDisk));
        std::thread::sleep(Duration::from_millis(50));
        for (device, local) in devices.iter().zip(&room.layers) {
            let start = Instant::now();
            device.hand_over(local).expect("handed over");
            eprintln!("{way}: handed over, in use, in {:?}", start.elapsed());
        }
        // From here on nothing may reach the agent.
        sources.iter().for_each(|source| source.set(Mood::Fail(5)));
        std::thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
    });
    let before: Vec<u64> = sources.iter().map(|source| source.waited.load(Ordering::Relaxed)).collect();
    room.forget(image.dir());
    room.check(image.dir());
    let after: Vec<u64> = sources.iter().map(|source| source.waited.load(Ordering::Relaxed)).collect();
    assert_eq!(before, after, "a read reached a source after the hand-over");
    blockfs.unmount().expect("unmounts");
    room.forget(image.dir());
    room.check(image.dir());
    image.unmount().expect("unmounts");
    drop(devices);
    room.assert_released();
}

#[test]
fn a_device_is_at_rest_when_nobody_waits_for_a_read() {
    let (runtime, room) = (runtime(), Room::new(&[vec![MIB]]));
    let (blockfs, sources) = (room.blockfs(&runtime, ways()[0]), room.sources());
    sources[0].set(Mood::Stuck);
    let devices = attach_all(&blockfs, &sources);
    let image = mount_image(&room, devices.clone(), "image");
    let file = image.dir().join(&room.samples[0].path);
    let (began, answered) = (Instant::now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| File::open(&file).expect("opens").read_exact(&mut [0]).expect("reads"));
        wait_until("a read waits", || sources[0].waited.load(Ordering::Relaxed) > 0);
        let waiter = scope.spawn(|| {
            devices[0].wait_for_rest();
            // Two seconds are its patience.
            assert!(
                answered.load(Ordering::Relaxed) || began.elapsed() > Duration::from_secs(2),
                "not waited for"
            );
        });
        std::thread::sleep(Duration::from_millis(100));
        answered.store(true, Ordering::Relaxed);
        sources[0].set(Mood::Local);
        waiter.join().expect("waits");
        reader.join().expect("reads");
    });
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    drop(devices);
    room.assert_released();
}

/// A hand-over waits for reads under way, and none of those must wait for an agent that may be dead by then.
#[test]
fn reads_of_a_whole_file_do_not_need_the_agent() {
    ways().into_iter().for_each(reads_of_a_whole_file_do_not_need_the_agent_by);
}

fn reads_of_a_whole_file_do_not_need_the_agent_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&[vec![MIB]]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    // For ever: the agent might as well be dead.
    sources[0].set(Mood::Stuck);
    let path =
        blockfs.add("layer0", Arc::clone(&sources[0]) as Arc<dyn BlockSource>).expect("added").remove(0);
    let device = Arc::new(Device::attach(&path).expect("attaches"));
    let image = mount_image(&room, vec![Arc::clone(&device)], "image");
    let (done, finished) = std::sync::mpsc::channel();
    let (root, sample) = (image.dir().to_path_buf(), room.samples[0].clone());
    std::thread::spawn(move || {
        check(&root, &sample);
        done.send(()).expect("the test waits");
    });
    wait_until("a read waits", || sources[0].waited.load(Ordering::Relaxed) > 0);
    blockfs.all_is_local(&path).expect("said");
    let answered = finished.recv_timeout(Duration::from_secs(60));
    // Not before: a failed test is to end.
    sources[0].set(Mood::Local);
    answered.expect("reads are answered from the local file");
    device.hand_over(&room.layers[0]).expect("handed over");
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    drop(device);
    room.assert_released();
}

#[test]
fn a_device_takes_no_file_of_another_size() {
    let room = Room::new(&[vec![8 * BLOCK], vec![9 * BLOCK]]);
    let device = Device::attach(&room.layers[0]).expect("attaches");
    assert!(device.hand_over(&room.layers[1]).is_err());
    let start = fs::read(device.path()).expect("reads");
    assert!(start == rig::expected(0, 0, start.len()), "the device lost its file");
}

#[test]
fn an_error_reaches_the_reader_and_does_not_stick() {
    ways().into_iter().for_each(an_error_reaches_the_reader_and_does_not_stick_by);
}

fn an_error_reaches_the_reader_and_does_not_stick_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&[vec![MIB]]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let path =
        blockfs.add("layer0", Arc::clone(&sources[0]) as Arc<dyn BlockSource>).expect("added").remove(0);
    let device = Arc::new(Device::attach(&path).expect("attaches"));
    let image = mount_image(&room, vec![device], "image");
    let file = image.dir().join(&room.samples[0].path);
    for mood in [Mood::Fail(5), Mood::Fail(110), Mood::TooMuch, Mood::Nothing] {
        sources[0].set(mood);
        let mut byte = [0];
        // A block device knows EIO only; the FUSE file itself gives the source's own errno, before Linux 7.
        let error = File::open(&file).expect("opens").read_exact(&mut byte).expect_err("no bytes");
        assert_eq!(error.raw_os_error(), Some(5), "{mood:?}");
        let error = File::open(&path).expect("opens").read_exact(&mut byte).expect_err("no bytes");
        let expected = if let Mood::Fail(errno) = mood { errno } else { 5 };
        assert!([Some(expected), Some(5)].contains(&error.raw_os_error()), "{mood:?}: {error}");
    }
    sources[0].set(Mood::Mixed);
    room.check(image.dir());
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// Reads that wait for the network must hold up neither those that need not, nor other layers.
#[test]
fn many_reads_that_wait_do_not_hold_up_others() {
    ways().into_iter().for_each(many_reads_that_wait_do_not_hold_up_others_by);
}

fn many_reads_that_wait_do_not_hold_up_others_by(way: Way) {
    const STUCK_LAYERS: usize = 5;
    const READERS: u64 = 100;
    let (runtime, mut sizes) = (runtime(), vec![vec![READERS * 16 * BLOCK]; STUCK_LAYERS]);
    sizes.push(vec![MIB]);
    let room = Room::new(&sizes);
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let (stuck, free) = sources.split_at(STUCK_LAYERS);
    stuck.iter().for_each(|source| source.set(Mood::Stuck));
    let devices = attach_all(&blockfs, &sources);
    let image = mount_image(&room, devices, "image");
    let waiting = || stuck.iter().map(|source| source.waited.load(Ordering::Relaxed)).sum::<u64>();
    std::thread::scope(|scope| {
        for sample in &room.samples[..STUCK_LAYERS] {
            for number in 0..READERS {
                let path = image.dir().join(&sample.path);
                scope.spawn(move || {
                    let (at, mut word) = (number * 16 * BLOCK, [0; 8]);
                    File::open(path).expect("opens").read_exact_at(&mut word, at).expect("reads");
                    assert_eq!(word, rig::word(sample.layer, sample.offset + at));
                });
            }
        }
        // Read-ahead may join neighbours, so there are fewer requests than readers.
        wait_until("reads wait", || waiting() > 60);
        let (done, finished) = std::sync::mpsc::channel();
        let (root, sample) = (image.dir().to_path_buf(), room.samples[STUCK_LAYERS].clone());
        std::thread::spawn(move || {
            check(&root, &sample);
            done.send(()).expect("the test waits");
        });
        let result = finished.recv_timeout(Duration::from_secs(10));
        eprintln!("{} reads waited", waiting());
        stuck.iter().for_each(|source| source.set(Mood::Local));
        result.expect("a local layer is read while others wait");
    });
    assert!(free[0].hit.load(Ordering::Relaxed) > 0);
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

#[test]
fn forty_layers_are_one_image() {
    ways().into_iter().for_each(forty_layers_are_one_image_by);
}

fn forty_layers_are_one_image_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&vec![vec![50_000, 10, 70_000]; 40]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let start = Instant::now();
    let devices = attach_all(&blockfs, &sources);
    let attached = start.elapsed();
    let image = mount_image(&room, devices, "image");
    eprintln!("40 layers: devices {attached:?}, with mount {:?}", start.elapsed());
    room.check(image.dir());
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

#[test]
fn images_share_a_layer_device_and_the_last_one_frees_it() {
    ways().into_iter().for_each(images_share_a_layer_device_and_the_last_one_frees_it_by);
}

fn images_share_a_layer_device_and_the_last_one_frees_it_by(way: Way) {
    let (runtime, room) = (runtime(), two_layers());
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let devices = attach_all(&blockfs, &sources);
    let first = mount_image(&room, devices.clone(), "first");
    let second = mount_image(&room, devices, "second");
    // Two for the layers, one for each image's metadata.
    assert_eq!(room.devices().len(), 4);
    room.check(first.dir());
    first.unmount().expect("unmounts");
    wait_until("the first image's metadata device is free", || room.devices().len() == 3);
    room.check(second.dir());
    second.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// A container's use of the image outlives its place in the tree.
#[test]
fn an_open_file_outlives_the_unmount() {
    ways().into_iter().for_each(an_open_file_outlives_the_unmount_by);
}

fn an_open_file_outlives_the_unmount_by(way: Way) {
    let (runtime, room) = (runtime(), two_layers());
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let image = mount_image(&room, attach_all(&blockfs, &sources), "image");
    let sample = &room.samples[0];
    let file = File::open(image.dir().join(&sample.path)).expect("opens");
    image.unmount().expect("unmounts");
    let mut bytes = vec![0; sample.size as usize];
    file.read_exact_at(&mut bytes, 0).expect("reads");
    assert!(bytes == rig::expected(sample.layer, sample.offset, bytes.len()));
    assert_eq!(room.devices().len(), 3);
    drop(file);
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

#[test]
fn a_mount_that_fails_leaves_nothing() {
    let room = Room::new(&[vec![BLOCK]]);
    let device = Arc::new(Device::attach(&room.layers[0]).expect("attaches"));
    // A layer is no metadata image.
    let failed = ImageMount::mount(&room.layers[0], vec![Arc::clone(&device)], &room.path("image"));
    failed.expect_err("mounted a layer as metadata");
    // The metadata names one device. (None at all would be taken: the kernel then expects the one-device form.)
    let two = vec![Arc::clone(&device), Arc::clone(&device)];
    ImageMount::mount(&room.metadata, two, &room.path("image")).expect_err("mounted with a layer too many");
    assert!(!room.path("image").exists(), "the mount point stays");
    drop(device);
    room.assert_released();
}

#[test]
fn a_choice_is_the_first_of_its_ways_that_can_be_had() {
    let (runtime, room) = (runtime(), two_layers());
    let mount = |name: &str, choice| {
        let dir = room.path(name);
        fs::create_dir(&dir).expect("creates");
        BlockFs::mount(&dir, Options { choice, ..Options::default() }, runtime.handle().clone())
    };
    let by = |way: &Way| mount(&way.to_string(), Choice::Only(*way)).map(BlockFs::unmount).is_ok();
    let had: Vec<_> = [Way::ZeroCopy, Way::IoUring, Way::Classic].into_iter().filter(by).collect();
    for (name, choice) in [("auto", Choice::Auto), ("fast", Choice::ZeroCopy)] {
        let first = had.iter().find(|way| choice != Choice::Auto || **way != Way::ZeroCopy);
        let blockfs = mount(name, choice).expect("mounts");
        let (way, reason) = blockfs.way();
        assert_eq!(Some(&way), first, "{reason}");
        blockfs.unmount().expect("unmounts");
    }
    room.assert_released();
}

#[test]
fn the_fuse_files_are_read_only_private_and_go_when_removed() {
    ways().into_iter().for_each(the_fuse_files_are_read_only_private_and_go_when_removed_by);
}

fn the_fuse_files_are_read_only_private_and_go_when_removed_by(way: Way) {
    let (runtime, room) = (runtime(), two_layers());
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let path =
        blockfs.add("layer0", Arc::clone(&sources[0]) as Arc<dyn BlockSource>).expect("added").remove(0);
    let metadata = fs::metadata(&path).expect("stat");
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (sources[0].size(), 0o400));
    let dir = path.parent().expect("a directory");
    let names: Vec<_> = fs::read_dir(dir).expect("reads").map(|entry| entry.expect("entry").path()).collect();
    assert_eq!(names, [path.as_path()]);
    assert_eq!(File::create(&path).expect_err("read-only").raw_os_error(), Some(30));
    assert_eq!(fs::read(dir.join("99-other")).expect_err("absent").raw_os_error(), Some(2));
    let open = File::open(&path).expect("opens");
    forget(&path);
    blockfs.remove(&path).expect("removed");
    let error = open.read_exact_at(&mut [0; 8], 0).expect_err("removed");
    assert!(matches!(error.raw_os_error(), Some(5 | 116)), "{error}");
    let error = File::open(&path).expect_err("removed");
    assert!(matches!(error.raw_os_error(), Some(2 | 116)), "{error}");
    let again =
        blockfs.add("layer0", Arc::clone(&sources[1]) as Arc<dyn BlockSource>).expect("added").remove(0);
    assert_ne!(path, again);
    assert!(fs::read(&again).expect("reads") == rig::expected(1, 0, sources[1].size() as usize));
    drop(open);
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// The read in front of a commit fails: the request is finished by hand, and its entry is not lost.
#[test]
fn a_local_file_that_became_short_is_an_error_and_nothing_more() {
    ways().into_iter().for_each(a_local_file_that_became_short_is_an_error_and_nothing_more_by);
}

fn a_local_file_that_became_short_is_an_error_and_nothing_more_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&[vec![MIB]]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    sources[0].set(Mood::OnDisk);
    let image = mount_image(&room, attach_all(&blockfs, &sources), "image");
    let local = File::options().write(true).open(&room.layers[0]).expect("opens");
    local.set_len(MIB / 2 + 100).expect("cut");
    let file = File::open(image.dir().join(&room.samples[0].path)).expect("opens");
    for round in 0..20 {
        let error = file.read_exact_at(&mut [0; 4096], MIB - 4096).expect_err("the bytes are gone");
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
        let at = round * 4096;
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, at).expect("reads");
        assert!(bytes == *room.samples[0].bytes(at, 4096));
    }
    local.set_len(0).expect("cut");
    fs::write(&room.layers[0], &*room.samples[0].content).expect("written");
    room.forget(image.dir());
    room.check(image.dir());
    drop(file);
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// Also where it begins between others.
#[test]
fn what_became_local_is_not_asked_for_once_that_is_told() {
    ways().into_iter().for_each(what_became_local_is_not_asked_for_once_that_is_told_by);
}

fn what_became_local_is_not_asked_for_once_that_is_told_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&[vec![MIB], vec![MIB]]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    let add = |number: usize| {
        let source = Arc::clone(&sources[number]) as Arc<dyn BlockSource>;
        blockfs.add("layer", source).expect("added").remove(0)
    };
    let path = add(0);
    sources[0].set(Mood::Mixed);
    blockfs.is_local(&path).expect("told");
    // The server takes one word after the other.
    add(1);
    sources[0].set(Mood::Nothing);
    let (file, local) = (File::open(&path).expect("opens"), fs::read(&room.layers[0]).expect("reads"));
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).expect("no more than is asked for");
    for (number, block) in local.chunks(BLOCK as usize).enumerate().take(100) {
        let mut bytes = vec![0; block.len()];
        let read = file.read_exact_at(&mut bytes, number as u64 * BLOCK);
        assert_eq!(read.is_ok(), number.is_multiple_of(3), "block {number}: {read:?}");
        assert!(read.is_err() || bytes == block, "block {number}");
    }
    assert_eq!(sources[0].hit.load(Ordering::Relaxed), 0, "the agent was asked");
    drop(file);
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// A disk that does not give what it had: the agent brings it another way, and no reader notices.
#[test]
fn what_the_local_file_does_not_give_comes_from_the_agent() {
    ways().into_iter().for_each(what_the_local_file_does_not_give_comes_from_the_agent_by);
}

fn what_the_local_file_does_not_give_comes_from_the_agent_by(way: Way) {
    let (runtime, room) = (runtime(), Room::new(&[vec![MIB]]));
    let (blockfs, sources) = (room.blockfs(&runtime, way), room.sources());
    sources[0].set(Mood::OnDisk);
    sources[0].again.set(fs::read(&room.layers[0]).expect("reads")).expect("once");
    let image = mount_image(&room, attach_all(&blockfs, &sources), "image");
    let before = sources[0].waited.load(Ordering::Relaxed);
    File::options().write(true).open(&room.layers[0]).and_then(|file| file.set_len(MIB / 2)).expect("cut");
    room.check(image.dir());
    assert!(sources[0].waited.load(Ordering::Relaxed) > before, "it was read from a file that has it not");
    fs::write(&room.layers[0], sources[0].again.get().expect("set")).expect("written");
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}
