//! Chrome's trace event format (JSON). What overlaps is asynchronous slices (`b`, `e`) with an id each; what a thread does is complete
//! slices (`X`). Times are microseconds since the first start's beginning.

use std::collections::BTreeSet;
use std::io::Write;

use serde_json::{Map, Value, json};

use crate::row::{Row, Start};
use crate::tracks::{self, Argument, Item, Track};
use crate::{ExportError, Sink};

/// Number of the first start's group; above all process numbers (`PID_MAX_LIMIT` of Linux is 2^22).
const GROUPS: u64 = 1 << 23;

pub(crate) struct Chrome<'a> {
    out: &'a mut dyn Write,
    begun: bool,
    first_began_at: Option<u64>,
    shift_ns: u64,
    start: usize,
    named: BTreeSet<(u64, u64)>,
    next_id: u64,
}

impl<'a> Chrome<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        let named = BTreeSet::new();
        Self { out, begun: false, first_began_at: None, shift_ns: 0, start: 0, named, next_id: 1 }
    }

    fn event(&mut self, event: &Value) -> Result<(), ExportError> {
        self.out.write_all(if self.begun {
            b",\n"
        } else {
            b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n"
        })?;
        self.begun = true;
        Ok(serde_json::to_writer(&mut *self.out, event)?)
    }

    /// Process and thread of a track, named when they are new.
    fn place(&mut self, track: &Track, row: &Row<'_>) -> Result<(u64, u64), ExportError> {
        let (pid, tid) = match track {
            Track::Thread { pid, tid } => (u64::from(*pid), u64::from(*tid)),
            _ => (GROUPS + self.start as u64, number_of(track)),
        };
        if self.named.insert((pid, tid)) {
            let own = matches!(track, Track::Thread { .. });
            let name = if own { row.process.unwrap_or("?").to_owned() } else { track.name() };
            self.event(&json!({ "ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": { "name": name } }))?;
            if own && self.named.insert((pid, u64::MAX)) {
                self.event(
                    &json!({ "ph": "M", "pid": pid, "name": "process_name", "args": { "name": name } }),
                )?;
            }
        }
        Ok((pid, tid))
    }

    fn slice(&mut self, item: &Item, place: (u64, u64), arguments: Value) -> Result<(), ExportError> {
        let (pid, tid) = place;
        let at = |ns: u64| ns.saturating_add(self.shift_ns) as f64 / 1000.0;
        let begin = at(item.begin_ns);
        let mut event = json!({ "name": item.name, "cat": item.category, "pid": pid, "tid": tid, "ts": begin, "args": arguments });
        let Some(duration) = item.duration_ns else {
            set(&mut event, "ph", "i");
            set(&mut event, "s", "t");
            return self.event(&event);
        };
        if matches!(item.track, Track::Thread { .. }) {
            set(&mut event, "ph", "X");
            set(&mut event, "dur", duration as f64 / 1000.0);
            return self.event(&event);
        }
        let end = at(item.begin_ns.saturating_add(duration));
        set(&mut event, "ph", "b");
        set(&mut event, "id", format!("{:#x}", self.next_id));
        self.event(&event)?;
        set(&mut event, "ph", "e");
        set(&mut event, "ts", end);
        set(&mut event, "args", json!({}));
        self.next_id += 1;
        self.event(&event)
    }
}

impl Sink for Chrome<'_> {
    fn begin(&mut self, start: &Start) -> Result<(), ExportError> {
        let first = *self.first_began_at.get_or_insert(start.header.began_at);
        self.shift_ns = start.header.began_at.saturating_sub(first).saturating_mul(1_000_000_000);
        self.start = start.number;
        let name = format!("sluice: {} `{}`", start.header.reference, start.header.entry);
        let pid = GROUPS + start.number as u64;
        self.event(&json!({ "ph": "M", "pid": pid, "name": "process_name", "args": { "name": name } }))
    }

    fn row(&mut self, row: &Row<'_>) -> Result<(), ExportError> {
        let Some(item) = tracks::item(row) else { return Ok(()) };
        let place = self.place(&item.track, row)?;
        let arguments: Map<String, Value> = tracks::arguments(row)
            .into_iter()
            .map(|(name, value)| {
                let value = match value {
                    Argument::Number(number) => number.into(),
                    Argument::Text(text) => text.into(),
                };
                (name.to_owned(), value)
            })
            .collect();
        self.slice(&item, place, arguments.into())
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        self.out.write_all(if self.begun { b"\n]}\n" } else { b"{\"traceEvents\":[]}\n" })?;
        Ok(self.out.flush()?)
    }
}

fn set(event: &mut Value, name: &str, value: impl Into<Value>) {
    if let Value::Object(fields) = event {
        fields.insert(name.to_owned(), value.into());
    }
}

fn number_of(track: &Track) -> u64 {
    let name = track.name();
    // Small and stable: names are few.
    u64::from(name.bytes().fold(7_u16, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into())))
}
