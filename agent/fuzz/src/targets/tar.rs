//! The tar parser: any bytes, in pieces of any size. How they are cut must not change what is found, and a
//! skeleton made of a tar must parse as that tar does.

use crate::tar::{both_ways, fix_checksums, parse};

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((piece, tar)) = data.split_first() else { return };
    let mut tar = tar.to_vec();
    if piece % 8 != 0 {
        fix_checksums(&mut tar);
    }
    let tar = tar.as_slice();
    let whole = parse(tar, usize::MAX, false);
    assert_eq!(whole, parse(tar, usize::from(*piece).max(1), false));
    if whole.is_ok() {
        both_ways(tar);
    }
}
