//! One row per record: the schema that Parquet, JSON Lines and CSV share, and from which the timelines are drawn.

use std::borrow::Cow;

use serde::Serialize;
use sluice_trace::{AccessKind, FailedCall, Failure, Header, Places, Record, What};

/// A start that is exported.
#[derive(Debug)]
pub(crate) struct Start {
    /// Number in this export, from 0.
    pub(crate) number: usize,
    /// Its name: stable over exports.
    pub(crate) id: String,
    pub(crate) header: Header,
}

/// One row. Names are those of the columns; docs/traces.md says what each is.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Row<'a> {
    pub(crate) start: &'a str,
    pub(crate) image: &'a str,
    pub(crate) manifest_digest: &'a str,
    pub(crate) entry: &'a str,
    pub(crate) kernel: &'a str,
    pub(crate) container: &'a str,
    pub(crate) began_at: u64,
    pub(crate) record: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) time_ns: u64,
    pub(crate) duration_ns: Option<u64>,
    pub(crate) level: Option<&'static str>,
    pub(crate) lane: Option<&'static str>,
    pub(crate) layer: Option<u32>,
    pub(crate) layer_digest: Option<&'a str>,
    pub(crate) layer_offset: Option<u64>,
    pub(crate) path: Option<Cow<'a, str>>,
    pub(crate) offset: Option<u64>,
    pub(crate) length: Option<u64>,
    pub(crate) inode: Option<u64>,
    pub(crate) pid: Option<u32>,
    pub(crate) tid: Option<u32>,
    pub(crate) process: Option<&'a str>,
    pub(crate) cgroup: Option<u64>,
    pub(crate) errno: Option<u32>,
    pub(crate) file_type: Option<Cow<'a, str>>,
    pub(crate) new_path: Option<Cow<'a, str>>,
    pub(crate) first_byte_ns: Option<u64>,
    pub(crate) whole: Option<bool>,
}

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Text,
    Number,
    Small,
    Flag,
}

/// A column.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) kind: Type,
    /// Not every row has it.
    pub(crate) optional: bool,
}

/// What a row has in a column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Cell<'a> {
    Null,
    Text(&'a str),
    Number(u64),
    Small(u32),
    Flag(bool),
}

const fn column(name: &'static str, kind: Type, optional: bool) -> Column {
    Column { name, kind, optional }
}

/// The columns, in the order of [`Row`]'s fields.
pub(crate) const COLUMNS: [Column; 29] = [
    column("start", Type::Text, false),
    column("image", Type::Text, false),
    column("manifest_digest", Type::Text, false),
    column("entry", Type::Text, false),
    column("kernel", Type::Text, false),
    column("container", Type::Text, false),
    column("began_at", Type::Number, false),
    column("record", Type::Text, false),
    column("kind", Type::Text, false),
    column("time_ns", Type::Number, false),
    column("duration_ns", Type::Number, true),
    column("level", Type::Text, true),
    column("lane", Type::Text, true),
    column("layer", Type::Small, true),
    column("layer_digest", Type::Text, true),
    column("layer_offset", Type::Number, true),
    column("path", Type::Text, true),
    column("offset", Type::Number, true),
    column("length", Type::Number, true),
    column("inode", Type::Number, true),
    column("pid", Type::Small, true),
    column("tid", Type::Small, true),
    column("process", Type::Text, true),
    column("cgroup", Type::Number, true),
    column("errno", Type::Small, true),
    column("file_type", Type::Text, true),
    column("new_path", Type::Text, true),
    column("first_byte_ns", Type::Number, true),
    column("whole", Type::Flag, true),
];

impl Row<'_> {
    /// What the row has in each of [`COLUMNS`].
    pub(crate) fn cells(&self) -> [Cell<'_>; 29] {
        [
            Cell::Text(self.start),
            Cell::Text(self.image),
            Cell::Text(self.manifest_digest),
            Cell::Text(self.entry),
            Cell::Text(self.kernel),
            Cell::Text(self.container),
            Cell::Number(self.began_at),
            Cell::Text(self.record),
            Cell::Text(self.kind),
            Cell::Number(self.time_ns),
            self.duration_ns.map_or(Cell::Null, Cell::Number),
            self.level.map_or(Cell::Null, Cell::Text),
            self.lane.map_or(Cell::Null, Cell::Text),
            self.layer.map_or(Cell::Null, Cell::Small),
            self.layer_digest.map_or(Cell::Null, Cell::Text),
            self.layer_offset.map_or(Cell::Null, Cell::Number),
            self.path.as_deref().map_or(Cell::Null, Cell::Text),
            self.offset.map_or(Cell::Null, Cell::Number),
            self.length.map_or(Cell::Null, Cell::Number),
            self.inode.map_or(Cell::Null, Cell::Number),
            self.pid.map_or(Cell::Null, Cell::Small),
            self.tid.map_or(Cell::Null, Cell::Small),
            self.process.map_or(Cell::Null, Cell::Text),
            self.cgroup.map_or(Cell::Null, Cell::Number),
            self.errno.map_or(Cell::Null, Cell::Small),
            self.file_type.as_deref().map_or(Cell::Null, Cell::Text),
            self.new_path.as_deref().map_or(Cell::Null, Cell::Text),
            self.first_byte_ns.map_or(Cell::Null, Cell::Number),
            self.whole.map_or(Cell::Null, Cell::Flag),
        ]
    }
}

/// Makes rows of one start's records.
#[derive(Debug)]
pub(crate) struct Rows {
    start: Start,
    places: Places,
}

impl Rows {
    pub(crate) fn new(header: &Header, number: usize) -> Self {
        let start = Start { number, id: start_id(header), header: header.clone() };
        Self { start, places: Places::default() }
    }

    pub(crate) fn start(&self) -> &Start {
        &self.start
    }

    /// The record's row; a description of a file has none.
    pub(crate) fn next<'a>(&'a mut self, record: &'a Record) -> Option<Row<'a>> {
        self.places.see(&record.what);
        let header = &self.start.header;
        let mut row = Row {
            start: &self.start.id,
            image: &header.reference,
            manifest_digest: &header.image,
            entry: &header.entry,
            kernel: &header.kernel,
            container: &header.container,
            began_at: header.began_at,
            time_ns: record.time_ns.saturating_sub(header.began_ns),
            ..Row::default()
        };
        let who = &record.process;
        if who.tgid != 0 {
            (row.pid, row.tid) = (Some(who.tgid), Some(who.pid));
            (row.process, row.cgroup) = (Some(who.comm.as_str()), Some(who.cgroup));
        }
        fill(&mut row, &record.what)?;
        if let Some((place, offset)) = self.places.of(&record.what) {
            let begins = place.offset.saturating_add(offset);
            row.layer = row.layer.or(Some(place.layer));
            row.layer_offset = row.layer_offset.or(Some(begins));
            row.offset = row.offset.or(Some(offset));
            row.path = Some(text(&place.path));
        }
        row.layer_digest =
            row.layer.and_then(|layer| header.layers.get(layer as usize)).map(|layer| layer.digest.as_str());
        Some(row)
    }
}

/// What of a row follows from the record alone.
fn fill<'a>(row: &mut Row<'a>, what: &'a What) -> Option<()> {
    (row.record, row.kind) = names(what)?;
    match what {
        What::Open { inode } => row.inode = Some(*inode),
        What::Exec { inode, path } => {
            row.inode = Some(*inode);
            row.new_path = Some(String::from_utf8_lossy(path));
        }
        What::Access { inode, offset, len, .. } => {
            (row.inode, row.offset, row.length) = (Some(*inode), Some(*offset), Some(*len));
        }
        What::Blocked { inode, offset, blocked_ns } => {
            (row.inode, row.offset, row.duration_ns) = (Some(*inode), Some(*offset), Some(*blocked_ns));
            // The record's time is that of waking.
            row.time_ns = row.time_ns.saturating_sub(*blocked_ns);
        }
        What::Failed(call) => failed(row, call),
        What::Served { layer, offset, len, service_ns, from } => {
            (row.layer, row.layer_offset, row.length) = (Some(*layer), Some(*offset), Some(*len));
            (row.duration_ns, row.level) = (Some(*service_ns), Some(from.name()));
        }
        What::Ready => {}
        What::Phase { took_ns, .. } => row.duration_ns = Some(*took_ns),
        What::Fetch { lane, layer, offset, len, first_byte_ns, took_ns, whole } => {
            (row.lane, row.layer, row.offset) = (Some(lane.name()), *layer, Some(*offset));
            (row.length, row.duration_ns) = (Some(*len), Some(*took_ns));
            (row.first_byte_ns, row.whole) = (Some(*first_byte_ns), Some(*whole));
        }
        What::Brought { lane, layer, offset, len } => {
            (row.lane, row.layer) = (Some(lane.name()), Some(*layer));
            (row.layer_offset, row.length) = (Some(*offset), Some(*len));
        }
        _ => return None,
    }
    Some(())
}

/// Record and kind.
fn names(what: &What) -> Option<(&'static str, &'static str)> {
    Some(match what {
        What::Open { .. } => ("open", ""),
        What::Exec { .. } => ("exec", ""),
        What::Access { kind, .. } => (
            "access",
            match kind {
                AccessKind::Read => "read",
                AccessKind::Fault => "fault",
                AccessKind::Around => "around",
                AccessKind::Fill => "fill",
            },
        ),
        What::Blocked { .. } => ("blocked", ""),
        What::Failed(call) => ("failed", call.name()),
        What::Served { .. } => ("read", ""),
        What::Ready => ("ready", ""),
        What::Phase { phase, .. } => ("phase", phase.name()),
        What::Fetch { .. } => ("fetch", ""),
        What::Brought { .. } => ("brought", ""),
        _ => return None,
    })
}

fn failed<'a>(row: &mut Row<'a>, call: &'a FailedCall) {
    let failure = Failure::of(call);
    row.errno = Some(call.errno);
    row.inode = call.inode;
    row.path = Some(text(&call.path));
    row.new_path = Some(String::from_utf8_lossy(&call.new_path));
    row.file_type = Some(Cow::Owned(failure.file_type));
}

fn text(path: &[u8]) -> Cow<'_, str> {
    Cow::Owned(format!("/{}", String::from_utf8_lossy(path)))
}

/// Names a start by what its header says, so that the same trace has the same name in all exports.
pub(crate) fn start_id(header: &Header) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [&header.image, &header.entry, &header.container, &header.kernel] {
        hasher.update(part.as_bytes());
        hasher.update(&[0]);
    }
    hasher.update(&header.began_at.to_le_bytes());
    hasher.update(&header.began_ns.to_le_bytes());
    hasher.finalize().to_hex().chars().take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_columns_are_the_same_schema() {
        let text = serde_json::to_string(&Row::default()).expect("JSON");
        let mut at = 0;
        for column in COLUMNS {
            let found = text.find(&format!("\"{}\":", column.name)).expect(column.name);
            assert!(found >= at, "{} stands elsewhere", column.name);
            at = found;
        }
        assert_eq!(text.matches("\":").count(), COLUMNS.len());
    }
}
