//! How much memory an export takes: `cargo run --release -p sluice-export --example large [RECORDS]` (ten million if none are said)
//! makes a trace, exports it in every format, and prints time, bytes and the peak of resident memory.
#![allow(clippy::print_stdout, reason = "it speaks to a terminal")]

use std::io::{BufReader, BufWriter, Seek, Write};
use std::time::Instant;

use sluice_export::{Format, export};
use sluice_trace::{AccessKind, Footer, Header, Origin, Process, Record, TraceReader, TraceWriter, What};

const FILES: u64 = 20_000;

struct Counted(u64);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn what(number: u64) -> What {
    let file = number % FILES;
    let offset = file * 16_384;
    if number < FILES {
        let path = format!("usr/lib/python3/site-packages/module/{number}.py").into_bytes();
        return What::File { inode: number + 1, layer: 0, offset, size: 16_000, path };
    }
    match number % 3 {
        0 => What::Served { layer: 0, offset, len: 4096, service_ns: 900_000, from: Origin::Registry },
        1 => What::Blocked { inode: file + 1, offset: 0, blocked_ns: 800_000 },
        _ => What::Access { kind: AccessKind::Read, inode: file + 1, offset: 4096, len: 4096 },
    }
}

fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: ?").to_owned()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let records = std::env::args().nth(1).map_or(Ok(10_000_000), |text| text.parse())?;
    let mut file = tempfile::tempfile()?;
    let mut writer = TraceWriter::new(BufWriter::new(&file), &Header::default())?;
    for number in 0..records {
        let pid = 1000 + (number % 50) as u32;
        let process = Process { tgid: pid, pid, mnt_ns: 1, cgroup: 2, comm: format!("worker-{}", pid % 50) };
        writer.push(&Record { time_ns: number * 2_000, process, what: what(number) })?;
    }
    writer.finish(Footer::default())?;
    println!("{records} records, {} bytes of trace, {}", file.metadata()?.len(), peak());
    for format in [Format::Perfetto, Format::Chrome, Format::Parquet, Format::Jsonl, Format::Csv] {
        file.rewind()?;
        let (began, mut out) = (Instant::now(), Counted(0));
        let exported = export(format, [TraceReader::new(BufReader::new(&file))], &mut out)?;
        let seconds = began.elapsed().as_secs_f64();
        println!("{format:?}: {} rows, {} bytes, {seconds:.1} s, {}", exported.rows, out.0, peak());
    }
    Ok(())
}
