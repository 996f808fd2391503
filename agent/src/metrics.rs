//! What the daemon counts, and how Prometheus reads it. Names and labels stand in docs/metrics.md; labels have few values, and none
//! names an image.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sluice_regress::Kind;
use sluice_stream::Lane;
use sluice_trace::{Capability, Level, Levels};

use crate::api::{Served, Status};

/// Upper bounds of the histograms' buckets, in seconds.
const BOUNDS: [f64; 14] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// How long something took, over and over.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// Below each bound, and above all.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_ns: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let place = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        if let Some(bucket) = self.buckets.get(place) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// See the module text.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// From the request to a root file system, by how it is served.
    pulls: [Histogram; 3],
    pub(crate) mount: Histogram,
    pub(crate) ready: Histogram,
    /// Reads that waited for the registry.
    pub(crate) read_wait: Histogram,
    /// By lane.
    requests: [AtomicU64; 3],
    broken: [AtomicU64; 3],
    pub(crate) packs: AtomicU64,
    pub(crate) pack_bytes: AtomicU64,
    pub(crate) read_errors: AtomicU64,
    pub(crate) fell_back: AtomicU64,
    pub(crate) evicted: AtomicU64,
    pub(crate) records_lost: AtomicU64,
    pub(crate) ahead_bytes: AtomicU64,
    pub(crate) ahead_used_bytes: AtomicU64,
    regressions: [AtomicU64; Kind::ALL.len()],
}

/// One more.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Metrics {
    /// An image was made ready.
    pub(crate) fn pulled(&self, served: Served, took: Duration) {
        if let Some(histogram) = self.pulls.get(served as usize) {
            histogram.observe(took);
        }
    }

    /// A request for bytes ended.
    pub(crate) fn fetched(&self, lane: Lane, whole: bool) {
        self.requests.get(lane as usize).into_iter().for_each(count);
        self.broken.get(lane as usize).into_iter().filter(|_| !whole).for_each(count);
    }

    /// A start became worse.
    pub(crate) fn regressed(&self, kind: Kind) {
        self.regressions.get(kind as usize).into_iter().for_each(count);
    }

    /// All of it, in Prometheus' text format.
    pub(crate) fn text(&self, status: &Status, levels: &Levels) -> String {
        let mut out = Text::default();
        self.times(&mut out);
        self.fetches(&mut out, status);
        self.starts(&mut out, levels);
        store(&mut out, status);
        out.0
    }

    fn times(&self, out: &mut Text) {
        out.family(
            "sluice_image_pull_seconds",
            "histogram",
            "Time from the request for an image to its root file system.",
        );
        for served in [Served::Streamed, Served::Local, Served::Unpacked] {
            let name = match served {
                Served::Streamed => "streamed",
                Served::Local => "local",
                Served::Unpacked => "unpacked",
            };
            if let Some(histogram) = self.pulls.get(served as usize) {
                out.histogram("sluice_image_pull_seconds", &format!("served=\"{name}\""), histogram);
            }
        }
        let others = [
            ("sluice_image_mount_seconds", "Time that mounting an image took.", &self.mount),
            (
                "sluice_start_ready_seconds",
                "Time from the request for an image to a container that is ready.",
                &self.ready,
            ),
            ("sluice_read_wait_seconds", "Time that reads waited for the registry.", &self.read_wait),
        ];
        for (name, help, histogram) in others {
            out.family(name, "histogram", help);
            out.histogram(name, "", histogram);
        }
    }

    fn fetches(&self, out: &mut Text, status: &Status) {
        let reads = status.reads;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let lanes = ["demand", "prefetch", "fill"];
        let mut bytes: Vec<(String, u64)> = lanes
            .iter()
            .zip([
                reads.bytes_demand,
                reads.bytes_prefetch.saturating_sub(get(&self.pack_bytes)),
                reads.bytes_fill,
            ])
            .map(|(lane, bytes)| (format!("lane=\"{lane}\""), bytes))
            .collect();
        bytes.push(("lane=\"start_pack\"".to_owned(), get(&self.pack_bytes)));
        out.numbers(
            "sluice_fetched_bytes_total",
            "counter",
            "Compressed bytes that came from registries.",
            &bytes,
        );
        let by_lane = |counters: &[AtomicU64; 3]| -> Vec<(String, u64)> {
            lanes
                .iter()
                .zip(counters)
                .map(|(lane, counter)| (format!("lane=\"{lane}\""), get(counter)))
                .collect()
        };
        let mut requests = by_lane(&self.requests);
        requests.push(("lane=\"start_pack\"".to_owned(), get(&self.packs)));
        out.numbers(
            "sluice_fetch_requests_total",
            "counter",
            "Requests for bytes of layers and start packs.",
            &requests,
        );
        let help = "Requests that ended early or brought what the index does not say.";
        out.numbers("sluice_fetch_errors_total", "counter", help, &by_lane(&self.broken));
        let levels = [
            ("level=\"disk\"".to_owned(), reads.from_disk),
            ("level=\"registry\"".to_owned(), reads.from_registry),
        ];
        out.numbers(
            "sluice_reads_total",
            "counter",
            "Reads that reached the agent, by where their bytes were.",
            &levels,
        );
        out.number(
            "sluice_reads_waiting",
            "gauge",
            "Reads that wait for a registry now: the queue's depth.",
            reads.waiting,
        );
        out.number(
            "sluice_read_errors_total",
            "counter",
            "Reads that failed: processes got EIO.",
            get(&self.read_errors),
        );
        out.number(
            "sluice_pull_fallbacks_total",
            "counter",
            "Images that were pulled the ordinary way instead of streamed.",
            get(&self.fell_back),
        );
    }

    fn starts(&self, out: &mut Text, levels: &Levels) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        out.number(
            "sluice_prefetched_bytes_total",
            "counter",
            "Bytes of content that recorded starts had fetched ahead.",
            get(&self.ahead_bytes),
        );
        out.number(
            "sluice_prefetched_used_bytes_total",
            "counter",
            "Those of them that the starts read.",
            get(&self.ahead_used_bytes),
        );
        out.number(
            "sluice_trace_records_lost_total",
            "counter",
            "Records that did not fit into a trace.",
            get(&self.records_lost),
        );
        let name = |capability: Capability| {
            let name = serde_json::to_value(capability).ok();
            name.and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
        };
        let reached: Vec<(String, u64)> = Capability::ALL
            .iter()
            .map(|one| {
                (format!("capability=\"{}\"", name(*one)), levels.of(*one).unwrap_or(Level::Log) as u64)
            })
            .collect();
        let help =
            "By what something is seen: 0 the agent's log or not at all, 1 tracepoint, 2 kprobe, 3 fexit.";
        out.numbers("sluice_probe_level", "gauge", help, &reached);
        let found: Vec<(String, u64)> = Kind::ALL
            .iter()
            .zip(&self.regressions)
            .map(|(kind, counter)| (format!("kind=\"{}\"", kind.name()), get(counter)))
            .collect();
        out.numbers(
            "sluice_regressions_total",
            "counter",
            "Starts that became worse than their baseline, by what.",
            &found,
        );
        out.number(
            "sluice_images_evicted_total",
            "counter",
            "Images that went because the disk or the quota was full.",
            get(&self.evicted),
        );
    }
}

fn store(out: &mut Text, status: &Status) {
    out.number(
        "sluice_store_bytes",
        "gauge",
        "Bytes that the layer store takes on the disk.",
        status.disk_bytes,
    );
    out.number(
        "sluice_store_full",
        "gauge",
        "1: the disk or the quota is full.",
        u64::from(status.disk_full),
    );
    let states = ["streaming", "local", "unpacked"];
    let images: Vec<(String, u64)> = states
        .iter()
        .map(|state| {
            let count = status.images.iter().filter(|image| image.state == *state).count();
            (format!("state=\"{state}\""), count as u64)
        })
        .collect();
    out.numbers("sluice_images", "gauge", "Images on the node.", &images);
    let users = status.images.iter().map(|image| image.users as u64).sum();
    out.number("sluice_image_users", "gauge", "Containers, mounts and snapshots that use an image.", users);
    out.number("sluice_resident_bytes", "gauge", "Memory of the daemon.", status.resident_bytes);
    let version = format!("version=\"{}\"", status.version);
    out.numbers("sluice_build_info", "gauge", "1, with the daemon's version.", &[(version, 1)]);
}

/// Prometheus' text format, version 0.0.4.
#[derive(Debug, Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn number(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.numbers(name, kind, help, &[(String::new(), value)]);
    }

    fn numbers(&mut self, name: &str, kind: &str, help: &str, values: &[(String, u64)]) {
        self.family(name, kind, help);
        for (labels, value) in values {
            if labels.is_empty() {
                self.line(format_args!("{name} {value}"));
            } else {
                self.line(format_args!("{name}{{{labels}}} {value}"));
            }
        }
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut all = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, bucket) in bounds.zip(&histogram.buckets) {
            all += bucket.load(Ordering::Relaxed);
            self.line(format_args!("{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {all}"));
        }
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let sum = histogram.sum_ns.load(Ordering::Relaxed) as f64 / 1e9;
        self.line(format_args!("{name}_sum{braces} {sum}\n{name}_count{braces} {all}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a text cannot fail.
        if writeln!(self.0, "{line}").is_err() {
            tracing::debug!("a metric is not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_documented_and_every_documented_one_is_there() {
        let text = Metrics::default().text(&Status::default(), &Levels::default());
        let documented = include_str!("../../docs/metrics.md");
        let dashboard = include_str!("../../deploy/grafana/sluice.json");
        let names = |text: &str| -> std::collections::BTreeSet<String> {
            let named = |line: &str| {
                line.strip_prefix("# TYPE ").and_then(|rest| rest.split(' ').next()).map(str::to_owned)
            };
            text.lines().filter_map(named).collect()
        };
        let found = names(&text);
        assert!(found.len() > 20);
        for name in &found {
            assert!(documented.contains(&format!("| `{name}` |")), "{name} is not documented");
        }
        let rows = documented.lines().filter_map(|line| line.strip_prefix("| `sluice_"));
        for row in rows {
            let name = format!("sluice_{}", row.split('`').next().unwrap_or_default());
            assert!(found.contains(&name), "{name} is documented and not there");
        }
        for word in dashboard
            .split(|one: char| !one.is_ascii_lowercase() && one != '_')
            .filter(|word| word.starts_with("sluice_"))
        {
            let name =
                ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            assert!(found.contains(name), "the dashboard shows {word}");
        }
    }

    #[test]
    fn histograms_add_up() {
        let histogram = Histogram::default();
        [1, 20, 20, 700_000].map(Duration::from_millis).iter().for_each(|took| histogram.observe(*took));
        let mut out = Text::default();
        out.histogram("x", "a=\"b\"", &histogram);
        for line in [
            "x_bucket{a=\"b\",le=\"0.001\"} 1",
            "x_bucket{a=\"b\",le=\"0.025\"} 3",
            "x_bucket{a=\"b\",le=\"60\"} 3",
            "x_bucket{a=\"b\",le=\"+Inf\"} 4",
            "x_count{a=\"b\"} 4",
            "x_sum{a=\"b\"} 700.041",
        ] {
            assert!(out.0.contains(line), "{line} is missing:\n{}", out.0);
        }
    }
}
