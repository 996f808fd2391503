//! Parquet: row groups of plain, zstd-compressed pages, one page per column, and the footer that describes them.
//!
//! Only what this schema needs of the format (github.com/apache/parquet-format): flat columns, version 1 data pages. The
//! descriptions are in Thrift's compact protocol ([`Thrift`]). One row group is held at a time.

use std::io::{self, Write};

use crate::row::{COLUMNS, Cell, Column, Row, Start, Type};
use crate::{ExportError, Sink};

const MAGIC: &[u8; 4] = b"PAR1";
/// Rows held until they are written: about 8 MiB of them.
const GROUP_ROWS: usize = 20_000;
const ZSTD_LEVEL: i32 = 3;

// Numbers of the format's enumerations.
const DATA_PAGE: i64 = 0;
const PLAIN: i64 = 0;
const RLE: i64 = 3;
const ZSTD: i64 = 6;

/// Thrift's compact protocol, written.
#[derive(Debug, Default)]
struct Thrift {
    bytes: Vec<u8>,
    /// The last field of each structure that is open.
    fields: Vec<i16>,
}

impl Thrift {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push((number & 0x7F) as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }

    fn zigzag(&mut self, number: i64) {
        self.varint((number.wrapping_shl(1) ^ (number >> 63)) as u64);
    }

    fn open(&mut self) {
        self.fields.push(0);
    }

    fn close(&mut self) {
        self.fields.pop();
        self.bytes.push(0);
    }

    fn field(&mut self, id: i16, kind: u8) {
        let last = self.fields.last_mut();
        let delta = last.map_or(id, |last| id - std::mem::replace(last, id));
        self.bytes.push((delta as u8) << 4 | kind);
    }

    fn int32(&mut self, id: i16, number: i64) {
        self.field(id, 5);
        self.zigzag(number);
    }

    fn int64(&mut self, id: i16, number: i64) {
        self.field(id, 6);
        self.zigzag(number);
    }

    fn text(&mut self, id: i16, text: &str) {
        self.field(id, 8);
        self.string(text);
    }

    fn string(&mut self, text: &str) {
        self.varint(text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn list(&mut self, id: i16, kind: u8, len: usize) {
        self.field(id, 9);
        if len < 15 {
            self.bytes.push((len as u8) << 4 | kind);
        } else {
            self.bytes.push(0xF0 | kind);
            self.varint(len as u64);
        }
    }

    fn structure(&mut self, id: i16) {
        self.field(id, 12);
        self.open();
    }
}

/// One column of the open row group.
#[derive(Debug, Default)]
struct Values {
    bytes: Vec<u8>,
    /// Runs of present or absent values, where a column is optional.
    runs: Vec<(bool, u64)>,
    /// Bits of flags that do not fill a byte yet, and how many.
    bits: (u8, u32),
}

impl Values {
    fn push(&mut self, column: Column, cell: Cell<'_>) {
        let present = cell != Cell::Null;
        if column.optional {
            match self.runs.last_mut() {
                Some((last, count)) if *last == present => *count += 1,
                _ => self.runs.push((present, 1)),
            }
        }
        match cell {
            Cell::Null => {}
            Cell::Text(text) => {
                self.bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
                self.bytes.extend_from_slice(text.as_bytes());
            }
            Cell::Number(number) => self.bytes.extend_from_slice(&number.to_le_bytes()),
            Cell::Small(number) => self.bytes.extend_from_slice(&number.to_le_bytes()),
            Cell::Flag(flag) => {
                self.bits.0 |= u8::from(flag) << self.bits.1;
                self.bits.1 += 1;
                if self.bits.1 == 8 {
                    self.bytes.push(self.bits.0);
                    self.bits = (0, 0);
                }
            }
        }
    }

    /// The page's content: which values are there, then those.
    fn page(&mut self, column: Column) -> Vec<u8> {
        if self.bits.1 > 0 {
            self.bytes.push(self.bits.0);
        }
        let mut page = Vec::new();
        if column.optional {
            let mut levels = Thrift::default();
            for (present, count) in &self.runs {
                levels.varint(count << 1);
                levels.bytes.push(u8::from(*present));
            }
            page.extend_from_slice(&(levels.bytes.len() as u32).to_le_bytes());
            page.extend_from_slice(&levels.bytes);
        }
        page.append(&mut self.bytes);
        *self = Self::default();
        page
    }
}

/// A column of a written row group: where it begins, its bytes and those before compression.
type Chunk = (u64, u64, u64);

/// See the module text.
pub(crate) struct Parquet<'a> {
    out: &'a mut dyn Write,
    at: u64,
    rows: usize,
    all_rows: u64,
    columns: Vec<Values>,
    groups: Vec<(u64, Vec<Chunk>)>,
}

impl<'a> Parquet<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        let columns = COLUMNS.iter().map(|_| Values::default()).collect();
        Ok(Self { out, at: MAGIC.len() as u64, rows: 0, all_rows: 0, columns, groups: Vec::new() })
    }

    fn write_group(&mut self) -> Result<(), ExportError> {
        if self.rows == 0 {
            return Ok(());
        }
        let mut chunks = Vec::new();
        for (values, column) in self.columns.iter_mut().zip(COLUMNS) {
            let page = values.page(column);
            let packed = zstd::bulk::compress(&page, ZSTD_LEVEL)?;
            let header = page_header(self.rows, page.len(), packed.len());
            self.out.write_all(&header)?;
            self.out.write_all(&packed)?;
            let (plain, len) = ((header.len() + page.len()) as u64, (header.len() + packed.len()) as u64);
            chunks.push((self.at, len, plain));
            self.at += len;
        }
        self.groups.push((self.rows as u64, chunks));
        self.all_rows += self.rows as u64;
        self.rows = 0;
        Ok(())
    }
}

impl Sink for Parquet<'_> {
    fn begin(&mut self, _: &Start) -> Result<(), ExportError> {
        Ok(())
    }

    fn row(&mut self, row: &Row<'_>) -> Result<(), ExportError> {
        for ((values, column), cell) in self.columns.iter_mut().zip(COLUMNS).zip(row.cells()) {
            values.push(column, cell);
        }
        self.rows += 1;
        if self.rows >= GROUP_ROWS { self.write_group() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        self.write_group()?;
        let footer = footer(self.all_rows, &self.groups);
        self.out.write_all(&footer)?;
        self.out.write_all(&(footer.len() as u32).to_le_bytes())?;
        self.out.write_all(MAGIC)?;
        Ok(self.out.flush()?)
    }
}

/// `PageHeader`.
fn page_header(rows: usize, plain: usize, packed: usize) -> Vec<u8> {
    let mut out = Thrift::default();
    out.open();
    out.int32(1, DATA_PAGE);
    out.int32(2, plain as i64);
    out.int32(3, packed as i64);
    out.structure(5);
    out.int32(1, rows as i64);
    out.int32(2, PLAIN);
    out.int32(3, RLE);
    out.int32(4, RLE);
    out.close();
    out.close();
    out.bytes
}

/// Physical type, and converted type of a column.
fn types(column: Column) -> (i64, Option<i64>) {
    match column.kind {
        Type::Text => (6, Some(0)),
        Type::Number => (2, Some(14)),
        Type::Small => (1, Some(13)),
        Type::Flag => (0, None),
    }
}

/// `FileMetaData`.
fn footer(rows: u64, groups: &[(u64, Vec<Chunk>)]) -> Vec<u8> {
    let mut out = Thrift::default();
    out.open();
    out.int32(1, 1);
    out.list(2, 12, COLUMNS.len() + 1);
    out.open();
    out.text(4, "start");
    out.int32(5, COLUMNS.len() as i64);
    out.close();
    for column in COLUMNS {
        let (physical, converted) = types(column);
        out.open();
        out.int32(1, physical);
        out.int32(3, i64::from(column.optional));
        out.text(4, column.name);
        if let Some(converted) = converted {
            out.int32(6, converted);
        }
        out.close();
    }
    out.int64(3, rows as i64);
    out.list(4, 12, groups.len());
    for (rows, chunks) in groups {
        row_group(&mut out, *rows, chunks);
    }
    out.text(6, concat!("sluice ", env!("CARGO_PKG_VERSION")));
    out.close();
    out.bytes
}

/// `RowGroup`.
fn row_group(out: &mut Thrift, rows: u64, chunks: &[Chunk]) {
    out.open();
    out.list(1, 12, chunks.len());
    for ((at, len, plain), column) in chunks.iter().zip(COLUMNS) {
        out.open();
        out.int64(2, *at as i64);
        out.structure(3);
        out.int32(1, types(column).0);
        out.list(2, 5, 2);
        out.zigzag(PLAIN);
        out.zigzag(RLE);
        out.list(3, 8, 1);
        out.string(column.name);
        out.int32(4, ZSTD);
        out.int64(5, rows as i64);
        out.int64(6, *plain as i64);
        out.int64(7, *len as i64);
        out.int64(9, *at as i64);
        out.close();
        out.close();
    }
    out.int64(2, chunks.iter().map(|(.., plain)| *plain as i64).sum());
    out.int64(3, rows as i64);
    out.close();
}
