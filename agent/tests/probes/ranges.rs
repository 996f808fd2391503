//! What a start touches is recorded: fetched or in memory, by reading or by mapping.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use sluice_image::entry::EntryKind;
use sluice_image::index::LayerIndex;
use sluice_trace::{AccessKind, Capability, Header, Level, Record, TraceReader, What};

use crate::rig::{Node, wait_until};

const PAGE: u64 = 4096;
/// Reads two places of a large file and a small file.
const SCRIPT: &str = "for at in 70 150; do dd if=/data/large bs=64k skip=$at count=2 2>/dev/null; done | sha256sum; cat /data/changed";

/// A node whose daemon has its probes.
fn with_probes(config: &str) -> Node {
    let node = Node::indexed(config);
    start(&node);
    node
}

fn start(node: &Node) {
    node.ok(&["gc"]);
    wait_until("probes are loaded", || node.log().contains("probes are loaded"));
}

/// Records a start; its trace, and what was said.
fn record(node: &Node, command: &[&str]) -> (Header, Vec<Record>, String) {
    let output = node.run(&[&["trace", "record", &node.image()], command].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let path = PathBuf::from(said.trim().rsplit("trace: ").next().unwrap());
    let mut reader =
        TraceReader::new(File::open(&path).unwrap_or_else(|error| panic!("{said}: {error}"))).unwrap();
    let header = reader.header().clone();
    let records = reader.by_ref().collect::<Result<_, _>>().unwrap();
    assert_eq!(reader.footer().unwrap().lost_records, 0, "{said}");
    (header, records, said)
}

/// Pages of the image's files, by inode number, that records of some kinds cover.
fn pages(records: &[Record], kinds: &[AccessKind]) -> BTreeSet<(u64, u64)> {
    let mut all = BTreeSet::new();
    for record in records {
        if let What::Access { kind, inode, offset, len } = &record.what
            && kinds.contains(kind)
        {
            all.extend((offset / PAGE..(offset + len) / PAGE).map(|page| (*inode, page)));
        }
    }
    all
}

const ACCESSES: [AccessKind; 3] = [AccessKind::Read, AccessKind::Fault, AccessKind::Around];
const ALL: [AccessKind; 4] = [AccessKind::Read, AccessKind::Fault, AccessKind::Around, AccessKind::Fill];

/// Inode numbers as the kernel gives them for the image's own mount, by path.
fn inodes(node: &Node) -> HashMap<Vec<u8>, u64> {
    let dir = node.room("seen");
    node.ok(&["mount", &node.image(), dir.to_str().unwrap()]);
    let mut found = HashMap::new();
    for name in ["data/large", "data/changed", "bin/busybox", "etc/passwd", "etc/group"] {
        found.insert(name.as_bytes().to_vec(), fs::metadata(dir.join(name)).unwrap().ino());
    }
    found
}

/// Pages that the agent served, by inode number; padding between files is nobody's.
fn served(
    node: &Node,
    header: &Header,
    records: &[Record],
    inodes: &HashMap<Vec<u8>, u64>,
) -> BTreeSet<(u64, u64)> {
    let manifest = node.path("images/image/blobs/sha256").join(header.image.trim_start_matches("sha256:"));
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    let mut all = BTreeSet::new();
    for record in records {
        let What::Served { layer, offset, len, .. } = record.what else { continue };
        let digest = layers[layer as usize]["digest"].as_str().unwrap();
        let index = node.path("root/layers").join(digest.trim_start_matches("sha256:")).join("index");
        let index = LayerIndex::from_blob(fs::read(index).unwrap()).unwrap();
        for entry in index.entries().unwrap() {
            let entry = entry.unwrap();
            let EntryKind::File { size, store_offset } = entry.kind else { continue };
            let (from, to) = (offset.max(store_offset), (offset + len).min(store_offset + size));
            if from < to {
                let name = String::from_utf8_lossy(&entry.path).into_owned();
                let inode = inodes.get(&entry.path).unwrap_or_else(|| panic!("`{name}` was served"));
                let (from, to) = (from - store_offset, to - store_offset);
                all.extend((from / PAGE..to.div_ceil(PAGE)).map(|page| (*inode, page)));
            }
        }
    }
    all
}

/// A number that the daemon logged of its last recording.
fn reported(node: &Node, name: &str) -> u64 {
    let log = node.log();
    let line = log.lines().rfind(|line| line.contains("a start was recorded")).unwrap();
    let text = line.split(&format!("{name}: ")).nth(1).unwrap_or_else(|| panic!("{line}"));
    text.split(|digit: char| !digit.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn probes_see_all_that_the_agent_served_and_what_a_warm_start_touches() {
    let node = with_probes("[stream]\nfill = false\n");
    let (header, cold, said) = record(&node, &["sh", "-c", SCRIPT]);
    for capability in Capability::ALL {
        assert!(header.levels.of(capability) >= Some(Level::Tracepoint), "{:?}", header.levels);
    }
    let inodes = inodes(&node);
    let (by_agent, by_probes) = (served(&node, &header, &cold, &inodes), pages(&cold, &ALL));
    let missed: Vec<_> = by_agent.difference(&by_probes).collect();
    assert!(by_agent.len() > 60 && missed.is_empty(), "{said}{} served, missed: {missed:?}", by_agent.len());
    // Who waited waited for us, and no longer than it slept.
    let (blocked, for_us) = (reported(&node, "blocked_us"), reported(&node, "served_us"));
    assert!(0 < for_us && for_us <= blocked, "{blocked} µs blocked, {for_us} µs for us");
    assert!(cold.iter().any(|record| matches!(record.what, What::Blocked { .. })));

    // The mount of `inodes` keeps in memory what another start reads: then nothing is read any more, and all is still seen.
    node.shell(SCRIPT);
    let (_, warm, said) = record(&node, &["sh", "-c", SCRIPT]);
    assert!(said.contains("recorded 0 reads"), "{said}");
    let (cold, warm) = (pages(&cold, &ACCESSES), pages(&warm, &ACCESSES));
    let asked = |inode, from: u64, count: u64| (from..from + count).map(move |page| (inode, page));
    let large = inodes[b"data/large".as_slice()];
    let wanted: BTreeSet<_> = asked(large, 70 * 16, 32)
        .chain(asked(large, 150 * 16, 32))
        .chain(asked(inodes[b"data/changed".as_slice()], 0, 1))
        .collect();
    for (name, seen) in [("cold", &cold), ("warm", &warm)] {
        let missed: Vec<_> = wanted.difference(seen).collect();
        assert!(missed.is_empty(), "{name}: {missed:?}");
    }
    // The program was only mapped and executed, never read: without faults nothing of it is known.
    let busybox = inodes[b"bin/busybox".as_slice()];
    let mapped = |seen: &BTreeSet<(u64, u64)>| seen.iter().filter(|(inode, _)| *inode == busybox).count();
    assert!(mapped(&cold) > 16 && mapped(&warm) > 16, "{} and {} pages", mapped(&cold), mapped(&warm));
}

#[test]
fn programs_and_their_mapped_pages_are_seen_on_a_fully_local_image() {
    let node = with_probes("");
    node.ok(&["pull", &node.image()]);
    node.shell("cat /data/changed > /dev/null");
    let (header, records, said) = record(&node, &["sha256sum", "/data/large"]);
    assert!(said.contains("recorded 0 reads"), "{said}");
    let inodes = inodes(&node);
    let (busybox, large) = (inodes[b"bin/busybox".as_slice()], inodes[b"data/large".as_slice()]);
    let started: Vec<&[u8]> = records
        .iter()
        .filter_map(|record| match &record.what {
            What::Exec { inode, path } if *inode == busybox => Some(path.as_slice()),
            _ => None,
        })
        .collect();
    assert!(started.iter().any(|path| path.ends_with(b"sha256sum")), "{started:?}");
    assert!(records.iter().any(|one| matches!(one.what, What::Open { inode } if inode == large)));
    let mapped = pages(&records, &[AccessKind::Fault, AccessKind::Around]);
    assert!(mapped.iter().any(|(inode, _)| *inode == busybox), "the program's pages");
    let read = pages(&records, &[AccessKind::Read]);
    assert_eq!(
        read.iter().filter(|(inode, _)| *inode == large).count() as u64,
        crate::rig::LARGE as u64 / PAGE
    );
    assert!(header.levels.of(Capability::Fault).is_some());
    // Learned by content, under the paths of the image.
    let shown = node.ok(&["profile", "show", &node.image()]);
    assert!(shown.contains("  /data/large") && shown.contains("  /bin/busybox"), "{shown}");
}

#[test]
fn starts_of_one_image_at_the_same_time_are_told_apart() {
    let node = with_probes("[stream]\nfill = false\n");
    let image = node.image();
    let run = |script: &'static str| node.command(&["run", &image, "sh", "-c", script]).spawn().unwrap();
    let scripts = [
        "sleep 1; cat /data/many/one 2>/dev/null; cat /data/changed >/dev/null; sleep 1",
        "sleep 1; cat /data/linked >/dev/null; cat /data/large >/dev/null; sleep 1",
    ];
    for mut child in scripts.map(run) {
        assert!(child.wait().unwrap().success());
    }
    wait_until("both are learned", || node.ok(&["profile", "list"]).lines().count() == 2);
    let shown = node.ok(&["profile", "show", &node.image()]);
    let (mut with_large, mut all) = (0, 0);
    for profile in shown.split("sha256:").skip(1) {
        all += 1;
        let is_second = profile.contains("/data/linked");
        assert_eq!(profile.contains("  /data/large"), is_second, "{shown}");
        with_large += usize::from(is_second);
    }
    assert_eq!((with_large, all), (1, 2), "{shown}");
}

#[test]
fn without_probes_the_agents_own_log_serves() {
    let node = Node::indexed("[stream]\nfill = false\n[probes]\nenabled = false\n");
    let (header, records, said) = record(&node, &["cat", "/data/changed"]);
    assert!(said.contains("by agent's log"), "{said}");
    assert_eq!(header.levels.of(Capability::Read), Some(Level::Log));
    assert!(records.iter().any(|record| matches!(record.what, What::Served { .. })));
    let shown = node.ok(&["profile", "show", &node.image()]);
    assert!(shown.contains("  /data/changed") || shown.contains("  /data/linked"), "{shown}");
}
