//! Many opens at once: nothing is lost.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use sluice_probes::Losses;
use sluice_trace::What;

use crate::rig::{Stage, with_every_engine};

const DIRECTORIES: usize = 100;
const FILES: usize = 500;
fn fill(tree: &Path) {
    for directory in 0..DIRECTORIES {
        let directory = tree.join(directory.to_string());
        fs::create_dir(&directory).expect("made");
        for file in 0..FILES {
            File::create(directory.join(file.to_string())).expect("made");
        }
    }
}

/// That is a second at 50,000 opens per second in which nobody reads, whatever this machine's speed.
#[test]
fn fifty_thousand_opens_are_all_seen_though_nobody_reads_meanwhile() {
    let stage = Stage::new(fill);
    let paths: Vec<_> = (0..DIRECTORIES)
        .flat_map(|directory| (0..FILES).map(move |file| format!("{directory}/{file}")))
        .map(|name| stage.path(&name))
        .collect();
    // Names are in memory after this: it is the probes that are tested.
    let inodes: HashSet<u64> = paths.iter().map(|path| fs::metadata(path).expect("is there").ino()).collect();
    assert_eq!(inodes.len(), DIRECTORIES * FILES);
    with_every_engine(|probes| {
        probes.watch(stage.device).expect("watched");
        let begin = Instant::now();
        paths.iter().for_each(|path| drop(File::open(path).expect("opens")));
        let rate = paths.len() as f64 / begin.elapsed().as_secs_f64();
        let mut seen = HashSet::new();
        let keep = |event: sluice_probes::Event| {
            if let What::Open { inode } = event.record.what
                && event.device == stage.device
            {
                seen.insert(inode);
            }
        };
        probes.drain(keep).expect("drained");
        eprintln!("{rate:.0} opens per second, {} of {} files seen", seen.len(), inodes.len());
        assert_eq!(probes.losses().expect("read"), Losses::default());
        assert!(seen == inodes, "{} of {} files were seen", seen.len(), inodes.len());
    });
}
