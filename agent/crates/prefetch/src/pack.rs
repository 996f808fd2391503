//! Start packs: one blob of chunks, and of parts of chunks, in the order in which a start touches them.
//!
//! | part | bytes |
//! |---|---|
//! | magic | `SLUICEPK` |
//! | version | 2, little-endian |
//! | zero | 2 |
//! | table length | 4, little-endian; compressed |
//! | table length | 4; plain |
//! | table | a zstd frame |
//! | frames | a zstd frame each, one behind the other |
//!
//! The table: count of layers (4), their SHA-256 digests (32 each), count of frames (4), then per frame its compressed length (4)
//! and count of items (4), then per item, in order over all frames: layer number (2), count of chaining values (2), length (4), the
//! chunk's store offset (8), which of the chunk's parts it has (8; 0: the whole chunk). A frame holds about 256 KiB of items, one
//! behind the other, each its chaining values (32 each) and then its bytes. Nothing of it is trusted: who takes a chunk compares its
//! digest, and parts are proved by it (`parts` of the image crate).

use std::cmp::Ordering;
use std::ops::Range;

use bytes::{Buf, Bytes};

const MAGIC: [u8; 8] = *b"SLUICEPK";
/// Version of the format.
pub const PACK_VERSION: u16 = 2;
const FIXED: usize = 20;
/// Frames are closed when they hold so much.
const FRAME: usize = 256 << 10;
/// Longest chunk accepted: the longest that an index has.
const MAX_CHUNK: usize = 4 << 20;
/// Chaining values that prove any parts of a chunk, and more: a chunk has 64 parts at most.
const MAX_PROOF: usize = 64;
/// Longest frame accepted: one that was about to be closed, and an item.
const MAX_FRAME: usize = FRAME + MAX_CHUNK + MAX_PROOF * size_of::<Value>();
const MAX_TABLE: usize = 32 << 20;
const MAX_LAYERS: usize = 16_000;
const ZSTD_LEVEL: i32 = 9;
/// Bytes of an item in the table.
const PLACE: usize = 24;

/// A chaining value.
type Value = [u8; 32];

/// Why a pack cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// It does not begin as packs do.
    #[error("this is no start pack")]
    NotAPack,
    /// Another version of the format.
    #[error("the start pack has version {0}, and this program reads version {PACK_VERSION}")]
    Version(u16),
    /// Something in it is not as the format has it.
    #[error("the start pack is damaged: {0}")]
    Damaged(&'static str),
    /// It ends before its end.
    #[error("the start pack was cut off")]
    CutOff,
    /// Compression failed.
    #[error("cannot compress")]
    Compress(#[source] std::io::Error),
}

/// A chunk of a pack, or parts of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// `sha256:…` of the layer blob.
    pub layer: String,
    /// Where the chunk stands in the layer's local file.
    pub store_offset: u64,
    /// Which parts of it these are: bit 0 is the first; 0 is the whole chunk.
    pub parts: u64,
    /// What proves them, if it is not the whole chunk.
    pub proof: Vec<Value>,
    /// All of them, one behind the other.
    pub bytes: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    layer: u16,
    proof: u16,
    len: u32,
    store_offset: u64,
    parts: u64,
}

impl Place {
    /// Bytes in the frame.
    fn size(&self) -> usize {
        usize::from(self.proof) * size_of::<Value>() + self.len as usize
    }
}

/// Makes a pack.
#[derive(Debug, Default)]
pub struct PackWriter {
    layers: Vec<[u8; 32]>,
    places: Vec<Place>,
    /// Compressed length and number of items of each frame.
    frames: Vec<(u32, u32)>,
    packed: Vec<u8>,
    open: Vec<u8>,
    in_open: u32,
}

impl PackWriter {
    /// Appends an item.
    pub fn push(&mut self, item: &Item) -> Result<(), PackError> {
        let digest = parse(&item.layer).ok_or(PackError::Damaged("a layer's digest is none"))?;
        if item.bytes.is_empty() || item.bytes.len() > MAX_CHUNK || item.proof.len() > MAX_PROOF {
            return Err(PackError::Damaged("a chunk is too long"));
        }
        let number = match self.layers.iter().position(|one| *one == digest) {
            Some(number) => number,
            None if self.layers.len() < MAX_LAYERS => {
                self.layers.push(digest);
                self.layers.len() - 1
            }
            None => return Err(PackError::Damaged("it has too many layers")),
        };
        self.places.push(Place {
            layer: number as u16,
            proof: item.proof.len() as u16,
            len: item.bytes.len() as u32,
            store_offset: item.store_offset,
            parts: item.parts,
        });
        item.proof.iter().for_each(|value| self.open.extend_from_slice(value));
        self.open.extend_from_slice(&item.bytes);
        self.in_open += 1;
        if self.open.len() >= FRAME { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), PackError> {
        if self.in_open == 0 {
            return Ok(());
        }
        let frame = zstd::bulk::compress(&self.open, ZSTD_LEVEL).map_err(PackError::Compress)?;
        self.frames.push((frame.len() as u32, self.in_open));
        self.packed.extend_from_slice(&frame);
        self.open.clear();
        self.in_open = 0;
        Ok(())
    }

    /// The pack.
    pub fn finish(mut self) -> Result<Vec<u8>, PackError> {
        self.close()?;
        let mut table = Vec::new();
        table.extend_from_slice(&(self.layers.len() as u32).to_le_bytes());
        self.layers.iter().for_each(|digest| table.extend_from_slice(digest));
        table.extend_from_slice(&(self.frames.len() as u32).to_le_bytes());
        for (len, items) in &self.frames {
            table.extend_from_slice(&len.to_le_bytes());
            table.extend_from_slice(&items.to_le_bytes());
        }
        for place in &self.places {
            table.extend_from_slice(&place.layer.to_le_bytes());
            table.extend_from_slice(&place.proof.to_le_bytes());
            table.extend_from_slice(&place.len.to_le_bytes());
            table.extend_from_slice(&place.store_offset.to_le_bytes());
            table.extend_from_slice(&place.parts.to_le_bytes());
        }
        if table.len() > MAX_TABLE {
            return Err(PackError::Damaged("its table is too long"));
        }
        let packed = zstd::bulk::compress(&table, ZSTD_LEVEL).map_err(PackError::Compress)?;
        let mut out = Vec::from(MAGIC);
        out.extend_from_slice(&PACK_VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        out.extend_from_slice(&(table.len() as u32).to_le_bytes());
        out.extend_from_slice(&packed);
        out.extend_from_slice(&self.packed);
        Ok(out)
    }
}

/// Bytes of a pack's beginning that hold the table of most.
pub const PACK_HEAD: u64 = 256 << 10;

/// What a pack holds, and where. What it is made from need not be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackTable {
    layers: Vec<String>,
    frames: Vec<PackFrame>,
}

/// Items that are compressed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackFrame {
    /// Where it stands in the blob.
    pub bytes: Range<u64>,
    places: Vec<Place>,
}

/// What a pack's beginning tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// So many bytes are needed.
    Needs(u64),
    /// All that is to be known.
    Table(PackTable),
}

impl PackTable {
    /// Reads the table from the beginning of a blob of `size` bytes, as far as it is there.
    pub fn parse(beginning: &[u8], size: u64) -> Result<Head, PackError> {
        let Some(mut fixed) = beginning.get(..FIXED) else {
            return if size < FIXED as u64 { Err(PackError::CutOff) } else { Ok(Head::Needs(FIXED as u64)) };
        };
        if fixed.get(..8) != Some(&MAGIC) {
            return Err(PackError::NotAPack);
        }
        fixed.advance(8);
        let version = fixed.get_u16_le();
        if version != PACK_VERSION {
            return Err(PackError::Version(version));
        }
        fixed.advance(2);
        let (packed, plain) = (fixed.get_u32_le() as usize, fixed.get_u32_le() as usize);
        if packed > MAX_TABLE || plain > MAX_TABLE {
            return Err(PackError::Damaged("its table is too long"));
        }
        let end = FIXED + packed;
        if size < end as u64 {
            return Err(PackError::CutOff);
        }
        let Some(frame) = beginning.get(FIXED..end) else { return Ok(Head::Needs(end as u64)) };
        let bytes = zstd::bulk::decompress(frame, plain)
            .map_err(|_damage| PackError::Damaged("its table does not decompress"))?;
        let table = parse_table(&bytes, end as u64)?;
        match table.frames.last().map_or(end as u64, |last| last.bytes.end).cmp(&size) {
            Ordering::Equal => Ok(Head::Table(table)),
            Ordering::Greater => Err(PackError::CutOff),
            Ordering::Less => Err(PackError::Damaged("something follows its end")),
        }
    }

    /// The frames, in order.
    pub fn frames(&self) -> &[PackFrame] {
        &self.frames
    }

    /// The items of a frame: layer's digest, the chunk's store offset, and which parts of it.
    pub fn items<'a>(&'a self, frame: &'a PackFrame) -> impl Iterator<Item = (&'a str, u64, u64)> {
        let layer = |place: &Place| self.layers.get(usize::from(place.layer)).map(String::as_str);
        frame.places.iter().filter_map(move |place| Some((layer(place)?, place.store_offset, place.parts)))
    }

    /// Decompresses a frame.
    pub fn unpack(&self, frame: &PackFrame, bytes: &[u8]) -> Result<Vec<Item>, PackError> {
        let size: usize = frame.places.iter().map(Place::size).sum();
        // Checked before any space is taken.
        if size > MAX_FRAME {
            return Err(PackError::Damaged("a frame is too long"));
        }
        let plain = zstd::bulk::decompress(bytes, size)
            .map_err(|_damage| PackError::Damaged("a frame does not decompress"))?;
        if plain.len() != size {
            return Err(PackError::Damaged("a frame has another length"));
        }
        let mut plain = Bytes::from(plain);
        let items = frame.places.iter().map(|place| {
            let layer = self.layers.get(usize::from(place.layer)).cloned();
            Ok(Item {
                layer: layer.ok_or(PackError::Damaged("a chunk is of no layer"))?,
                store_offset: place.store_offset,
                parts: place.parts,
                proof: values(&plain.split_to(place.size() - place.len as usize)),
                bytes: plain.split_to(place.len as usize),
            })
        });
        items.collect()
    }
}

fn values(bytes: &[u8]) -> Vec<Value> {
    bytes.chunks_exact(size_of::<Value>()).filter_map(|value| value.first_chunk().copied()).collect()
}

/// `start` is where frames begin.
fn parse_table(mut bytes: &[u8], start: u64) -> Result<PackTable, PackError> {
    let short = PackError::Damaged("its table is cut short");
    let layers =
        bytes.try_get_u32_le().map_err(|_short| PackError::Damaged("its table is cut short"))? as usize;
    let Some((digests, mut rest)) =
        layers.checked_mul(32).filter(|_| layers <= MAX_LAYERS).and_then(|len| bytes.split_at_checked(len))
    else {
        return Err(short);
    };
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let layers = digests.chunks_exact(32).map(|digest| format!("sha256:{}", hex(digest))).collect();
    let Ok(frames) = rest.try_get_u32_le() else { return Err(short) };
    let Some((frames, places)) = (frames as usize).checked_mul(8).and_then(|len| rest.split_at_checked(len))
    else {
        return Err(short);
    };
    if places.len() % PLACE != 0 {
        return Err(short);
    }
    let mut places = places.chunks_exact(PLACE).map(|mut record| Place {
        layer: record.get_u16_le(),
        proof: record.get_u16_le(),
        len: record.get_u32_le(),
        store_offset: record.get_u64_le(),
        parts: record.get_u64_le(),
    });
    let mut found = Vec::with_capacity(frames.len() / 8);
    let mut at = start;
    for mut frame in frames.chunks_exact(8) {
        let (packed, count) = (frame.get_u32_le(), frame.get_u32_le() as usize);
        if packed as usize > zstd::zstd_safe::compress_bound(MAX_FRAME) || count == 0 {
            return Err(PackError::Damaged("a frame is too long, or empty"));
        }
        let of_frame: Vec<Place> = places.by_ref().take(count).collect();
        if of_frame.len() != count {
            return Err(short);
        }
        let end = at.saturating_add(u64::from(packed));
        found.push(PackFrame { bytes: at..end, places: of_frame });
        at = end;
    }
    if places.next().is_some() {
        return Err(short);
    }
    Ok(PackTable { layers, frames: found })
}

fn parse(digest: &str) -> Option<[u8; 32]> {
    let hex = digest.strip_prefix("sha256:").filter(|hex| hex.len() == 64 && hex.is_ascii())?;
    let mut bytes = [0; 32];
    for (byte, place) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(hex.get(place..place + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(number: u8) -> String {
        format!("sha256:{}", format!("{number:02x}").repeat(32))
    }

    fn chunks() -> Vec<Item> {
        (0..40_u8)
            .map(|number| Item {
                layer: layer(number % 3),
                store_offset: u64::from(number) * 262_144,
                parts: u64::from(number % 2) * 0b101,
                proof: vec![[number; 32]; usize::from(number % 5)],
                bytes: (0..usize::from(number) * 5000 + 1)
                    .map(|at| (at * usize::from(number)) as u8)
                    .collect(),
            })
            .collect()
    }

    fn pack() -> Vec<u8> {
        let mut writer = PackWriter::default();
        for item in chunks() {
            writer.push(&item).expect("packed");
        }
        writer.finish().expect("packed")
    }

    /// Reads the table from ever longer beginnings, then frame by frame.
    fn read(pack: &[u8]) -> Result<Vec<Item>, PackError> {
        let mut beginning = 7_usize.min(pack.len());
        let table = loop {
            match PackTable::parse(&pack[..beginning], pack.len() as u64)? {
                Head::Table(table) => break table,
                Head::Needs(bytes) => beginning = usize::try_from(bytes).expect("fits"),
            }
        };
        let mut items = Vec::new();
        for frame in table.frames() {
            let range = frame.bytes.start as usize..frame.bytes.end as usize;
            let of_frame = table.unpack(frame, &pack[range])?;
            let places = of_frame.iter().map(|item| (item.layer.as_str(), item.store_offset, item.parts));
            assert!(table.items(frame).eq(places));
            items.extend(of_frame);
        }
        Ok(items)
    }

    #[test]
    fn what_goes_in_comes_out_in_order() {
        assert_eq!(read(&pack()).expect("read"), chunks());
        let empty = PackWriter::default().finish().expect("packed");
        assert_eq!(read(&empty).expect("read"), []);
    }

    #[test]
    fn what_is_no_pack_is_refused() {
        let whole = pack();
        assert!(matches!(read(&whole[..whole.len() - 1]), Err(PackError::CutOff)));
        assert!(matches!(read(&[whole.as_slice(), b"x"].concat()), Err(PackError::Damaged(_))));
        assert!(matches!(read(b"SLUICEPX0123456789ab"), Err(PackError::NotAPack)));
        let mut other = whole.clone();
        other[8] = 9;
        assert!(matches!(read(&other), Err(PackError::Version(9))));
        let of_no_layer = Item { layer: "sha256:xyz".to_owned(), ..chunks().swap_remove(1) };
        assert!(PackWriter::default().push(&of_no_layer).is_err());
    }

    #[test]
    fn damage_never_panics_and_takes_no_more_than_a_frame() {
        let whole = pack();
        for at in 0..whole.len().min(2000) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            drop(read(&damaged));
        }
        // A table that promises much.
        let table = [1_u32.to_le_bytes().as_slice(), &[7; 32], &u32::MAX.to_le_bytes()].concat();
        assert!(matches!(parse_table(&table, 0), Err(PackError::Damaged(_))));
    }
}
