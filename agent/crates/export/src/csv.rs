//! CSV as RFC 4180 has it, but for line ends, with a header: what a row does not have is an empty field.

use std::io::Write;

use crate::row::{COLUMNS, Cell, Row, Start};
use crate::{ExportError, Sink};

pub(crate) struct Csv<'a>(&'a mut dyn Write);

impl<'a> Csv<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Result<Self, ExportError> {
        let names: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
        writeln!(out, "{}", names.join(","))?;
        Ok(Self(out))
    }
}

impl Sink for Csv<'_> {
    fn begin(&mut self, _: &Start) -> Result<(), ExportError> {
        Ok(())
    }

    fn row(&mut self, row: &Row<'_>) -> Result<(), ExportError> {
        for (number, cell) in row.cells().into_iter().enumerate() {
            if number > 0 {
                self.0.write_all(b",")?;
            }
            match cell {
                Cell::Null => {}
                Cell::Text(text) => field(self.0, text)?,
                Cell::Number(number) => write!(self.0, "{number}")?,
                Cell::Small(number) => write!(self.0, "{number}")?,
                Cell::Flag(flag) => write!(self.0, "{flag}")?,
            }
        }
        Ok(self.0.write_all(b"\n")?)
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        Ok(self.0.flush()?)
    }
}

fn field(out: &mut dyn Write, text: &str) -> std::io::Result<()> {
    if text.contains([',', '"', '\n', '\r']) {
        write!(out, "\"{}\"", text.replace('"', "\"\""))
    } else {
        out.write_all(text.as_bytes())
    }
}
