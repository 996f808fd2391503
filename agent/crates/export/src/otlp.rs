//! OpenTelemetry: a start as spans, ready to be sent to a collector (`opentelemetry/proto/collector/trace/v1`; field numbers are its).
//!
//! The span `container start` has the steps as children: `pull` with `resolve`, `index` and `mount`, `profile` beside them, `first byte`
//! from there to the first byte the container got, and `ready` from there to ready.

use prost::Message;
use sluice_trace::{Failure, FetchLane, Origin, Phase, Summary};

use crate::row::start_id;

/// `ExportTraceServiceRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Spans, by what they are about.
    #[prost(message, repeated, tag = "1")]
    pub resource_spans: Vec<ResourceSpans>,
}

impl Request {
    /// As it goes over the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

impl Response {
    /// From the wire; `None`: it is no such message.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::decode(bytes).ok()
    }
}

/// `ExportTraceServiceResponse`; what it says of spans that were refused.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// Some were refused.
    #[prost(message, optional, tag = "1")]
    pub partial_success: Option<PartialSuccess>,
}

/// `ExportTracePartialSuccess`.
#[derive(Clone, PartialEq, Message)]
pub struct PartialSuccess {
    /// How many.
    #[prost(int64, tag = "1")]
    pub rejected_spans: i64,
    /// Why.
    #[prost(string, tag = "2")]
    pub error_message: String,
}

/// `ResourceSpans`.
#[derive(Clone, PartialEq, Message)]
pub struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    /// 1 is `SPAN_KIND_INTERNAL`.
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(fixed64, tag = "1")]
    time_unix_nano: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "3")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 3, 5")]
    value: Option<Value>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Value {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(int64, tag = "3")]
    Number(i64),
    #[prost(message, tag = "5")]
    List(List),
}

#[derive(Clone, PartialEq, Message)]
struct List {
    #[prost(message, repeated, tag = "1")]
    values: Vec<AnyValue>,
}

fn text(key: &str, value: &str) -> KeyValue {
    let value = Some(AnyValue { value: Some(Value::Text(value.to_owned())) });
    KeyValue { key: key.to_owned(), value }
}

fn list(key: &str, value: &str) -> KeyValue {
    let one = AnyValue { value: Some(Value::Text(value.to_owned())) };
    let value = Some(AnyValue { value: Some(Value::List(List { values: vec![one] })) });
    KeyValue { key: key.to_owned(), value }
}

fn number(key: &str, value: u64) -> KeyValue {
    let value = Value::Number(i64::try_from(value).unwrap_or(i64::MAX));
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

/// The spans of one start.
pub fn spans(summary: &Summary) -> Request {
    let spans = Spans::new(summary);
    let header = &summary.header;
    let resource = Resource {
        attributes: vec![
            text("service.name", "sluice"),
            text("service.version", &header.agent),
            text("os.type", "linux"),
            text("os.version", &header.kernel),
            text("host.arch", &header.machine),
        ],
    };
    let scope = Scope { name: "sluice".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans: spans.all() }];
    Request { resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans }] }
}

struct Spans<'a> {
    summary: &'a Summary,
    id: blake3::Hash,
}

impl<'a> Spans<'a> {
    fn new(summary: &'a Summary) -> Self {
        Self { summary, id: blake3::hash(start_id(&summary.header).as_bytes()) }
    }

    fn span(&self, name: &str, parent: Option<&str>, from_ns: u64, to_ns: u64) -> Span {
        let began = self.summary.header.began_at.saturating_mul(1_000_000_000);
        let span_id = |name: &str| {
            let hash = blake3::keyed_hash(self.id.as_bytes(), name.as_bytes());
            hash.as_bytes().iter().copied().take(8).collect::<Vec<u8>>()
        };
        Span {
            trace_id: self.id.as_bytes().iter().copied().take(16).collect(),
            span_id: span_id(name),
            parent_span_id: parent.map(span_id).unwrap_or_default(),
            name: name.to_owned(),
            kind: 1,
            start_time_unix_nano: began.saturating_add(from_ns),
            end_time_unix_nano: began.saturating_add(to_ns.max(from_ns)),
            attributes: Vec::new(),
            events: Vec::new(),
        }
    }

    fn all(&self) -> Vec<Span> {
        const ROOT: &str = "container start";
        let summary = self.summary;
        let steps = summary.phases.iter();
        let steps_end = steps.clone().map(|(_, at, took)| at.saturating_add(*took)).max().unwrap_or(0);
        let end = summary.ready_ns.or(summary.first_byte_ns).unwrap_or(0).max(steps_end);
        let mut root = self.span(ROOT, None, 0, end);
        root.attributes = self.attributes();
        root.events =
            summary.failures.iter().map(|(failure, count)| failed(failure, *count, &root)).collect();
        let mut all = vec![root];
        for (phase, at, took) in steps {
            let parent = match phase {
                Phase::Resolve | Phase::Index | Phase::Mount => Phase::Pull.name(),
                _ => ROOT,
            };
            all.push(self.span(phase.name(), Some(parent), *at, at.saturating_add(*took)));
        }
        let pulled = summary.phases.iter().find(|(phase, ..)| *phase == Phase::Pull);
        let pulled = pulled.map_or(0, |(_, at, took)| at.saturating_add(*took));
        let mut at = pulled;
        if let Some(first) = summary.first_byte_ns {
            all.push(self.span("first byte", Some(ROOT), at, first));
            at = at.max(first);
        }
        if let Some(ready) = summary.ready_ns {
            all.push(self.span("ready", Some(ROOT), at, ready));
        }
        all
    }

    fn attributes(&self) -> Vec<KeyValue> {
        let (summary, header) = (self.summary, &self.summary.header);
        let (name, tag) = name_and_tag(&header.reference);
        let mut all = vec![
            text("container.image.name", name),
            list("container.image.repo_digests", &format!("{name}@{}", header.image)),
            text("oci.manifest.digest", &header.image),
            text("sluice.entry", &header.entry),
            text("sluice.container", &header.container),
            number("sluice.blocked_ns", summary.blocked_ns),
            number("sluice.round_trips", summary.round_trips()),
            number("sluice.ahead.bytes", summary.ahead_bytes),
            number("sluice.ahead.used_bytes", summary.ahead_used_bytes),
        ];
        all.extend(tag.map(|tag| list("container.image.tags", tag)));
        // Look-ups' bytes are not counted.
        for lane in FetchLane::ALL.into_iter().filter(|lane| *lane != FetchLane::Lookup) {
            let bytes = summary.fetches.get(&lane).map_or(0, |fetches| fetches.bytes);
            all.push(number(&format!("sluice.fetched.{}.bytes", lane.name().replace(' ', "_")), bytes));
        }
        for origin in Origin::ALL {
            if let Some(reads) = summary.reads.get(&origin) {
                all.push(number(&format!("sluice.reads.{}", origin.name().replace(' ', "_")), reads.count));
            }
        }
        all
    }
}

fn failed(failure: &Failure, count: u64, root: &Span) -> Event {
    let attributes = vec![
        text("sluice.call", &failure.call),
        number("sluice.errno", failure.errno.into()),
        text("sluice.file_type", &failure.file_type),
        number("sluice.count", count),
    ];
    Event { time_unix_nano: root.end_time_unix_nano, name: "failed calls".to_owned(), attributes }
}

/// Of a reference, what stands before tag and digest, and the tag.
fn name_and_tag(reference: &str) -> (&str, Option<&str>) {
    let reference = reference.split('@').next().unwrap_or(reference);
    match reference.rsplit_once(':') {
        // What follows a colon in the first part is a port.
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (reference, None),
    }
}

#[cfg(test)]
mod tests {
    use super::name_and_tag;

    #[test]
    fn names_and_tags() {
        assert_eq!(name_and_tag("host:5000/a/b:1.2"), ("host:5000/a/b", Some("1.2")));
        assert_eq!(name_and_tag("host:5000/a/b@sha256:00"), ("host:5000/a/b", None));
        assert_eq!(name_and_tag("host:5000/a/b"), ("host:5000/a/b", None));
    }
}
