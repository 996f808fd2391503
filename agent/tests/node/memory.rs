//! The daemon's memory stays below its limit, whatever is asked of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use crate::rig::{LARGE, Node, assert_content, large, noise, wait_until};

const PIECE: usize = 256 << 10;
const READERS: usize = 48;

/// Many processes are blocked at once, and what comes cannot be written: there is no room, and all of it is in use.
#[test]
fn many_readers_and_a_full_store_leave_the_memory_limit_alone() {
    const LIMIT_MIB: u64 = 96;
    let config = "[probes]\nenabled = false\n[trust]\nmode = \"any\"\n[registry]\nconnections_per_host = 64\n[store]\nquota_mib = 16\n";
    let node = Node::new(&format!("memory_limit_mib = {LIMIT_MIB}\n{config}"));
    let content = noise(9, 72 << 20);
    let big = node.big(&content);
    let dir = node.room("mount");
    node.ok(&["mount", &big, &dir.to_string_lossy()]);
    // So slow that many requests are under way.
    node.faults(&json!({ "bytes_per_second": 16 << 20 }));
    let (next, pieces) = (AtomicUsize::new(0), content.len() / PIECE);
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                let file = File::open(dir.join("big")).unwrap();
                loop {
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    if turn >= pieces {
                        return;
                    }
                    // Far from each other, so that no request serves two.
                    let at = (turn * 37 % pieces) * PIECE;
                    let mut found = vec![0; PIECE];
                    file.read_exact_at(&mut found, at as u64).unwrap();
                    assert!(found == content[at..at + PIECE], "{at}");
                }
            });
        }
    });
    let status = node.status();
    assert_eq!(status["disk_full"], true, "{status}");
    let peak = status["resident_peak_bytes"].as_u64().unwrap();
    eprintln!("peak: {} MiB", peak >> 20);
    assert!(peak < LIMIT_MIB << 20, "the daemon took {} MiB", peak >> 20);
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Nobody works on the layer any more when there is room again.
#[test]
fn what_only_memory_has_goes_to_the_disk_when_there_is_room() {
    let node = Node::indexed("[stream]\nfill = false\n[store]\nquota_mib = 16\nmemory_budget_mib = 16\n");
    let big = node.big(&noise(9, 10 << 20));
    node.ok(&["pull", &big]);
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    assert_content(&dir.join("data/large"), &large());
    // The other image, which nobody uses, is evicted.
    wait_until("it is on the disk", || {
        let status = node.status();
        let here = status["images"].as_array().unwrap().len();
        here == 1 && status["disk_bytes"].as_u64().unwrap() > LARGE as u64
    });
    node.kill_daemon();
    node.ok(&["gc"]);
    node.bytes_sent();
    assert_content(&dir.join("data/large"), &large());
    assert_eq!(node.bytes_sent(), 0);
    node.ok(&["umount", &dir.to_string_lossy()]);
}
