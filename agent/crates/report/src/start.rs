//! A trace, reduced to what a screen can show.

use std::collections::BTreeMap;
use std::io::Read;

use serde::Serialize;
use sluice_trace::{
    FetchLane, Origin, Places, Ranges, Record, Summarizer, Summary, TraceError, TraceReader, What,
};

/// Waits that are drawn: the longest.
const WAITS: usize = 1500;
/// Fetches that are drawn: the longest.
const FETCHES: usize = 1500;
/// Files with a line of their own in the waterfall: those waited for the longest.
const FILES: usize = 30;
/// Cells of a layer's map.
const CELLS: u64 = 240;
/// Steps of the bandwidth's timeline.
const STEPS: usize = 160;

/// One start, ready to be shown. Times are nanoseconds since its beginning.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    image: String,
    digest: String,
    entry: String,
    kernel: String,
    container: String,
    began_at: u64,
    ready_ns: Option<u64>,
    first_byte_ns: Option<u64>,
    end_ns: u64,
    blocked_ns: u64,
    round_trips: u64,
    bytes: u64,
    touched_bytes: u64,
    ahead_bytes: u64,
    ahead_used_bytes: u64,
    phases: Vec<(&'static str, u64, u64)>,
    levels: Vec<Level>,
    waits: Vec<Wait>,
    fetches: Vec<Fetch>,
    files: Vec<File>,
    bandwidth: Bandwidth,
    layers: Vec<Layer>,
    failures: Vec<(String, u64)>,
    left_out: usize,
}

#[derive(Debug, Clone, Serialize)]
struct Level {
    name: &'static str,
    count: u64,
    bytes: u64,
    wait_ns: u64,
}

#[derive(Debug, Clone, Serialize)]
struct Wait {
    at: u64,
    took: u64,
    level: &'static str,
    path: String,
    bytes: u64,
    process: String,
}

#[derive(Debug, Clone, Serialize)]
struct Fetch {
    at: u64,
    first: u64,
    took: u64,
    lane: &'static str,
    bytes: u64,
    layer: Option<u32>,
}

#[derive(Debug, Clone, Serialize)]
struct File {
    path: String,
    reads: u64,
    wait: u64,
    first: u64,
}

#[derive(Debug, Clone, Default, Serialize)]
struct Bandwidth {
    step: u64,
    /// Bytes per step and lane.
    lanes: BTreeMap<&'static str, Vec<u64>>,
}

#[derive(Debug, Clone, Serialize)]
struct Layer {
    digest: String,
    bytes: u64,
    touched: u64,
    ahead: u64,
    /// Per cell: 0 nothing, 1 touched, 2 touched and fetched ahead, 3 fetched ahead for nothing.
    cells: Vec<u8>,
}

/// Keeps the longest of many.
#[derive(Debug)]
struct Longest<T> {
    most: usize,
    all: Vec<(u64, T)>,
    left_out: usize,
}

impl<T> Longest<T> {
    fn new(most: usize) -> Self {
        Self { most, all: Vec::new(), left_out: 0 }
    }

    fn push(&mut self, length: u64, one: T) {
        self.all.push((length, one));
        // Twice as many as are kept at most, so that sorting is seldom.
        if self.all.len() >= self.most * 2 {
            self.cut();
        }
    }

    fn cut(&mut self) {
        self.all.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
        self.left_out += self.all.len().saturating_sub(self.most);
        self.all.truncate(self.most);
    }

    fn finish(mut self) -> (Vec<T>, usize) {
        self.cut();
        (self.all.into_iter().map(|(_, one)| one).collect(), self.left_out)
    }
}

#[derive(Debug)]
struct Reader {
    began_ns: u64,
    places: Places,
    waits: Longest<Wait>,
    fetches: Longest<Fetch>,
    touched: BTreeMap<u32, Ranges>,
    ahead: BTreeMap<u32, Ranges>,
    end_ns: u64,
    is_over: bool,
}

impl Start {
    /// Reads a trace. One that was cut off is shown as far as it is whole.
    pub fn read<R: Read>(trace: TraceReader<R>) -> Result<Self, TraceError> {
        let mut summarizer = Summarizer::new(trace.header());
        let mut reader = Reader {
            began_ns: trace.header().began_ns,
            places: Places::default(),
            waits: Longest::new(WAITS),
            fetches: Longest::new(FETCHES),
            touched: BTreeMap::new(),
            ahead: BTreeMap::new(),
            end_ns: 0,
            is_over: false,
        };
        for record in trace {
            match record {
                Ok(record) => {
                    summarizer.push(&record);
                    reader.push(&record);
                }
                Err(TraceError::CutOff { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(reader.finish(&summarizer.finish()))
    }
}

impl Reader {
    fn push(&mut self, record: &Record) {
        self.places.see(&record.what);
        // What was not known to be over goes on being shown.
        if self.is_over {
            return;
        }
        let at = record.time_ns.saturating_sub(self.began_ns);
        let path = || {
            let place = self.places.of(&record.what).map(|(place, _)| place);
            place.map_or("(unknown file)".to_owned(), |place| {
                format!("/{}", String::from_utf8_lossy(&place.path))
            })
        };
        let process = record.process.comm.clone();
        match &record.what {
            What::Served { layer, offset, len, service_ns, from } => {
                let (level, path) = (from.name(), path());
                let wait = Wait { at, took: *service_ns, level, path, bytes: *len, process };
                self.waits.push(*service_ns, wait);
                self.touched.entry(*layer).or_default().add(*offset..offset.saturating_add(*len));
                self.until(at.saturating_add(*service_ns));
            }
            What::Blocked { blocked_ns, .. } => {
                let path = path();
                let at = at.saturating_sub(*blocked_ns);
                self.waits.push(
                    *blocked_ns,
                    Wait { at, took: *blocked_ns, level: "blocked", path, bytes: 0, process },
                );
            }
            What::Access { inode, offset, len, .. } => {
                if let Some(place) = self.places.inode(*inode) {
                    let start = place.offset.saturating_add(*offset);
                    let end = start.saturating_add(*len).min(place.end());
                    self.touched.entry(place.layer).or_default().add(start..end);
                }
            }
            What::Fetch { lane, layer, len, first_byte_ns, took_ns, .. } => {
                let (first, took, lane) = (*first_byte_ns, *took_ns, lane.name());
                self.fetches.push(took, Fetch { at, first, took, lane, bytes: *len, layer: *layer });
                self.until(at.saturating_add(took));
            }
            What::Brought { lane: FetchLane::Prefetch | FetchLane::StartPack, layer, offset, len } => {
                self.ahead.entry(*layer).or_default().add(*offset..offset.saturating_add(*len));
            }
            What::Phase { took_ns, .. } => self.until(at.saturating_add(*took_ns)),
            What::Ready => self.is_over = true,
            _ => {}
        }
    }

    fn until(&mut self, end_ns: u64) {
        self.end_ns = self.end_ns.max(end_ns);
    }

    fn finish(self, summary: &Summary) -> Start {
        let end_ns = summary.ready_ns.unwrap_or(0).max(self.end_ns).max(1);
        let layers = self.layers(summary);
        let (mut waits, waits_left) = self.waits.finish();
        let (mut fetches, fetches_left) = self.fetches.finish();
        waits.sort_by_key(|wait| wait.at);
        fetches.sort_by_key(|fetch| fetch.at);
        let header = &summary.header;
        Start {
            image: header.reference.clone(),
            digest: header.image.clone(),
            entry: header.entry.clone(),
            kernel: header.kernel.clone(),
            container: header.container.clone(),
            began_at: header.began_at,
            ready_ns: summary.ready_ns,
            first_byte_ns: summary.first_byte_ns,
            end_ns,
            blocked_ns: summary.blocked_ns,
            round_trips: summary.round_trips(),
            bytes: summary.bytes_before_ready(),
            touched_bytes: summary.touched_bytes,
            ahead_bytes: summary.ahead_bytes,
            ahead_used_bytes: summary.ahead_used_bytes,
            phases: summary.phases.iter().map(|(phase, at, took)| (phase.name(), *at, *took)).collect(),
            levels: levels(summary),
            bandwidth: bandwidth(&fetches, end_ns),
            waits,
            fetches,
            files: files(summary),
            layers,
            failures: summary
                .failures
                .iter()
                .map(|(failure, count)| {
                    (format!("{} of a {}: errno {}", failure.call, failure.file_type, failure.errno), *count)
                })
                .collect(),
            left_out: waits_left + fetches_left,
        }
    }

    fn layers(&self, summary: &Summary) -> Vec<Layer> {
        let none = Ranges::default();
        let layer = |(number, layer): (u32, &sluice_trace::TracedLayer)| {
            let (touched, ahead) =
                (self.touched.get(&number).unwrap_or(&none), self.ahead.get(&number).unwrap_or(&none));
            let size = layer.bytes.max(1);
            let cell = size.div_ceil(CELLS).max(4096);
            let cells = (0..size.div_ceil(cell)).map(|place| {
                let range = place * cell..(place + 1) * cell;
                match (touched.bytes_in(&range) > 0, ahead.bytes_in(&range) > 0) {
                    (false, false) => 0,
                    (true, false) => 1,
                    (true, true) => 2,
                    (false, true) => 3,
                }
            });
            let (digest, bytes) = (layer.digest.clone(), layer.bytes);
            Layer { digest, bytes, touched: touched.bytes(), ahead: ahead.bytes(), cells: cells.collect() }
        };
        (0..).zip(&summary.header.layers).map(layer).filter(|layer| layer.bytes > 0).collect()
    }
}

fn levels(summary: &Summary) -> Vec<Level> {
    let level = |origin: Origin| {
        let reads = summary.reads.get(&origin)?;
        Some(Level { name: origin.name(), count: reads.count, bytes: reads.bytes, wait_ns: reads.wait_ns })
    };
    Origin::ALL.into_iter().filter_map(level).collect()
}

fn files(summary: &Summary) -> Vec<File> {
    let mut files: Vec<File> = summary
        .files
        .iter()
        .map(|(path, file)| File {
            path: path.clone(),
            reads: file.reads,
            wait: file.wait_ns,
            first: file.first_ns,
        })
        .collect();
    files.sort_by_key(|file| std::cmp::Reverse(file.wait));
    files.truncate(FILES);
    files
}

/// Spreads what each fetch brought evenly over the time in which it came.
fn bandwidth(fetches: &[Fetch], end_ns: u64) -> Bandwidth {
    let step = (end_ns / STEPS as u64).max(1_000_000);
    let mut bandwidth = Bandwidth { step, lanes: BTreeMap::new() };
    let steps = (end_ns / step) as usize + 1;
    for fetch in fetches {
        let lane = bandwidth.lanes.entry(fetch.lane).or_insert_with(|| vec![0; steps]);
        let first = (fetch.at.saturating_add(fetch.first.min(fetch.took)) / step) as usize;
        let last = ((fetch.at.saturating_add(fetch.took) / step) as usize).max(first);
        let each = fetch.bytes / (last - first + 1) as u64;
        for bytes in lane.iter_mut().take(last + 1).skip(first) {
            *bytes += each;
        }
    }
    bandwidth
}
