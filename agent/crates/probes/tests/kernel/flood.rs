//! Many opens at once: nothing is lost.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sluice_probes::Losses;
use sluice_trace::What;

use crate::rig::{Stage, with_every_engine};

const DIRECTORIES: usize = 100;
const FILES: usize = 500;
/// Rounds until the machine, which may be busy, has once been fast enough.
const ROUNDS: usize = 20;
/// Opens per second that must be seen without loss.
const RATE: f64 = 50_000.0;

fn fill(tree: &Path) {
    for directory in 0..DIRECTORIES {
        let directory = tree.join(directory.to_string());
        fs::create_dir(&directory).expect("made");
        for file in 0..FILES {
            File::create(directory.join(file.to_string())).expect("made");
        }
    }
}

#[test]
fn fifty_thousand_opens_a_second_are_all_seen() {
    let stage = Stage::new(fill);
    let paths: Vec<_> = (0..DIRECTORIES)
        .flat_map(|directory| (0..FILES).map(move |file| format!("{directory}/{file}")))
        .map(|name| stage.path(&name))
        .collect();
    let open_all = || paths.iter().for_each(|path| drop(File::open(path).expect("opens")));
    // Names are in memory after this: it is the probes that are tested.
    let mut inodes = HashSet::new();
    for path in &paths {
        inodes.insert(fs::metadata(path).expect("is there").ino());
    }
    with_every_engine(|probes| {
        let mut best = 0.0_f64;
        for round in 0..ROUNDS {
            if round > 1 && best > RATE {
                break;
            }
            probes.watch(stage.device).expect("watched");
            let done = AtomicBool::new(false);
            let mut seen = HashSet::new();
            let mut keep = |event: sluice_probes::Event| {
                if let What::Open { inode } = event.record.what
                    && event.device == stage.device
                {
                    seen.insert(inode);
                }
            };
            let took = std::thread::scope(|scope| {
                let opener = scope.spawn(|| {
                    let begin = Instant::now();
                    open_all();
                    done.store(true, Ordering::Release);
                    begin.elapsed()
                });
                while !done.load(Ordering::Acquire) {
                    probes.wait(Duration::from_millis(50)).expect("waited");
                    probes.drain(&mut keep).expect("drained");
                }
                opener.join().expect("opened")
            });
            probes.drain(&mut keep).expect("drained");
            probes.unwatch(stage.device).expect("unwatched");
            let rate = paths.len() as f64 / took.as_secs_f64();
            eprintln!("{rate:.0} opens per second, {} of {} files seen", seen.len(), inodes.len());
            assert_eq!(probes.losses().expect("read"), Losses::default());
            assert!(seen.is_superset(&inodes), "{} of {} files were seen", seen.len(), inodes.len());
            best = best.max(rate);
        }
        assert!(best > RATE, "{best:.0} opens per second are too few to show anything");
    });
}
