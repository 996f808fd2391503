//! What is made of trace files: summaries, and every format of others. Each takes what the reader takes.

use sluice_export::{Format, export};
use sluice_regress::{Limits, Start, compare};
use sluice_trace::{Summarizer, Summary, TraceReader};

/// Records looked at per trace.
const RECORDS: usize = 20_000;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else { return };
    if mode & 0x80 != 0 {
        // As nodes keep them for comparisons.
        if let Ok(start) = serde_json::from_slice::<Start>(data) {
            let starts = vec![start; 5];
            assert!(compare(&starts, &starts, &Limits::default()).findings.is_empty());
        }
        return;
    }
    let Ok(reader) = TraceReader::new(data) else { return };
    let mut summarizer = Summarizer::new(reader.header());
    for record in reader.take(RECORDS).map_while(Result::ok) {
        summarizer.push(&record);
    }
    let summary = summarizer.finish();
    read(&summary);
    let formats = [Format::Perfetto, Format::Chrome, Format::Parquet, Format::Jsonl, Format::Csv];
    let format = formats[usize::from(*mode) % formats.len()];
    // A trace that was cut off is exported as far as it is whole.
    drop(export(format, [TraceReader::new(data)], &mut std::io::sink()));
}

fn read(summary: &Summary) {
    summary.bytes_before_ready();
    summary.round_trips();
    if let Some(accuracy) = summary.accuracy() {
        assert!((0.0..=1.0).contains(&accuracy), "{accuracy}");
    }
}
