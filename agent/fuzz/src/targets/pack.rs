//! Start packs, which come from registries: the table at the beginning, and the frames behind it.

use sluice_image::parts::check;
use sluice_prefetch::{Head, PackTable};

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((cut, data)) = data.split_first() else { return };
    let size = data.len() as u64;
    // As far as it is there; then all of it.
    let beginning = &data[..data.len() * usize::from(*cut) / 255];
    if let Ok(Head::Needs(needed)) = PackTable::parse(beginning, size) {
        assert!(needed <= size && needed > beginning.len() as u64);
    }
    let Ok(Head::Table(table)) = PackTable::parse(data, size) else { return };
    let mut end = 0;
    for frame in table.frames() {
        assert!(frame.bytes.start >= end && frame.bytes.end <= size);
        end = frame.bytes.end;
        let Ok(items) = table.unpack(frame, &data[frame.bytes.start as usize..frame.bytes.end as usize])
        else {
            continue;
        };
        let places = table.items(frame);
        assert!(items.iter().map(|item| (item.layer.as_str(), item.store_offset, item.parts)).eq(places));
        for item in &items {
            let (len, digest) = (item.bytes.len() as u32, [0; 32]);
            // Nobody finds what hashes to zeros.
            assert_eq!(check(len, item.parts, &item.bytes, &item.proof, &digest), None);
            assert_eq!(check(u32::MAX, item.parts, &item.bytes, &item.proof, &digest), None);
        }
    }
}
