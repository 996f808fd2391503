//! Trace files: what is written is read, what is damaged is refused, what was cut off gives what is whole.

use proptest::prelude::*;
use sluice_trace::{
    AccessKind, Call, Capability, FailedCall, FetchLane, Footer, Header, Level, Levels, Origin, Phase,
    Process, Record, TraceError, TraceReader, TraceWriter, TracedLayer, What,
};

fn header() -> Header {
    let reached = [(Capability::Read, Level::Tracepoint), (Capability::Fault, Level::Fexit)].into();
    let refused = [(Capability::Blocked, "no tracepoint".to_owned())].into();
    Header {
        image: "sha256:1234".to_owned(),
        entry: "python# app.py".to_owned(),
        kernel: "6.1.0".to_owned(),
        machine: "x86_64".to_owned(),
        began_at: 1_700_000_000,
        began_ns: 5_000_000_000,
        levels: Levels { reached, refused },
        reference: "registry.example/app:1".to_owned(),
        layers: vec![TracedLayer { digest: "sha256:abcd".to_owned(), bytes: 8192 }],
        container: "process 77".to_owned(),
        agent: "0.1.0".to_owned(),
    }
}

fn process(number: u32) -> Process {
    let comm = format!("worker-{number}");
    Process { tgid: number, pid: number + 1, mnt_ns: 4_026_531_840, cgroup: 99, comm }
}

fn write(records: &[Record]) -> Vec<u8> {
    let mut writer = TraceWriter::new(Vec::new(), &header()).expect("written");
    records.iter().for_each(|record| writer.push(record).expect("written"));
    writer.finish(Footer { lost_records: 3, ..Footer::default() }).expect("written")
}

fn read(bytes: &[u8]) -> Result<Vec<Record>, TraceError> {
    TraceReader::new(bytes)?.collect()
}

fn failed_call() -> impl Strategy<Value = What> {
    let numbers = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>());
    let facts = (any::<bool>(), any::<Option<u64>>(), any::<Option<u16>>());
    let paths =
        (proptest::collection::vec(any::<u8>(), 0..300), proptest::collection::vec(any::<u8>(), 0..9));
    (0..Call::ALL.len(), numbers, facts, paths).prop_map(|(call, numbers, facts, paths)| {
        let (errno, flags, dev, magic) = numbers;
        let (whole_path, inode, mode) = facts;
        let (path, new_path) = paths;
        let call = Call::ALL[call];
        What::Failed(FailedCall { call, errno, flags, path, whole_path, new_path, dev, magic, inode, mode })
    })
}

fn any_what() -> impl Strategy<Value = What> {
    let kinds = [AccessKind::Read, AccessKind::Fault, AccessKind::Around, AccessKind::Fill];
    prop_oneof![
        any::<u64>().prop_map(|inode| What::Open { inode }),
        (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(inode, path)| What::Exec { inode, path }),
        (0..4_usize, any::<[u64; 3]>()).prop_map(move |(kind, [inode, offset, len])| What::Access {
            kind: kinds[kind],
            inode,
            offset,
            len
        }),
        any::<[u64; 3]>().prop_map(|[inode, offset, blocked_ns]| What::Blocked { inode, offset, blocked_ns }),
        (any::<u32>(), any::<[u64; 3]>(), 0..Origin::ALL.len()).prop_map(
            |(layer, [offset, len, service_ns], from)| {
                let from = Origin::ALL[from];
                What::Served { layer, offset, len, service_ns, from }
            }
        ),
        failed_call(),
        Just(What::Ready),
        (0..Phase::ALL.len(), any::<u64>())
            .prop_map(|(phase, took_ns)| What::Phase { phase: Phase::ALL[phase], took_ns }),
        (0..FetchLane::ALL.len(), any::<Option<u32>>(), any::<[u64; 4]>(), any::<bool>()).prop_map(
            |(lane, layer, [offset, len, first_byte_ns, took_ns], whole)| {
                let lane = FetchLane::ALL[lane];
                What::Fetch { lane, layer, offset, len, first_byte_ns, took_ns, whole }
            }
        ),
        (0..FetchLane::ALL.len(), any::<u32>(), any::<[u64; 2]>()).prop_map(
            |(lane, layer, [offset, len])| {
                What::Brought { lane: FetchLane::ALL[lane], layer, offset, len }
            }
        ),
        (any::<u32>(), any::<[u64; 3]>(), proptest::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(layer, [inode, offset, size], path)| What::File { inode, layer, offset, size, path }),
    ]
}

fn any_record() -> impl Strategy<Value = Record> {
    let who = proptest::option::of(0..5_u32).prop_map(|one| one.map(process).unwrap_or_default());
    (any::<u64>(), who, any_what()).prop_map(|(time_ns, process, what)| Record { time_ns, process, what })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(records in proptest::collection::vec(any_record(), 0..200)) {
        let bytes = write(&records);
        let mut reader = TraceReader::new(bytes.as_slice()).expect("read");
        prop_assert_eq!(reader.header(), &header());
        prop_assert!(reader.footer().is_none());
        let found: Result<Vec<Record>, TraceError> = reader.by_ref().collect();
        prop_assert_eq!(found.expect("read"), records.clone());
        let footer = Footer { records: records.len() as u64, lost_records: 3, ..Footer::default() };
        prop_assert_eq!(reader.footer(), Some(&footer));
    }

    #[test]
    fn damage_comes_to_an_end(
        records in proptest::collection::vec(any_record(), 0..50),
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = write(&records);
        for (at, value) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        if let Ok(reader) = TraceReader::new(bytes.as_slice()) {
            prop_assert!(reader.take(10_000).count() <= records.len() + 1);
        }
    }
}

fn accesses(count: u64) -> Vec<Record> {
    let access = |number: u64| Record {
        time_ns: number * 1000,
        process: process((number % 7) as u32),
        what: What::Access { kind: AccessKind::Read, inode: number % 300, offset: number * 4096, len: 4096 },
    };
    (0..count).map(access).collect()
}

#[test]
fn a_trace_that_was_cut_off_gives_what_is_whole() {
    let records = accesses(100_000);
    let bytes = write(&records);
    assert!(bytes.len() < 10 * records.len(), "{} bytes for {} records", bytes.len(), records.len());
    let cut = &bytes[..bytes.len() / 2];
    let mut found = Vec::new();
    let mut last = None;
    for record in TraceReader::new(cut).expect("read") {
        match record {
            Ok(record) => found.push(record),
            Err(error) => last = Some(error),
        }
    }
    assert!(matches!(last, Some(TraceError::CutOff { .. })), "{last:?}");
    assert!(found.len() > 10_000 && records.starts_with(&found), "{} records", found.len());
}

#[test]
fn foreign_and_newer_bytes_are_refused() {
    let bytes = write(&accesses(1000));
    assert!(matches!(read(b"short"), Err(TraceError::NotATrace)));
    assert!(matches!(read(&[0; 100]), Err(TraceError::NotATrace)));
    let mut newer = bytes.clone();
    newer[8] = 4;
    assert!(matches!(read(&newer), Err(TraceError::Version(4))));
    newer[8] = 0;
    assert!(matches!(read(&newer), Err(TraceError::Version(0))));
    let mut long = bytes.clone();
    long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(read(&long), Err(TraceError::Damaged { .. })));
    // A flipped bit in a block is found by its checksum.
    let mut flipped = bytes.clone();
    let at = bytes.len() / 2;
    flipped[at] ^= 0x10;
    assert!(read(&flipped).is_err());
}

/// One record of each kind that version 1 has.
fn of_version_1(from: Origin) -> Vec<Record> {
    let call = FailedCall {
        call: Call::Renameat2,
        errno: 6,
        flags: 1,
        path: b"bin/sh".to_vec(),
        whole_path: true,
        new_path: b"sh.old".to_vec(),
        dev: 44,
        magic: 0x794C_7630,
        inode: Some(77),
        mode: Some(0o120_777),
    };
    let exec = What::Exec { inode: 4, path: b"/usr/bin/python3".to_vec() };
    let served = What::Served { layer: 2, offset: 1 << 40, len: 131_072, service_ns: 900_000, from };
    let blocked = What::Blocked { inode: 4, offset: 8192, blocked_ns: 2_000_000 };
    out_of_order([What::Open { inode: 4 }, exec, blocked, What::Failed(call), served, What::Ready])
}

/// Records of several processors are not in strict order.
fn out_of_order(whats: impl IntoIterator<Item = What>) -> Vec<Record> {
    let mut records = accesses(3);
    for (number, what) in whats.into_iter().enumerate() {
        records.push(Record { time_ns: 2000 - number as u64, process: process(number as u32), what });
    }
    records
}

#[test]
fn the_golden_trace_is_read() {
    let fetch = What::Fetch {
        lane: FetchLane::Demand,
        layer: Some(0),
        offset: 77,
        len: 1 << 21,
        first_byte_ns: 2_000_000,
        took_ns: 19_000_000,
        whole: true,
    };
    let pack = What::Fetch {
        lane: FetchLane::StartPack,
        layer: None,
        offset: 0,
        len: 500,
        first_byte_ns: 1,
        took_ns: 2,
        whole: false,
    };
    let mut expected = of_version_1(Origin::StartPack);
    expected.extend(out_of_order([
        What::Phase { phase: Phase::Mount, took_ns: 24_000_000 },
        What::File { inode: 4, layer: 0, offset: 4096, size: 5000, path: b"usr/bin/python3".to_vec() },
        fetch,
        pack,
        What::Brought { lane: FetchLane::Prefetch, layer: 0, offset: 4096, len: 262_144 },
    ]));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/trace-v2.bin");
    if std::env::var_os("SLUICE_WRITE_GOLDEN").is_some() {
        std::fs::write(path, write(&expected)).expect("written");
    }
    let bytes = std::fs::read(path).expect("read");
    assert_eq!(TraceReader::new(bytes.as_slice()).expect("read").header(), &header());
    assert_eq!(read(&bytes).expect("read"), expected);
}

#[test]
fn a_trace_of_the_first_version_is_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/trace-v1.bin");
    let bytes = std::fs::read(path).expect("read");
    let expected = Header {
        reference: String::new(),
        layers: Vec::new(),
        container: String::new(),
        agent: String::new(),
        ..header()
    };
    assert_eq!(TraceReader::new(bytes.as_slice()).expect("read").header(), &expected);
    assert_eq!(read(&bytes).expect("read"), of_version_1(Origin::Unknown));
}
