//! Perfetto's own format: a stream of `TracePacket`s (`protos/perfetto/trace` of the Perfetto project; field numbers are its).
//!
//! A start is a group of tracks: its steps, its reads and each fetch lane, the last two with a child track per slot, so that slices of a
//! track never overlap; the container's processes have process and thread tracks. Times are nanoseconds since the first
//! start's beginning.

use std::collections::BTreeMap;
use std::io::Write;

use prost::Message;

use crate::row::{Row, Start};
use crate::tracks::{self, Argument, Item, Slots, Track};
use crate::{ExportError, Sink};

/// All packets are one writer's.
const SEQUENCE: u32 = 1;
/// `SEQ_INCREMENTAL_STATE_CLEARED`: nothing before this packet is needed.
const STATE_CLEARED: u32 = 1;
/// Bandwidth is counted in steps of so many nanoseconds.
const STEP_NS: u64 = 50_000_000;
/// Steps kept of a trace; what comes later is not drawn.
const MAX_STEPS: u64 = 200_000;

/// `TrackEvent.Type`.
#[derive(Clone, Copy)]
enum Kind {
    SliceBegin = 1,
    SliceEnd = 2,
    Instant = 3,
    Counter = 4,
}

#[derive(Clone, PartialEq, Message)]
struct Packets {
    #[prost(message, repeated, tag = "1")]
    packet: Vec<Packet>,
}

#[derive(Clone, PartialEq, Message)]
struct Packet {
    #[prost(uint64, optional, tag = "8")]
    timestamp: Option<u64>,
    #[prost(uint32, optional, tag = "10")]
    trusted_packet_sequence_id: Option<u32>,
    #[prost(message, optional, tag = "11")]
    track_event: Option<TrackEvent>,
    #[prost(uint32, optional, tag = "13")]
    sequence_flags: Option<u32>,
    #[prost(message, optional, tag = "60")]
    track_descriptor: Option<TrackDescriptor>,
}

#[derive(Clone, PartialEq, Message)]
struct TrackDescriptor {
    #[prost(uint64, optional, tag = "1")]
    uuid: Option<u64>,
    #[prost(string, optional, tag = "2")]
    name: Option<String>,
    #[prost(message, optional, tag = "3")]
    process: Option<ProcessDescriptor>,
    #[prost(message, optional, tag = "4")]
    thread: Option<ThreadDescriptor>,
    #[prost(uint64, optional, tag = "5")]
    parent_uuid: Option<u64>,
    #[prost(message, optional, tag = "8")]
    counter: Option<CounterDescriptor>,
}

#[derive(Clone, PartialEq, Message)]
struct ProcessDescriptor {
    #[prost(int32, optional, tag = "1")]
    pid: Option<i32>,
    #[prost(string, optional, tag = "6")]
    process_name: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadDescriptor {
    #[prost(int32, optional, tag = "1")]
    pid: Option<i32>,
    #[prost(int32, optional, tag = "2")]
    tid: Option<i32>,
    #[prost(string, optional, tag = "5")]
    thread_name: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct CounterDescriptor {
    #[prost(string, optional, tag = "6")]
    unit_name: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct TrackEvent {
    #[prost(message, repeated, tag = "4")]
    debug_annotations: Vec<DebugAnnotation>,
    #[prost(int32, optional, tag = "9")]
    r#type: Option<i32>,
    #[prost(uint64, optional, tag = "11")]
    track_uuid: Option<u64>,
    #[prost(string, repeated, tag = "22")]
    categories: Vec<String>,
    #[prost(string, optional, tag = "23")]
    name: Option<String>,
    #[prost(int64, optional, tag = "30")]
    counter_value: Option<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct DebugAnnotation {
    #[prost(uint64, optional, tag = "3")]
    uint_value: Option<u64>,
    #[prost(string, optional, tag = "6")]
    string_value: Option<String>,
    #[prost(string, optional, tag = "10")]
    name: Option<String>,
}

/// A track of the output.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Line {
    Group(usize),
    Track(usize, Track),
    Slot(usize, Track, usize),
    Process(u32),
    Thread(u32, u32),
    Bandwidth(usize, &'static str),
}

pub(crate) struct Perfetto<'a> {
    out: &'a mut dyn Write,
    begun: bool,
    first_began_at: Option<u64>,
    shift_ns: u64,
    start: usize,
    slots: Slots,
    lines: BTreeMap<Line, u64>,
    /// Bytes by start, lane and step.
    came: BTreeMap<(usize, &'static str, u64), u64>,
}

impl<'a> Perfetto<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        let (slots, lines, came) = (Slots::default(), BTreeMap::new(), BTreeMap::new());
        Self { out, begun: false, first_began_at: None, shift_ns: 0, start: 0, slots, lines, came }
    }

    fn packet(&mut self, mut packet: Packet) -> Result<(), ExportError> {
        packet.trusted_packet_sequence_id = Some(SEQUENCE);
        if !self.begun {
            packet.sequence_flags = Some(STATE_CLEARED);
            self.begun = true;
        }
        // A trace is a message with packets only: written one at a time it is the same bytes.
        Ok(self.out.write_all(&Packets { packet: vec![packet] }.encode_to_vec())?)
    }

    /// Number of a track, described when it is new.
    fn line(&mut self, line: Line, descriptor: TrackDescriptor) -> Result<u64, ExportError> {
        if let Some(uuid) = self.lines.get(&line) {
            return Ok(*uuid);
        }
        let uuid = self.lines.len() as u64 + 1;
        self.lines.insert(line, uuid);
        let descriptor = TrackDescriptor { uuid: Some(uuid), ..descriptor };
        self.packet(Packet { track_descriptor: Some(descriptor), ..Packet::default() })?;
        Ok(uuid)
    }

    fn group(&self) -> Option<u64> {
        self.lines.get(&Line::Group(self.start)).copied()
    }

    /// The track that an item is drawn on; `None` if there is none where nothing overlaps it.
    fn track_of(&mut self, item: &Item, row: &Row<'_>) -> Result<Option<u64>, ExportError> {
        let start = self.start;
        if let Track::Thread { pid, tid } = item.track {
            let number = |id: u32| Some(i32::try_from(id).unwrap_or(i32::MAX));
            let name = row.process.map(str::to_owned);
            let process = ProcessDescriptor { pid: number(pid), process_name: name.clone() };
            let process = TrackDescriptor { process: Some(process), ..TrackDescriptor::default() };
            let parent_uuid = Some(self.line(Line::Process(pid), process)?);
            let thread = ThreadDescriptor { pid: number(pid), tid: number(tid), thread_name: name };
            let thread = TrackDescriptor { thread: Some(thread), parent_uuid, ..TrackDescriptor::default() };
            return self.line(Line::Thread(pid, tid), thread).map(Some);
        }
        let named = |name: String, parent_uuid| TrackDescriptor {
            name: Some(name),
            parent_uuid,
            ..TrackDescriptor::default()
        };
        let group = self.group();
        let parent = self.line(Line::Track(start, item.track.clone()), named(item.track.name(), group))?;
        if matches!(item.track, Track::Step(_) | Track::Start) {
            return Ok(Some(parent));
        }
        let Some(slot) = self.slots.find(start, item) else { return Ok(None) };
        let line = Line::Slot(start, item.track.clone(), slot);
        self.line(line, named(format!("{} {slot}", item.track.name()), Some(parent))).map(Some)
    }

    fn event(&mut self, at_ns: u64, event: TrackEvent) -> Result<(), ExportError> {
        let timestamp = Some(at_ns.saturating_add(self.shift_ns));
        self.packet(Packet { timestamp, track_event: Some(event), ..Packet::default() })
    }

    /// Spreads what a fetch brought over its time.
    fn count(&mut self, row: &Row<'_>) {
        let (Some(lane), Some(len), Some(took)) = (row.lane, row.length, row.duration_ns) else { return };
        let from = row.time_ns.saturating_add(row.first_byte_ns.unwrap_or(0).min(took));
        let (first, last) = (from / STEP_NS, row.time_ns.saturating_add(took) / STEP_NS);
        let last = last.min(MAX_STEPS);
        if first > last {
            return;
        }
        let each = len / (last - first + 1);
        for step in first..=last {
            *self.came.entry((self.start, lane, step)).or_default() += each;
        }
    }

    fn bandwidth(&mut self) -> Result<(), ExportError> {
        let came = std::mem::take(&mut self.came);
        let mut open: Option<(usize, &'static str, u64)> = None;
        for ((start, lane, step), bytes) in came {
            let name = Some(format!("bandwidth: {lane}"));
            let unit_name = Some("bytes/s".to_owned());
            let counter = Some(CounterDescriptor { unit_name });
            let descriptor =
                TrackDescriptor { name, counter, parent_uuid: self.group(), ..TrackDescriptor::default() };
            let uuid = self.line(Line::Bandwidth(start, lane), descriptor)?;
            let value = |bytes: u64| TrackEvent {
                r#type: Some(Kind::Counter as i32),
                track_uuid: Some(uuid),
                counter_value: Some(
                    i64::try_from(bytes.saturating_mul(1_000_000_000 / STEP_NS)).unwrap_or(i64::MAX),
                ),
                ..TrackEvent::default()
            };
            if let Some((.., before)) =
                open.filter(|(one, other, at)| (*one, *other) == (start, lane) && at + 1 < step)
            {
                self.event((before + 1) * STEP_NS, value(0))?;
            }
            self.event(step * STEP_NS, value(bytes))?;
            open = Some((start, lane, step));
        }
        Ok(())
    }
}

impl Sink for Perfetto<'_> {
    fn begin(&mut self, start: &Start) -> Result<(), ExportError> {
        self.bandwidth()?;
        let first = *self.first_began_at.get_or_insert(start.header.began_at);
        self.shift_ns = start.header.began_at.saturating_sub(first).saturating_mul(1_000_000_000);
        self.start = start.number;
        let name = format!("sluice: {} `{}`", start.header.reference, start.header.entry);
        self.line(
            Line::Group(start.number),
            TrackDescriptor { name: Some(name), ..TrackDescriptor::default() },
        )?;
        Ok(())
    }

    fn row(&mut self, row: &Row<'_>) -> Result<(), ExportError> {
        if row.record == "fetch" {
            self.count(row);
        }
        let Some(item) = tracks::item(row) else { return Ok(()) };
        let track = self.track_of(&item, row)?;
        let duration = item.duration_ns.filter(|_| track.is_some());
        let annotation = |(name, value): (&str, Argument<'_>)| {
            let name = Some(name.to_owned());
            match value {
                Argument::Number(number) => {
                    DebugAnnotation { name, uint_value: Some(number), string_value: None }
                }
                Argument::Text(text) => {
                    DebugAnnotation { name, string_value: Some(text.to_owned()), uint_value: None }
                }
            }
        };
        let kind = if duration.is_some() { Kind::SliceBegin } else { Kind::Instant };
        let track = match track {
            Some(track) => Some(track),
            None => self.lines.get(&Line::Track(self.start, item.track.clone())).copied(),
        };
        let begin = TrackEvent {
            r#type: Some(kind as i32),
            track_uuid: track,
            categories: vec![item.category.to_owned()],
            name: Some(item.name),
            debug_annotations: tracks::arguments(row).into_iter().map(annotation).collect(),
            counter_value: None,
        };
        self.event(item.begin_ns, begin)?;
        if let Some(duration) = duration {
            let end = TrackEvent {
                r#type: Some(Kind::SliceEnd as i32),
                track_uuid: track,
                ..TrackEvent::default()
            };
            self.event(item.begin_ns.saturating_add(duration), end)?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        self.bandwidth()?;
        Ok(self.out.flush()?)
    }
}
