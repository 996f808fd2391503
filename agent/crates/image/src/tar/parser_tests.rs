//! The parser over tars made here, cut into pieces of any size.

use super::*;
use crate::tar::parser::{Step, TarParser};

/// Entries and contents of a stream fed in pieces of `piece` bytes.
fn parse(tar: &[u8], piece: usize) -> Result<Vec<(TarEntry, Vec<u8>)>, TarError> {
    let mut parser = TarParser::new(false);
    let mut found: Vec<(TarEntry, Vec<u8>)> = Vec::new();
    for mut input in tar.chunks(piece) {
        while !input.is_empty() {
            let (consumed, step) = parser.step(input)?;
            match step {
                Step::Entry(entry) => found.push((*entry, Vec::new())),
                Step::Content { offset } => {
                    let content = &mut found.last_mut().expect("content after an entry").1;
                    content.resize(offset as usize, 0);
                    content.extend_from_slice(&input[..consumed]);
                }
                Step::Skeleton => {}
            }
            input = &input[consumed..];
        }
    }
    parser.finish()?;
    Ok(found)
}

fn sample() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder.append_data(&mut header, format!("{}/file", "long".repeat(60)), &b"hello"[..]).expect("append");
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", "some/target").expect("append");
    builder.into_inner().expect("finish")
}

#[test]
fn the_pieces_do_not_matter() {
    let tar = sample();
    let whole = parse(&tar, tar.len()).expect("parse");
    assert_eq!(whole.len(), 2);
    assert_eq!(whole[0].1, b"hello");
    assert_eq!(whole[1].0.kind, TarKind::Symlink(b"some/target".to_vec()));
    for piece in [1, 7, 511, 512, 513] {
        assert_eq!(parse(&tar, piece).expect("parse"), whole, "{piece}");
    }
}

#[test]
fn damage_and_truncation_are_named() {
    let mut tar = sample();
    assert!(matches!(parse(&tar[..700], 512), Err(TarError::Truncated { .. })));
    tar[10] ^= 1;
    assert_eq!(parse(&tar, 512), Err(TarError::Checksum { offset: 0 }));
}

#[test]
fn an_archive_may_end_with_its_last_content() {
    // The long name, its header and the file's take three blocks.
    let (tar, content) = (sample(), 3 * TAR_BLOCK);
    let whole = parse(&tar, 512).expect("parse");
    for len in [content + 5, content + 300, content + TAR_BLOCK] {
        assert_eq!(parse(&tar[..len], 512).expect("parse"), whole[..1], "{len}");
    }
    assert!(matches!(parse(&tar[..content + 4], 512), Err(TarError::Truncated { .. })));
}

fn member(type_flag: u8, name: &str, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[156] = type_flag;
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut out = [header.as_bytes(), data].concat();
    out.resize(out.len().next_multiple_of(TAR_BLOCK), 0);
    out
}

fn xattr_record(name: &str, len: usize) -> Vec<u8> {
    let body = format!(" SCHILY.xattr.user.{name}={}\n", "v".repeat(len));
    let len = (1..9).map(|digits| body.len() + digits).find(|len| len.to_string().len() + body.len() == *len);
    format!("{}{body}", len.expect("a length")).into_bytes()
}

#[test]
fn extended_headers_before_an_entry_do_not_accumulate() {
    let second =
        [member(b'x', "x", &xattr_record("a", 9)), member(b'x', "x", &xattr_record("b", 9))].concat();
    let entries = parse(&[second, member(b'0', "f", b"")].concat(), 512).expect("parse");
    assert_eq!(entries[0].0.xattrs, [(b"user.b".to_vec(), b"v".repeat(9))]);
    let large = member(b'x', "x", &xattr_record("a", 400_000));
    let entry = member(b'0', "f", b"");
    let apart = [large.clone(), entry.clone(), large.clone(), entry.clone(), large.clone(), entry].concat();
    assert_eq!(parse(&apart, 4096).expect("parse").len(), 3);
    for block in [b'x', b'g', b'L', b'K'] {
        let tar = [large.clone(), large.clone(), member(block, "x", &[b'a'; 400_000])].concat();
        assert!(matches!(parse(&tar, 4096), Err(TarError::TooLarge { limit: MAX_EXTENSION, .. })), "{block}");
    }
}

#[test]
fn a_name_that_ends_with_a_slash_is_a_directory_in_old_archives_only() {
    let tar = [member(b'0', "file/", b"data"), member(0, "dir/", b""), member(b'5', "dir2", b"")].concat();
    let found = parse(&tar, 512).expect("parse");
    assert!(matches!(&found[0].0.kind, TarKind::File(content) if content.size == 4), "{found:?}");
    assert_eq!((found[0].0.path.as_slice(), found[0].1.as_slice()), (&b"file"[..], &b"data"[..]));
    assert_eq!(found[1].0.kind, TarKind::Directory);
    assert_eq!(found[2].0.kind, TarKind::Directory);
}

#[test]
fn names_and_link_texts_have_no_zeros() {
    for records in [&b"12 path=a\0b\n"[..], b"16 linkpath=a\0b\n"] {
        let tar = [member(b'x', "x", records), member(b'2', "link", b"")].concat();
        assert!(matches!(parse(&tar, 512), Err(TarError::Field { .. })), "{records:?}");
    }
}
