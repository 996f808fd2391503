//! What an ELF file needs: its interpreter and its libraries, read from as few of its bytes as that takes.
//!
//! The bytes come from images and are not trusted: what makes no sense gives nothing. Files of 64 bits only.

use std::cell::RefCell;
use std::ops::Range;

use object::elf::{
    DT_NEEDED, DT_NULL, DT_RPATH, DT_RUNPATH, DT_STRTAB, ELFCLASS64, ELFMAG, FileHeader64, PT_LOAD,
};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};

/// Bytes asked for at once: header, program headers and most names are in one such piece.
const PIECE: u64 = 4096;
/// Longest part of a file that is read: its dynamic section.
const MAX_PART: u64 = 1 << 20;
/// Pieces of one file; more than that no linker scatters them.
const MAX_PIECES: usize = 64;
/// Libraries of one file, and directories it names.
const MAX_NAMES: usize = 128;

/// What is known of a file's bytes.
#[derive(Debug, Default)]
pub struct ElfBytes {
    size: u64,
    /// First byte, and the bytes.
    pieces: Vec<(u64, Vec<u8>)>,
    /// What was last looked for in vain.
    missing: RefCell<Option<Range<u64>>>,
}

/// What a look at a file gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Elf {
    /// These bytes of it are needed to tell.
    Wants(Range<u64>),
    /// What it needs.
    Needs(ElfNeeds),
    /// It is no ELF file, or is not understood.
    Nothing,
}

/// What the kernel and the dynamic linker will look for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ElfNeeds {
    /// Path of the interpreter.
    pub interpreter: Option<Vec<u8>>,
    /// `DT_NEEDED`: mostly base names.
    pub libraries: Vec<Vec<u8>>,
    /// `DT_RUNPATH` and `DT_RPATH`: directories, `$ORIGIN` not yet replaced.
    pub directories: Vec<Vec<u8>>,
}

impl ElfBytes {
    /// Of a file with `size` bytes nothing is known.
    pub fn new(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// These bytes stand at `offset`.
    pub fn add(&mut self, offset: u64, bytes: Vec<u8>) {
        self.pieces.push((offset, bytes));
    }

    /// What the file needs, as far as that is known.
    pub fn look(&self) -> Elf {
        self.missing.replace(None);
        match (self.needs(), self.missing.take()) {
            (_, Some(missing)) if self.pieces.len() < MAX_PIECES => Elf::Wants(missing),
            (Some(needs), None) => Elf::Needs(needs),
            _ => Elf::Nothing,
        }
    }

    fn needs(&self) -> Option<ElfNeeds> {
        let magic = self.read_bytes_at(0, 5).ok()?;
        if magic.strip_prefix(&ELFMAG) != Some(&[ELFCLASS64]) {
            return None;
        }
        let header = FileHeader64::<Endianness>::parse(self).ok()?;
        let endian = header.endian().ok()?;
        let segments = header.program_headers(endian, self).ok()?;
        let mut needs = ElfNeeds::default();
        for segment in segments {
            if let Ok(Some(path)) = segment.interpreter(endian, self) {
                needs.interpreter = Some(path.to_vec());
            }
        }
        let dynamic = segments.iter().find_map(|segment| segment.dynamic(endian, self).transpose());
        let Some(dynamic) = dynamic else { return Some(needs) };
        let dynamic = dynamic.ok()?;
        let value = |tag| dynamic.iter().find(|one| one.d_tag(endian) == tag);
        let names = value(DT_STRTAB).map(|table| table.d_val(endian))?;
        // Where the loader would have it.
        let names =
            segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD).find_map(|segment| {
                let at = names.checked_sub(segment.p_vaddr(endian))?;
                (at < segment.p_filesz(endian)).then(|| segment.p_offset(endian).checked_add(at))?
            })?;
        for one in dynamic {
            let list = match one.d_tag(endian) {
                DT_NEEDED => &mut needs.libraries,
                DT_RUNPATH | DT_RPATH => &mut needs.directories,
                DT_NULL => break,
                _ => continue,
            };
            let at = names.checked_add(one.d_val(endian))?;
            let name = self.read_bytes_at_until(at..self.size, 0).ok()?;
            list.extend(name.split(|byte| *byte == b':').map(<[u8]>::to_vec));
            if list.len() > MAX_NAMES {
                return None;
            }
        }
        Some(needs)
    }

    /// What is known from `offset` on.
    fn known(&self, offset: u64) -> impl Iterator<Item = &[u8]> {
        self.pieces
            .iter()
            .filter_map(move |(start, bytes)| bytes.get(usize::try_from(offset.checked_sub(*start)?).ok()?..))
    }

    fn wants(&self, offset: u64, size: u64) {
        let end = offset.saturating_add(size.max(PIECE)).min(self.size);
        self.missing.borrow_mut().get_or_insert(offset..end);
    }
}

impl<'a> ReadRef<'a> for &'a ElfBytes {
    fn len(self) -> Result<u64, ()> {
        Ok(self.size)
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        let end = offset.checked_add(size).ok_or(())?;
        if end > self.size || size > MAX_PART {
            return Err(());
        }
        let found = self.known(offset).find_map(|bytes| bytes.get(..size as usize));
        found.ok_or_else(|| self.wants(offset, size))
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        let found = self.known(range.start).find_map(|bytes| {
            let len = bytes.iter().position(|byte| *byte == delimiter)?;
            bytes.get(..len)
        });
        if let Some(found) = found {
            return Ok(found);
        }
        let longest = self.known(range.start).map(<[u8]>::len).max().unwrap_or(0) as u64;
        // A name that long is none.
        if range.start < self.size.min(range.end) && longest < PIECE.min(self.size - range.start) {
            self.wants(range.start, PIECE);
        }
        Err(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a file as if nothing of it were known, as often as it wants more.
    fn look(file: &[u8]) -> (Elf, usize) {
        let mut bytes = ElfBytes::new(file.len() as u64);
        loop {
            match bytes.look() {
                Elf::Wants(range) => {
                    let piece = &file[range.start as usize..range.end as usize];
                    bytes.add(range.start, piece.to_vec());
                }
                done => return (done, bytes.pieces.len()),
            }
        }
    }

    #[test]
    fn an_own_program_is_understood_from_a_few_of_its_bytes() {
        let file = std::fs::read("/proc/self/exe").expect("readable");
        let (Elf::Needs(needs), pieces) = look(&file) else { panic!("not understood") };
        assert!(needs.libraries.contains(&b"libc.so.6".to_vec()), "{needs:?}");
        let interpreter = String::from_utf8(needs.interpreter.expect("a program")).expect("text");
        assert!(interpreter.contains("/ld-"), "{interpreter}");
        assert!(pieces < 8, "{pieces}");
    }

    #[test]
    fn what_is_cut_off_or_something_else_gives_nothing() {
        let file = std::fs::read("/proc/self/exe").expect("readable");
        assert_eq!(look(b"#!/bin/sh\n").0, Elf::Nothing);
        assert_eq!(look(&[]).0, Elf::Nothing);
        assert_eq!(look(&file[..64]).0, Elf::Nothing);
        for at in 0..400 {
            let mut broken = file[..8192].to_vec();
            broken[at] ^= 0xff;
            look(&broken);
        }
    }
}
