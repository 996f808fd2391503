//! Every format is read by programs that are not ours: DuckDB, the classes that Perfetto and OpenTelemetry publish for theirs.

mod sample;

use std::path::{Path, PathBuf};
use std::process::Command;

use prost::Message;
use sluice_export::{Exported, Format, export, otlp};
use sluice_trace::{Summarizer, TraceReader};

/// Python with the readers in it.
fn python() -> PathBuf {
    let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../foreign-readers/bin/python");
    assert!(python.exists(), "{} is missing: `cargo xtask test` makes it", python.display());
    python
}

/// Has `reader.py` look at files; what it says of them.
fn read_by_others(dir: &Path) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/foreign/reader.py");
    let output = Command::new(python()).arg(script).arg(dir).output().expect("python starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn exported(format: Format, traces: &[Vec<u8>]) -> (Vec<u8>, Exported) {
    let mut out = Vec::new();
    let readers = traces.iter().map(|trace| TraceReader::new(trace.as_slice()));
    let exported = export(format, readers, &mut out).expect("exported");
    (out, exported)
}

/// Compares with what is checked in, so that no change of a format goes unseen.
#[track_caller]
fn golden(name: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("SLUICE_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        std::fs::write(&path, bytes).expect("written");
    }
    let expected = std::fs::read(&path).expect("read");
    assert!(bytes == expected, "{name} is not what it was");
}

const FORMATS: [(Format, &str); 5] = [
    (Format::Perfetto, "start.pftrace"),
    (Format::Chrome, "start.json"),
    (Format::Parquet, "start.parquet"),
    (Format::Jsonl, "start.jsonl"),
    (Format::Csv, "start.csv"),
];

#[test]
fn others_read_every_format() {
    let dir = tempfile::tempdir().expect("a directory");
    let traces = [sample::trace(0), sample::trace(60)];
    for (format, name) in FORMATS {
        let (bytes, exported) = exported(format, &traces);
        assert_eq!(exported, Exported { starts: 2, rows: 2 * sample::ROWS }, "{name}");
        golden(name, &bytes);
        std::fs::write(dir.path().join(name), bytes).expect("written");
    }
    let reader = TraceReader::new(traces[0].as_slice()).expect("a trace");
    let mut summarizer = Summarizer::new(reader.header());
    reader.for_each(|record| summarizer.push(&record.expect("a record")));
    let request = otlp::spans(&summarizer.finish()).encode_to_vec();
    golden("start.otlp", &request);
    std::fs::write(dir.path().join("start.otlp"), request).expect("written");
    let said = read_by_others(dir.path());
    for line in [
        "parquet: 30 rows, 2 starts, 2 reads of /usr/lib/libc.so from the registry, 30000000 ns",
        "csv: 30 rows, same as parquet",
        "jsonl: 30 rows, same as parquet",
        "chrome: 18 asynchronous slices, 2 slices of threads, 8 instants",
        "perfetto: 20 slices, no track with an overlap, counters sum to 3000000 bytes a second and more",
        "otlp: container start > first byte, profile, pull > index, mount, resolve; ready",
    ] {
        assert!(said.contains(line), "`{line}` is not said:\n{said}");
    }
}

#[test]
fn a_trace_that_was_cut_off_is_exported_as_far_as_it_is_whole() {
    let mut trace = sample::trace(0);
    trace.truncate(trace.len() - 10);
    for (format, name) in FORMATS {
        let mut out = Vec::new();
        let error = export(format, [TraceReader::new(trace.as_slice())], &mut out).expect_err("an error");
        assert!(
            std::error::Error::source(&error).expect("a cause").to_string().contains("cut off"),
            "{error}"
        );
        let (whole, _) = exported(format, &[sample::trace(0)]);
        assert!(out == whole, "{name}: the records were whole");
    }
}
