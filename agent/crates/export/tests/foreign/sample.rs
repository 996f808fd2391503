//! A start with every kind of record in it.

use sluice_trace::{
    AccessKind, Call, Capability, FailedCall, FetchLane, Footer, Header, Level, Levels, Origin, Phase,
    Process, Record, TraceWriter, TracedLayer, What,
};

/// Rows that it has.
pub(crate) const ROWS: u64 = 15;

fn header(began_at: u64) -> Header {
    let reached = [(Capability::Read, Level::Fexit), (Capability::Fault, Level::Kprobe)].into();
    Header {
        image: format!("sha256:{}", "12".repeat(32)),
        entry: "python# app.py, \"quoted\"".to_owned(),
        kernel: "6.1.0".to_owned(),
        machine: "x86_64".to_owned(),
        began_at: 1_700_000_000 + began_at,
        began_ns: 1_000,
        levels: Levels { reached, ..Levels::default() },
        reference: "registry.example:5000/team/app:1.2".to_owned(),
        layers: vec![TracedLayer { digest: format!("sha256:{}", "ab".repeat(32)), bytes: 40_960 }],
        container: "process 77".to_owned(),
        agent: "0.1.0".to_owned(),
    }
}

const MS: u64 = 1_000_000;

fn fetch(lane: FetchLane, layer: Option<u32>, took_ns: u64) -> What {
    What::Fetch { lane, layer, offset: 100, len: 150_000, first_byte_ns: 2 * MS, took_ns, whole: true }
}

fn served(offset: u64, service_ns: u64, from: Origin) -> What {
    What::Served { layer: 0, offset, len: 4096, service_ns, from }
}

fn failure() -> What {
    What::Failed(FailedCall {
        call: Call::Renameat2,
        errno: 6,
        flags: 0,
        path: b"etc/link".to_vec(),
        whole_path: true,
        new_path: b"etc/other".to_vec(),
        dev: 44,
        magic: 0x794C_7630,
        inode: None,
        mode: Some(0o120_777),
    })
}

/// The trace's bytes; it began so many seconds after the first.
pub(crate) fn trace(began_at: u64) -> Vec<u8> {
    let nobody = Process::default();
    let python = Process { tgid: 1000, pid: 1001, mnt_ns: 5, cgroup: 9, comm: "python3".to_owned() };
    let file =
        |inode, offset, path: &[u8]| What::File { inode, layer: 0, offset, size: 9000, path: path.to_vec() };
    let records = [
        (0, &nobody, file(4, 0, b"usr/lib/libc.so")),
        (0, &nobody, file(5, 12_288, b"app, \"the\" app\n.py")),
        (0, &nobody, What::Phase { phase: Phase::Resolve, took_ns: 3 * MS }),
        (0, &nobody, What::Phase { phase: Phase::Pull, took_ns: 20 * MS }),
        (3 * MS, &nobody, What::Phase { phase: Phase::Profile, took_ns: 9 * MS }),
        (3 * MS, &nobody, What::Phase { phase: Phase::Index, took_ns: 7 * MS }),
        (10 * MS, &nobody, What::Phase { phase: Phase::Mount, took_ns: 10 * MS }),
        (20 * MS, &nobody, fetch(FetchLane::StartPack, None, 30 * MS)),
        (40 * MS, &nobody, What::Brought { lane: FetchLane::StartPack, layer: 0, offset: 12_288, len: 9000 }),
        (41 * MS, &nobody, served(0, 30 * MS, Origin::Registry)),
        (42 * MS, &nobody, served(12_288, MS, Origin::StartPack)),
        (43 * MS, &nobody, fetch(FetchLane::Demand, Some(0), 27 * MS)),
        (72 * MS, &python, What::Blocked { inode: 4, offset: 4096, blocked_ns: 31 * MS }),
        (73 * MS, &python, What::Exec { inode: 4, path: b"/lib/ld.so".to_vec() }),
        (74 * MS, &python, What::Access { kind: AccessKind::Fault, inode: 5, offset: 4096, len: 4096 }),
        (75 * MS, &python, failure()),
        (80 * MS, &nobody, What::Ready),
    ];
    let mut writer = TraceWriter::new(Vec::new(), &header(began_at)).expect("in memory");
    for (at, process, what) in records {
        let record = Record { time_ns: 1_000 + at, process: process.clone(), what };
        writer.push(&record).expect("in memory");
    }
    writer.finish(Footer::default()).expect("in memory")
}
