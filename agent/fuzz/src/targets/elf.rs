//! ELF files, which come from images: what they need is read from pieces of them.

use sluice_prefetch::{Elf, ElfBytes};

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let mut bytes = ElfBytes::new(data.len() as u64);
    let mut pieces = 0;
    while let Elf::Wants(range) = bytes.look() {
        assert!(range.start < range.end && range.end <= data.len() as u64);
        bytes.add(range.start, data[range.start as usize..range.end as usize].to_vec());
        pieces += 1;
        assert!(pieces <= 64);
    }
}
