//! Traces in the formats of others.
//!
//! One pass, a record at a time: what is held is the trace's table of files and what a format needs to know of things that are
//! still open, whatever the trace's length. [`export`] writes one or more starts to one output; OpenTelemetry's spans are made
//! from a [`Summary`](sluice_trace::Summary) ([`otlp`]), and sent by who has a network. docs/traces.md describes each schema.
#![warn(clippy::indexing_slicing)]

mod chrome;
mod csv;
mod jsonl;
pub mod otlp;
mod parquet;
mod perfetto;
mod row;
mod tracks;

use std::io::{self, Read, Write};

use sluice_trace::{TraceError, TraceReader};

use row::Rows;

/// A format that [`export`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Perfetto's own: protocol buffers of its `Trace`.
    Perfetto,
    /// JSON that Chrome, Perfetto and others read.
    Chrome,
    /// Columns, a row per record.
    Parquet,
    /// One JSON object a line, a line per record.
    Jsonl,
    /// Comma-separated values, a line per record.
    Csv,
}

/// Why a trace cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The trace cannot be read.
    #[error("cannot read the trace")]
    Trace(#[from] TraceError),
    /// The output cannot be written.
    #[error("cannot write the export")]
    Write(#[from] io::Error),
    /// A row is no JSON: a fault of this program.
    #[error("cannot write a row as JSON")]
    Json(#[from] serde_json::Error),
}

/// Takes the rows of starts, one start after the other.
trait Sink {
    /// A start begins: its number in this export, and its description.
    fn begin(&mut self, start: &row::Start) -> Result<(), ExportError>;
    /// The next row of it.
    fn row(&mut self, row: &row::Row<'_>) -> Result<(), ExportError>;
    /// All starts are done.
    fn finish(&mut self) -> Result<(), ExportError>;
}

/// What was exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exported {
    /// Starts.
    pub starts: u64,
    /// Rows: records but for descriptions of files.
    pub rows: u64,
}

/// Writes all `traces` to `out`. A trace that was cut off is exported as far as it is whole, and is then an error.
pub fn export<R: Read>(
    format: Format,
    traces: impl IntoIterator<Item = Result<TraceReader<R>, TraceError>>,
    out: &mut dyn Write,
) -> Result<Exported, ExportError> {
    let mut sink: Box<dyn Sink + '_> = match format {
        Format::Perfetto => Box::new(perfetto::Perfetto::new(out)),
        Format::Chrome => Box::new(chrome::Chrome::new(out)),
        Format::Parquet => Box::new(parquet::Parquet::new(out)?),
        Format::Jsonl => Box::new(jsonl::Jsonl::new(out)),
        Format::Csv => Box::new(csv::Csv::new(out)?),
    };
    let mut exported = Exported::default();
    let mut failed = None;
    for (number, trace) in traces.into_iter().enumerate() {
        let trace = trace?;
        let mut rows = Rows::new(trace.header(), number);
        sink.begin(rows.start())?;
        exported.starts += 1;
        for record in trace {
            match record {
                Ok(record) => {
                    if let Some(row) = rows.next(&record) {
                        exported.rows += 1;
                        sink.row(&row)?;
                    }
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
    }
    // What is whole is readable, whatever came then.
    sink.finish()?;
    failed.map_or(Ok(exported), |error| Err(error.into()))
}
