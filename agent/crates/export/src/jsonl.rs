//! JSON Lines: one object per row; what a row does not have is null.

use std::io::Write;

use crate::row::{Row, Start};
use crate::{ExportError, Sink};

pub(crate) struct Jsonl<'a>(&'a mut dyn Write);

impl<'a> Jsonl<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        Self(out)
    }
}

impl Sink for Jsonl<'_> {
    fn begin(&mut self, _: &Start) -> Result<(), ExportError> {
        Ok(())
    }

    fn row(&mut self, row: &Row<'_>) -> Result<(), ExportError> {
        serde_json::to_writer(&mut *self.0, row)?;
        Ok(self.0.write_all(b"\n")?)
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        Ok(self.0.flush()?)
    }
}
