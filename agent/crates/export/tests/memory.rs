//! An export's memory does not grow with the trace. `examples/large.rs` shows it for ten million records.

use std::io::Write;

use sluice_export::{Format, export};
use sluice_trace::{Footer, Header, Origin, Process, Record, TraceReader, TraceWriter, What};

/// Bytes are counted and gone.
#[derive(Default)]
struct Nowhere(u64);

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn trace(records: u64) -> std::fs::File {
    let file = tempfile::tempfile().expect("a file");
    let mut writer = TraceWriter::new(std::io::BufWriter::new(&file), &Header::default()).expect("written");
    for number in 0..records {
        let offset = number % 5_000 * 8192;
        let what = if number < 5_000 {
            What::File {
                inode: number + 1,
                layer: 0,
                offset,
                size: 8000,
                path: format!("lib/{number}").into_bytes(),
            }
        } else {
            What::Served { layer: 0, offset, len: 4096, service_ns: 900_000, from: Origin::Registry }
        };
        writer.push(&Record { time_ns: number * 1000, process: Process::default(), what }).expect("written");
    }
    writer.finish(Footer::default()).expect("written");
    file
}

fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn memory_does_not_grow_with_the_trace() {
    use std::io::Seek;
    let mut file = trace(200_000);
    for format in [Format::Perfetto, Format::Chrome, Format::Parquet, Format::Jsonl, Format::Csv] {
        file.rewind().expect("a file");
        let mut out = Nowhere::default();
        let reader = TraceReader::new(std::io::BufReader::new(&file));
        let exported = export(format, [reader], &mut out).expect("exported");
        assert_eq!(exported.rows, 195_000);
        assert!(out.0 > 100_000, "{format:?}");
        // All rows at once would be more than 100 bytes each several times over.
        assert!(peak_bytes() < 60 << 20, "{format:?}: {} bytes", peak_bytes());
    }
}
