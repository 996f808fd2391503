//! An image's own `/etc/passwd` and `/etc/group`: two files, the first one's length in front, before them the user that is wanted.

use sluice_container::outside;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((len, rest)) = data.split_first_chunk::<2>() else { return };
    let (wanted, files) = rest.split_at(rest.len().min(usize::from(len[0] % 16)));
    let (passwd, group) = files.split_at(files.len().min(usize::from(len[1])));
    crate::scratch::file("etc/passwd", passwd);
    crate::scratch::file("etc/group", group);
    drop(outside::user(crate::scratch::dir(), &String::from_utf8_lossy(wanted)));
}
