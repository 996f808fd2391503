//! The command line of traces and of what is made of them.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::RunArgs;

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, for a moment")]
pub(crate) enum TraceAction {
    /// Run a container, as `sluice run` does, and say what was recorded of its start
    Record(RunArgs),
    /// List the traces that the node keeps
    List {
        /// As JSON, one object a line
        #[arg(long)]
        json: bool,
    },
    /// Show a start in numbers
    Show {
        /// Trace: a file, or a name as `trace list` has it [default: the latest]
        trace: Option<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Write traces in a format of others
    Export(ExportArgs),
    /// Write a page that shows a start: self-contained, for any browser
    Report {
        /// Trace: a file, or a name as `trace list` has it [default: the latest]
        trace: Option<String>,
        /// Another trace, shown beside it
        #[arg(long, value_name = "TRACE")]
        compare: Option<String>,
        /// Where to write it
        #[arg(short, long, value_name = "FILE", default_value = "start.html")]
        output: PathBuf,
    },
}

/// Format of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TraceFormat {
    /// Perfetto's own
    Perfetto,
    /// Chrome's JSON
    Chrome,
    /// OpenTelemetry spans, sent to a collector
    Otlp,
    /// Parquet, a row per record
    Parquet,
    /// JSON Lines
    Jsonl,
    /// Comma-separated values
    Csv,
}

/// Protocol to a collector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OtlpProtocol {
    /// gRPC, without TLS
    Grpc,
    /// Protocol buffers over HTTP
    Http,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Traces: files, or names as `trace list` has them [default: all that the node keeps]
    pub(crate) traces: Vec<String>,
    /// Format
    #[arg(short, long, value_enum)]
    pub(crate) format: TraceFormat,
    /// Where to write it [default: standard output]
    #[arg(short, long, value_name = "FILE", conflicts_with = "endpoint")]
    pub(crate) output: Option<PathBuf>,
    /// The collector, for otlp, e.g. http://127.0.0.1:4317
    #[arg(long, value_name = "URL", required_if_eq("format", "otlp"))]
    pub(crate) endpoint: Option<String>,
    /// How to speak to the collector
    #[arg(long, value_enum, default_value_t = OtlpProtocol::Grpc)]
    pub(crate) protocol: OtlpProtocol,
}

#[derive(Debug, Args)]
pub(crate) struct RegressArgs {
    /// Traces of before: a file, or a directory of them
    pub(crate) base: PathBuf,
    /// Traces of now: a file, or a directory of them
    pub(crate) new: PathBuf,
    /// As JSON
    #[arg(long, conflicts_with = "junit")]
    pub(crate) json: bool,
    /// As JUnit's XML
    #[arg(long)]
    pub(crate) junit: bool,
    /// Starts that each set must have
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) starts: usize,
    /// How likely a finding may be chance
    #[arg(long, value_name = "P", default_value_t = 0.005)]
    pub(crate) chance: f64,
    /// Percent by which a measure must be worse
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
    pub(crate) worse_by: f64,
    /// Other thresholds, as JSON: {"seconds": 0.02, "bytes": 262144, "round_trips": 2, "accuracy": 0.05, "share": 0.8}
    #[arg(long, value_name = "JSON")]
    pub(crate) limits: Option<String>,
}
