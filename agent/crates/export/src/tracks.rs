//! Rows as things on timelines: which track, from when to when. Reads and fetches overlap; each lane's are spread over as many
//! slots as that takes, so that in none of them two overlap.

use std::collections::BTreeMap;

use crate::row::Row;

/// Slots of a lane. What finds none is an instant.
const MAX_SLOTS: usize = 128;

/// A line of the timeline.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Track {
    /// A step: pull, mount, …
    Step(&'static str),
    /// Reads that the agent answered.
    Reads,
    /// A fetch lane.
    Lane(&'static str),
    /// A thread of the container.
    Thread { pid: u32, tid: u32 },
    /// The start as a whole.
    Start,
}

impl Track {
    /// As people read it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Step(name) => format!("step: {name}"),
            Self::Reads => "reads".to_owned(),
            Self::Lane(lane) => format!("fetch: {lane}"),
            Self::Thread { tid, .. } => format!("thread {tid}"),
            Self::Start => "start".to_owned(),
        }
    }
}

/// Something on a track.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Item {
    pub(crate) track: Track,
    pub(crate) name: String,
    pub(crate) category: &'static str,
    /// Nanoseconds since the start's beginning.
    pub(crate) begin_ns: u64,
    /// None: an instant.
    pub(crate) duration_ns: Option<u64>,
}

/// What a row is on a timeline; what merely arrived is nothing.
pub(crate) fn item(row: &Row<'_>) -> Option<Item> {
    let path = || row.path.as_deref().unwrap_or("?").to_owned();
    let thread = || row.pid.zip(row.tid).map_or(Track::Start, |(pid, tid)| Track::Thread { pid, tid });
    let (track, name) = match row.record {
        "phase" => (Track::Step(row.kind), row.kind.to_owned()),
        "read" => (Track::Reads, format!("{} ({})", path(), row.level.unwrap_or("?"))),
        "fetch" => (
            Track::Lane(row.lane.unwrap_or("?")),
            row.layer_digest.map_or("start pack".to_owned(), |digest| digest.chars().take(19).collect()),
        ),
        "blocked" => (thread(), format!("blocked: {}", path())),
        "access" => (thread(), format!("{}: {}", row.kind, path())),
        "open" | "exec" => (thread(), format!("{}: {}", row.record, path())),
        "failed" => (thread(), format!("{} failed: {}", row.kind, path())),
        "ready" => (Track::Start, "ready".to_owned()),
        _ => return None,
    };
    Some(Item { track, name, category: row.record, begin_ns: row.time_ns, duration_ns: row.duration_ns })
}

/// Numbers and texts that a row says besides, in a fixed order.
pub(crate) fn arguments<'a>(row: &'a Row<'_>) -> Vec<(&'static str, Argument<'a>)> {
    let numbers = [
        ("offset", row.offset),
        ("length", row.length),
        ("layer", row.layer.map(u64::from)),
        ("layer_offset", row.layer_offset),
        ("inode", row.inode),
        ("errno", row.errno.map(u64::from)),
        ("first_byte_ns", row.first_byte_ns),
    ];
    let texts = [
        ("path", row.path.as_deref()),
        ("level", row.level),
        ("layer_digest", row.layer_digest),
        ("new_path", row.new_path.as_deref()),
        ("file_type", row.file_type.as_deref()),
    ];
    let numbers = numbers.into_iter().filter_map(|(name, value)| Some((name, Argument::Number(value?))));
    let texts = texts.into_iter().filter_map(|(name, value)| Some((name, Argument::Text(value?))));
    numbers.chain(texts).collect()
}

/// See [`arguments`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Argument<'a> {
    Number(u64),
    Text(&'a str),
}

/// Finds slots.
#[derive(Debug, Default)]
pub(crate) struct Slots(BTreeMap<(usize, Track), Vec<u64>>);

impl Slots {
    /// The slot of an item of start number `start`, in which nothing overlaps it; `None`: there are too many at once.
    pub(crate) fn find(&mut self, start: usize, item: &Item) -> Option<usize> {
        let slots = self.0.entry((start, item.track.clone())).or_default();
        let end = item.begin_ns.saturating_add(item.duration_ns.unwrap_or(0));
        let free = slots.iter_mut().enumerate().find(|(_, until)| **until <= item.begin_ns);
        if let Some((number, until)) = free {
            *until = end;
            return Some(number);
        }
        (slots.len() < MAX_SLOTS).then(|| {
            slots.push(end);
            slots.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_in_a_slot() {
        let mut slots = Slots::default();
        let mut at = |begin_ns, duration| {
            let duration_ns = Some(duration);
            let item = Item { track: Track::Reads, name: String::new(), category: "", begin_ns, duration_ns };
            slots.find(0, &item)
        };
        assert_eq!([at(0, 10), at(5, 10), at(10, 1), at(11, 1), at(12, 100)], [0, 1, 0, 0, 0].map(Some));
        assert_eq!(at(13, 1), Some(2));
        let many: Vec<_> = (0..200).map(|_| at(1000, 5)).collect();
        assert_eq!(many.iter().filter(|slot| slot.is_none()).count(), 200 - MAX_SLOTS);
    }
}
