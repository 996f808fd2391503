//! Many opens at once: nothing is lost.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use sluice_trace::What;

use crate::rig::{Image, Stage, with_every_engine};

const FILES: usize = 500;
const ROUNDS: usize = 100;

fn fill(tree: &Path) {
    for file in 0..FILES {
        File::create(tree.join(file.to_string())).expect("made");
    }
}

/// That is a second at 50,000 opens per second in which nobody reads, whatever this machine's speed.
#[test]
fn fifty_thousand_opens_are_all_seen_though_nobody_reads_meanwhile() {
    let image = Image::new(fill);
    let stage = Stage::new(&image);
    let paths: Vec<_> = (0..FILES).map(|name| stage.path(&name.to_string())).collect();
    // Names are in memory after this: it is the probes that are tested.
    let inode = |path| fs::metadata(path).expect("is there").ino();
    let expected: HashMap<u64, usize> = paths.iter().map(|path| (inode(path), ROUNDS)).collect();
    assert_eq!(expected.len(), FILES);
    with_every_engine(|probes| {
        let lost_before = probes.losses().expect("read");
        let begin = Instant::now();
        for _ in 0..ROUNDS {
            // A file's first open is recorded: each watch begins anew.
            probes.watch(stage.device).expect("watched");
            paths.iter().for_each(|path| drop(File::open(path).expect("opens")));
        }
        let rate = (FILES * ROUNDS) as f64 / begin.elapsed().as_secs_f64();
        probes.unwatch(stage.device).expect("unwatched");
        let mut seen = HashMap::new();
        let keep = |event: sluice_probes::Event| {
            if let What::Open { inode } = event.record.what
                && event.device == stage.device
            {
                *seen.entry(inode).or_insert(0) += 1;
            }
        };
        probes.drain(keep).expect("drained");
        eprintln!("{rate:.0} opens per second, {} seen", seen.values().sum::<usize>());
        assert_eq!(probes.losses().expect("read"), lost_before);
        assert!(seen == expected, "not every open was seen: {seen:?}");
    });
}
