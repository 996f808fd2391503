//! What is recorded of a real EROFS image under a real overlay.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::rig::{Image, Stage, every_engine, recorded, recorded_until, run, touched, with_every_engine};
use crate::slow::{DELAY, SlowFile};
use sluice_probes::{Device, Event, Options, Probes};
use sluice_trace::AccessKind::{self, Around, Fault, Fill, Read as ReadCall};
use sluice_trace::{Capability, What};

const PAGE: u64 = 4096;
const MIB: usize = 1 << 20;

/// Bytes that no file system can leave out.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let words = (0..len.div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len).collect()
}

fn fill(tree: &Path) {
    let large = noise(MIB).repeat(8);
    fs::write(tree.join("read.bin"), &large).expect("written");
    fs::write(tree.join("mapped.bin"), &large).expect("written");
    fs::write(tree.join("short"), b"twelve bytes").expect("written");
    fs::copy("/bin/true", tree.join("program")).expect("copied");
    fs::write(tree.join("script"), format!("#!{}\n", "/bin/sh")).expect("written");
}

/// Reads `len` bytes at `offset` with one call.
fn read_at(path: &Path, offset: u64, len: usize) {
    let mut file = File::open(path).expect("opens");
    file.seek(SeekFrom::Start(offset)).expect("sought");
    let mut buffer = vec![0; len];
    let count = file.read(&mut buffer).expect("read");
    assert!(count > 0);
}

/// Touches one byte at each offset of a mapping; the process's number.
fn touch_mapping(path: &Path, offsets: &[u64]) -> u32 {
    let script = "import mmap,sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\n\
                  for o in sys.argv[2:]: m[int(o)]\n";
    let offsets = offsets.iter().map(u64::to_string);
    run(Command::new("python3").arg("-c").arg(script).arg(path).args(offsets))
}

/// Offsets that are far from each other: nothing that is read ahead of one reaches another.
const FAR: [u64; 3] = [0, 3 << 20, (7 << 20) + 4096];

/// Reads, maps and executes, and checks that all of it is recorded.
fn all_accesses_are_seen(probes: &mut Probes, stage: &Stage, kinds: [&[AccessKind]; 2]) {
    probes.watch(stage.device).expect("watched");
    for offset in FAR {
        read_at(&stage.path("read.bin"), offset, 10);
    }
    let mapper = touch_mapping(&stage.path("mapped.bin"), &FAR);
    let runner = run(&mut Command::new(stage.path("program")));
    let events = recorded(probes, stage.device);
    probes.unwatch(stage.device).expect("unwatched");

    let [reads, faults] = kinds;
    for offset in FAR {
        assert!(touched(&events, stage.inode("read.bin"), offset, reads), "read at {offset}: {events:#?}");
        assert!(touched(&events, stage.inode("mapped.bin"), offset, faults), "map at {offset}: {events:#?}");
    }
    let program = stage.inode("program");
    assert!(touched(&events, program, 0, reads), "the kernel reads a program's head: {events:#?}");
    let entry = entry_point(&stage.path("program"));
    assert!(touched(&events, program, entry, faults), "where it begins, {entry}: {events:#?}");
    let started = events.iter().find_map(|event| match &event.record.what {
        What::Exec { inode, path } if *inode == program => Some((event.record.process.tgid, path.clone())),
        _ => None,
    });
    let path = stage.path("program").into_os_string().into_encoded_bytes();
    assert_eq!(started, Some((runner, path[..path.len().min(255)].to_vec())));
    for (name, tgid) in [("read.bin", std::process::id()), ("mapped.bin", mapper)] {
        let opener = events.iter().find_map(|event| match event.record.what {
            What::Open { inode } if inode == stage.inode(name) => Some(event.record.process.tgid),
            _ => None,
        });
        assert_eq!(opener, Some(tgid), "{name} was opened");
    }
    assert!(events.iter().all(|event| event.device == stage.device || is_failure(&event.record.what)));
}

fn is_failure(what: &What) -> bool {
    matches!(what, What::Failed(_))
}

/// Where in its file a program's first instruction is.
fn entry_point(path: &Path) -> u64 {
    let elf = fs::read(path).expect("read");
    let word = |at: usize, len: usize| {
        elf[at..at + len].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (address, table, count) = (word(24, 8), word(32, 8) as usize, word(56, 2) as usize);
    let segments = (0..count).map(|number| table + number * 56).filter(|at| word(*at, 4) == 1);
    let mut found = segments.filter_map(|at| {
        let (offset, start, len) = (word(at + 8, 8), word(at + 16, 8), word(at + 32, 8));
        (start..start + len).contains(&address).then(|| address - start + offset)
    });
    found.next().expect("a program has an entry point")
}

#[test]
fn reads_mappings_and_programs_are_recorded_cold_and_warm() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        // Cold: every byte comes from the device. What brings it into memory is seen too.
        all_accesses_are_seen(probes, &stage, [&[ReadCall], &[Fault, Around]]);
        // Warm: nothing is read from the device any more, and all of it is seen again.
        all_accesses_are_seen(probes, &stage, [&[ReadCall], &[Fault, Around]]);
    });
}

#[test]
fn fills_are_seen_when_cold_only_and_contain_all_accesses() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        let inode = stage.inode("read.bin");
        let pass = |probes: &mut Probes| {
            probes.watch(stage.device).expect("watched");
            for offset in FAR {
                read_at(&stage.path("read.bin"), offset, 3 * PAGE as usize);
            }
            probes.unwatch(stage.device).expect("unwatched");
            recorded(probes, stage.device)
        };
        let cold = pass(probes);
        for offset in FAR.into_iter().flat_map(|offset| (0..3).map(move |page| offset + page * PAGE)) {
            assert!(touched(&cold, inode, offset, &[Fill]), "{offset}: {cold:#?}");
            assert!(touched(&cold, inode, offset, &[ReadCall]), "{offset}: {cold:#?}");
        }
        let warm = pass(probes);
        assert!(warm.iter().all(|event| !matches!(event.record.what, What::Access { kind: Fill, .. })));
        for offset in FAR {
            assert!(touched(&warm, inode, offset, &[ReadCall]), "{offset}: {warm:#?}");
        }
    });
}

#[test]
fn only_what_was_read_counts_as_read_and_only_once() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        probes.watch(stage.device).expect("watched");
        for _ in 0..3 {
            read_at(&stage.path("read.bin"), 5 * PAGE, 2 * PAGE as usize);
            // A buffer larger than the file does not make it longer.
            read_at(&stage.path("short"), 0, MIB);
        }
        probes.unwatch(stage.device).expect("unwatched");
        let events = recorded(probes, stage.device);
        let reads: Vec<_> = events
            .iter()
            .filter_map(|event| match event.record.what {
                What::Access { kind: ReadCall, inode, offset, len } => Some((inode, offset, len)),
                _ => None,
            })
            .collect();
        let expected = [(stage.inode("read.bin"), 5 * PAGE, 2 * PAGE), (stage.inode("short"), 0, PAGE)];
        assert_eq!(reads, expected);
    });
}

/// Reads `$1` twice, and then does the same in a mount namespace within, `$2` times.
const NESTED: &str = r#"
    cat "$1" "$1" > /dev/null
    if [ "$2" -gt 0 ]; then unshare -m sh -c "$0" "$0" "$1" $(($2 - 1)); fi
"#;

#[test]
fn what_one_mount_namespace_touched_is_new_to_the_next() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        probes.watch(stage.device).expect("watched");
        let mut reader = Command::new("unshare");
        run(reader.args(["-m", "sh", "-c", NESTED, NESTED]).arg(stage.path("short")).arg("2"));
        probes.unwatch(stage.device).expect("unwatched");
        let short = stage.inode("short");
        let events = recorded(probes, stage.device);
        let namespaces = |is: &dyn Fn(&What) -> bool| {
            let mut found: Vec<u32> = events
                .iter()
                .filter(|event| is(&event.record.what))
                .map(|event| event.record.process.mnt_ns)
                .collect();
            found.sort_unstable();
            found.dedup();
            found.len()
        };
        let reads =
            |what: &What| matches!(what, What::Access { kind: ReadCall, inode, .. } if *inode == short);
        assert_eq!(namespaces(&reads), 3, "{events:#?}");
        assert_eq!(
            events.iter().filter(|event| reads(&event.record.what)).count(),
            3,
            "each once: {events:#?}"
        );
        let opens = |what: &What| matches!(what, What::Open { inode } if *inode == short);
        assert_eq!(namespaces(&opens), 3, "{events:#?}");
    });
}

#[test]
fn waiting_for_the_device_is_measured() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        assert!(probes.levels().of(Capability::Blocked).is_some());
        let slow = SlowFile::of(&image.blob());
        let stage = Stage::of(&slow.path);
        probes.watch(stage.device).expect("watched");
        let inode = stage.inode("read.bin");
        let begin = std::time::Instant::now();
        for number in 0..8 {
            read_at(&stage.path("read.bin"), number << 20, 10);
        }
        let took = begin.elapsed();
        let of = |event: &sluice_probes::Event| match event.record.what {
            What::Blocked { inode: of, blocked_ns, .. } if of == inode => Some(blocked_ns),
            _ => None,
        };
        let events =
            recorded_until(probes, stage.device, |events| events.iter().any(|one| of(one).is_some()));
        let waits: Vec<u64> = events.iter().filter_map(of).collect();
        let total: u64 = waits.iter().sum();
        assert!(u128::from(total) >= DELAY.as_nanos(), "cold reads wait: {events:#?}");
        assert!(
            u128::from(total) <= took.as_nanos(),
            "one thread cannot wait longer than it took: {took:?} {waits:?} {events:#?}"
        );
        // Warm reads do not wait.
        probes.watch(stage.device).expect("watched");
        for number in 0..8 {
            read_at(&stage.path("read.bin"), number << 20, 10);
        }
        probes.unwatch(stage.device).expect("unwatched");
        let events = recorded(probes, stage.device);
        assert_eq!(events.iter().filter_map(of).count(), 0, "{events:#?}");
    });
}

#[test]
fn after_a_pause_in_which_nothing_was_watched_all_is_seen_again() {
    let image = Image::new(fill);
    for mut probes in every_engine(&Options { linger: Duration::ZERO, ..Options::default() }) {
        for round in 0..3 {
            let slow = SlowFile::of(&image.blob());
            let stage = Stage::of(&slow.path);
            let inode = stage.inode("read.bin");
            probes.watch(stage.device).expect("watched");
            for offset in FAR {
                read_at(&stage.path("read.bin"), offset, 10);
            }
            let blocked =
                |event: &Event| matches!(event.record.what, What::Blocked { inode: of, .. } if of == inode);
            let events = recorded_until(&mut probes, stage.device, |events| events.iter().any(blocked));
            // The programs go when this is drained the next time.
            probes.unwatch(stage.device).expect("unwatched");
            let opened = |event: &Event| matches!(event.record.what, What::Open { inode: of } if of == inode);
            let levels = probes.levels().reached.clone();
            for (what, seen) in [
                ("open", events.iter().any(opened)),
                ("wait", events.iter().any(blocked)),
                ("read", touched(&events, inode, 0, &[ReadCall])),
                ("fill", touched(&events, inode, 0, &[Fill])),
            ] {
                assert!(seen, "no {what} in round {round} with {levels:?}: {events:#?}");
            }
            std::thread::sleep(Duration::from_millis(1));
            recorded(&mut probes, stage.device);
        }
    }
}

#[test]
fn other_file_systems_are_not_recorded() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let (stage, other) = (Stage::new(&image), Stage::new(&image));
        probes.watch(stage.device).expect("watched");
        read_at(&other.path("read.bin"), 0, 10);
        read_at(&image.tree().join("read.bin"), 0, 10);
        run(&mut Command::new(other.path("program")));
        touch_mapping(&other.path("mapped.bin"), &[0]);
        let events = recorded(probes, stage.device);
        let ours: Vec<_> = events.iter().filter(|event| !is_failure(&event.record.what)).collect();
        assert!(ours.is_empty(), "{ours:#?}");
        // The same file is recorded as soon as its file system is watched, and no more when it is not.
        probes.watch(other.device).expect("watched");
        read_at(&other.path("read.bin"), 0, 10);
        probes.unwatch(other.device).expect("unwatched");
        read_at(&other.path("read.bin"), 4 << 20, 10);
        probes.unwatch(stage.device).expect("unwatched");
        let events = recorded(probes, other.device);
        assert!(touched(&events, other.inode("read.bin"), 0, &[ReadCall]), "{events:#?}");
        assert!(!touched(&events, other.inode("read.bin"), 4 << 20, &[ReadCall, Fill]), "{events:#?}");
    });
}

#[test]
fn without_an_overlay_the_image_is_seen_as_well() {
    let image = Image::new(fill);
    with_every_engine(|probes| {
        let stage = Stage::new(&image);
        probes.watch(stage.device).expect("watched");
        read_at(&stage.image.join("read.bin"), 0, 10);
        run(&mut Command::new(stage.image.join("program")));
        probes.unwatch(stage.device).expect("unwatched");
        let events = recorded(probes, stage.device);
        let count = |test: &dyn Fn(&What) -> bool| events.iter().filter(|one| test(&one.record.what)).count();
        // Where it is a function's end that is seen, starting a program opens it.
        let inode = stage.inode("read.bin");
        let opened = |what: &What| matches!(what, What::Open { inode: of } if *of == inode);
        assert_eq!(count(&opened), 1, "{events:#?}");
        assert_eq!(count(&|what| matches!(what, What::Exec { .. })), 1, "{events:#?}");
        assert!(touched(&events, stage.inode("read.bin"), 0, &[ReadCall]));
    });
}

#[test]
fn device_numbers_are_the_kernels() {
    // makedev(259, 70_000) in the C library's 64-bit form.
    let stat = nix::sys::stat::makedev(259, 70_000);
    assert_eq!(Device::from_stat(stat), Device(259 << 20 | 70_000));
}
