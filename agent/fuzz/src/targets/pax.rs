//! PAX extended headers: the bytes are the records of one or two `x` headers in front of a file.

use crate::tar::{both_ways, member, parse};

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((cut, records)) = data.split_first() else { return };
    let (one, two) = records.split_at(records.len().min(usize::from(*cut)));
    let mut tar = Vec::new();
    for part in [one, two] {
        if !part.is_empty() {
            tar.extend(member(b'x', "pax", part));
        }
    }
    tar.extend(member(b'0', "file", b"0123456789"));
    tar.extend([0; 1024]);
    let whole = parse(&tar, usize::MAX, false);
    assert_eq!(whole, parse(&tar, 7, false));
    if whole.is_ok() {
        both_ways(&tar);
    }
}
