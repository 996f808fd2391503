//! `sluice trace list`, `show`, `export`, `report`: what recorded starts say. Reads files; needs no daemon.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use sluice_export::{Format, otlp};
use sluice_trace::{FetchLane, Origin, Phase, Summarizer, Summary, TraceError, TraceReader};
use tonic::codegen::http::uri::PathAndQuery;

use super::size;
use crate::cli::{ExportArgs, OtlpProtocol, TraceAction, TraceFormat};
use crate::config::Config;

/// Method of OpenTelemetry's trace service.
const OTLP_METHOD: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// See the module text.
pub(crate) async fn trace(config: &Config, action: TraceAction) -> Result<()> {
    match action {
        // It runs a container, and is a command of its own.
        TraceAction::Record(_) => Ok(()),
        TraceAction::List { json } => list(config, json),
        TraceAction::Show { trace, json } => show(&find(config, trace.as_deref())?, json),
        TraceAction::Export(args) => export(config, args).await,
        TraceAction::Report { trace, compare, output } => {
            let first = find(config, trace.as_deref())?;
            let second = compare.map(|name| find(config, Some(&name))).transpose()?;
            report(&first, second.as_deref(), &output)
        }
    }
}

/// Where the node keeps its traces.
pub(crate) fn directory(config: &Config) -> PathBuf {
    config.root.join("traces")
}

/// Trace files of a directory, oldest first: names begin with the time.
pub(crate) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", dir.display()))?,
    };
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    found.retain(|path| path.extension().is_some_and(|extension| extension == "trace"));
    found.sort();
    Ok(found)
}

fn find(config: &Config, name: Option<&str>) -> Result<PathBuf> {
    let dir = directory(config);
    match name {
        None => files(&dir)?.pop().with_context(|| format!("there are no traces in {}", dir.display())),
        Some(name) if Path::new(name).exists() => Ok(name.into()),
        Some(name) => {
            let path = dir.join(format!("{}.trace", name.trim_end_matches(".trace")));
            if !path.exists() {
                bail!("there is no trace `{name}`; `sluice trace list` names those there are");
            }
            Ok(path)
        }
    }
}

fn open(path: &Path) -> Result<TraceReader<BufReader<File>>, TraceError> {
    TraceReader::new(BufReader::new(File::open(path)?))
}

/// One trace in numbers. One that was cut off counts as far as it is whole.
pub(crate) fn summary(path: &Path) -> Result<Summary> {
    let reader = open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut summarizer = Summarizer::new(reader.header());
    for record in reader {
        match record {
            Ok(record) => summarizer.push(&record),
            Err(error @ TraceError::CutOff { .. }) => {
                tracing::warn!(path = %path.display(), %error, "the rest is missing");
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }
    Ok(summarizer.finish())
}

fn milliseconds(ns: u64) -> String {
    format!("{:.1} ms", ns as f64 / 1e6)
}

fn list(config: &Config, json: bool) -> Result<()> {
    for path in files(&directory(config))? {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let summary = match summary(&path) {
            Ok(summary) => summary,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a trace is passed over");
                continue;
            }
        };
        if json {
            say!("{}", in_json(&name, &summary));
            continue;
        }
        let ready = summary.ready_ns.map_or("unknown".to_owned(), milliseconds);
        let fetched = size(summary.bytes_before_ready());
        let header = &summary.header;
        say!("{name}  ready {ready:>11}  fetched {fetched:>9}  {} `{}`", header.reference, header.entry);
    }
    Ok(())
}

fn in_json(name: &str, summary: &Summary) -> serde_json::Value {
    let header = &summary.header;
    let phases: serde_json::Map<String, serde_json::Value> =
        summary.phases.iter().map(|(phase, _, took)| (phase.name().to_owned(), (*took).into())).collect();
    let fetched = |lane: &FetchLane| summary.fetches.get(lane).copied().unwrap_or_default();
    let reads = |origin: &Origin| summary.reads.get(origin).copied().unwrap_or_default();
    json!({
        "name": name, "reference": header.reference, "manifest_digest": header.image, "entry": header.entry,
        "kernel": header.kernel, "container": header.container, "began_at": header.began_at,
        "ready_ns": summary.ready_ns, "first_byte_ns": summary.first_byte_ns, "phases_ns": phases,
        "blocked_ns": summary.blocked_ns, "round_trips": summary.round_trips(), "round_trips_in_turn": summary.round_trips_in_turn, "bytes": summary.bytes_before_ready(),
        "ahead_bytes": summary.ahead_bytes, "ahead_used_bytes": summary.ahead_used_bytes,
        "touched_bytes": summary.touched_bytes, "brought_bytes": summary.brought_bytes, "files": summary.files.len(), "failures": summary.failures.values().sum::<u64>(),
        "fetches": FetchLane::ALL.iter().map(|lane| (lane.name(), json!(fetched(lane)))).collect::<std::collections::BTreeMap<_, _>>(),
        "reads": Origin::ALL.iter().map(|origin| (origin.name(), json!(reads(origin)))).collect::<std::collections::BTreeMap<_, _>>(),
    })
}

fn show(path: &Path, json: bool) -> Result<()> {
    let summary = summary(path)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    if json {
        say!("{}", in_json(&name, &summary));
        return Ok(());
    }
    let header = &summary.header;
    say!("{name}: {} `{}` ({}), kernel {}", header.reference, header.entry, header.container, header.kernel);
    for phase in Phase::ALL {
        if let Some(took) = summary.phase_ns(phase) {
            say!("  {:<12} {:>12}", phase.name(), milliseconds(took));
        }
    }
    let time = |ns: Option<u64>| ns.map_or("unknown".to_owned(), milliseconds);
    say!("  {:<12} {:>12}", "first byte", time(summary.first_byte_ns));
    say!("  {:<12} {:>12}", "ready", time(summary.ready_ns));
    say!("  {:<12} {:>12}", "blocked", milliseconds(summary.blocked_ns));
    say!(
        "  {:<12} {:>12}, those under way at the same time counted once",
        "round trips",
        summary.round_trips_in_turn
    );
    for (lane, fetches) in &summary.fetches {
        say!("  fetched, {:<11} {:>9} in {} requests", lane.name(), size(fetches.bytes), fetches.count);
    }
    for (origin, reads) in &summary.reads {
        let wait = milliseconds(reads.wait_ns);
        say!(
            "  reads from {:<10} {:>8}, {:>9}, waited {wait}",
            origin.name(),
            reads.count,
            size(reads.bytes)
        );
    }
    if let Some(accuracy) = summary.accuracy() {
        say!("  fetched ahead {}, {:.0} % of it read", size(summary.ahead_bytes), accuracy * 100.0);
    }
    let mut files: Vec<_> = summary.files.iter().collect();
    files.sort_by_key(|(_, file)| std::cmp::Reverse(file.wait_ns));
    for (path, file) in files.into_iter().take(10).filter(|(_, file)| file.wait_ns > 0) {
        say!("  waited {:>11} for {path}", milliseconds(file.wait_ns));
    }
    for (failure, count) in &summary.failures {
        let sluice_trace::Failure { call, errno, file_type } = failure;
        say!("  {count} times {call} of a {file_type} failed with errno {errno}");
    }
    Ok(())
}

async fn export(config: &Config, args: ExportArgs) -> Result<()> {
    let paths: Vec<PathBuf> = if args.traces.is_empty() {
        files(&directory(config))?
    } else {
        args.traces.iter().map(|name| find(config, Some(name))).collect::<Result<_>>()?
    };
    let format = match args.format {
        TraceFormat::Perfetto => Format::Perfetto,
        TraceFormat::Chrome => Format::Chrome,
        TraceFormat::Parquet => Format::Parquet,
        TraceFormat::Jsonl => Format::Jsonl,
        TraceFormat::Csv => Format::Csv,
        TraceFormat::Otlp => {
            let endpoint = args.endpoint.context("otlp needs --endpoint")?;
            return send(&paths, &endpoint, args.protocol).await;
        }
    };
    let traces = paths.iter().map(|path| open(path));
    match &args.output {
        None => {
            let mut out = BufWriter::new(std::io::stdout().lock());
            sluice_export::export(format, traces, &mut out)?;
        }
        Some(path) => {
            let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
            let exported = sluice_export::export(format, traces, &mut BufWriter::new(file))?;
            eprintln!("sluice: {} starts, {} rows: {}", exported.starts, exported.rows, path.display());
        }
    }
    Ok(())
}

/// Sends spans, a request per start.
async fn send(paths: &[PathBuf], endpoint: &str, protocol: OtlpProtocol) -> Result<()> {
    let cannot = || format!("cannot send to {endpoint}");
    let mut grpc = None;
    let http = reqwest::Client::new();
    for path in paths {
        let request = otlp::spans(&summary(path)?);
        let answer = match protocol {
            OtlpProtocol::Grpc => {
                let client = match &mut grpc {
                    Some(client) => client,
                    none => {
                        let channel = tonic::transport::Channel::from_shared(endpoint.to_owned())?;
                        none.insert(tonic::client::Grpc::new(channel.connect().await.with_context(cannot)?))
                    }
                };
                client.ready().await.with_context(cannot)?;
                let codec = tonic_prost::ProstCodec::<otlp::Request, otlp::Response>::default();
                let method = PathAndQuery::from_static(OTLP_METHOD);
                client
                    .unary(tonic::Request::new(request), method, codec)
                    .await
                    .with_context(cannot)?
                    .into_inner()
            }
            OtlpProtocol::Http => {
                let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
                let post = http.post(url).header("content-type", "application/x-protobuf");
                let sent =
                    post.body(request.to_bytes()).send().await.and_then(reqwest::Response::error_for_status);
                let body = sent.with_context(cannot)?.bytes().await.with_context(cannot)?;
                otlp::Response::from_bytes(&body).context("the collector's answer is not understood")?
            }
        };
        if let Some(partial) = answer.partial_success.filter(|partial| partial.rejected_spans > 0) {
            bail!("the collector refused {} spans: {}", partial.rejected_spans, partial.error_message);
        }
    }
    eprintln!("sluice: sent {} starts to {endpoint}", paths.len());
    Ok(())
}

fn report(first: &Path, second: Option<&Path>, output: &Path) -> Result<()> {
    let start = |path: &Path| -> Result<_> {
        let reader = open(path).with_context(|| format!("cannot read {}", path.display()))?;
        sluice_report::Start::read(reader).with_context(|| format!("cannot read {}", path.display()))
    };
    let starts = std::iter::once(first).chain(second).map(start).collect::<Result<Vec<_>>>()?;
    let page = sluice_report::page(&starts)?;
    let mut file = File::create(output).with_context(|| format!("cannot write {}", output.display()))?;
    file.write_all(page.as_bytes()).with_context(|| format!("cannot write {}", output.display()))?;
    eprintln!("sluice: wrote {}", output.display());
    Ok(())
}
