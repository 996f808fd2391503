//! Driving the tar parser.

use sluice_image::tar::{Step, TarEntry, TarError, TarParser};

/// Content kept per tar: sparse files may claim any size, only stored bytes count.
type Found = (TarEntry, Vec<(u64, Vec<u8>)>);

/// Entries of a tar and the runs of their contents, whatever the pieces it comes in.
pub fn parse(tar: &[u8], piece: usize, elided: bool) -> Result<Vec<Found>, TarError> {
    let mut parser = TarParser::new(elided);
    let mut found: Vec<Found> = Vec::new();
    for mut input in tar.chunks(piece) {
        while !input.is_empty() {
            let (consumed, step) = parser.step(input)?;
            let (now, rest) = input.split_at(consumed);
            match step {
                Step::Entry(entry) => found.push((*entry, Vec::new())),
                Step::Content { offset } => content(&mut found, offset, now),
                Step::Skeleton => assert!(consumed > 0 || !elided, "no progress"),
            }
            input = rest;
        }
    }
    parser.finish()?;
    Ok(found)
}

fn content(found: &mut [Found], offset: u64, bytes: &[u8]) {
    let (_, runs) = found.last_mut().expect("content belongs to an entry");
    match runs.last_mut() {
        Some((start, run)) if *start + run.len() as u64 == offset => run.extend_from_slice(bytes),
        _ => runs.push((offset, bytes.to_vec())),
    }
}

/// Takes the contents out of a tar that parses: the rest must parse to the same entries.
pub fn both_ways(tar: &[u8]) {
    let mut parser = TarParser::new(false);
    let mut skeleton = Vec::new();
    let mut left = tar;
    while !left.is_empty() {
        let (consumed, step) = parser.step(left).expect("it parsed before");
        let (now, rest) = left.split_at(consumed);
        if !matches!(step, Step::Content { .. }) {
            skeleton.extend_from_slice(now);
        }
        left = rest;
    }
    let entries = |found: Vec<Found>| found.into_iter().map(|(entry, _)| entry).collect::<Vec<_>>();
    assert_eq!(
        entries(parse(&skeleton, usize::MAX, true).expect("a skeleton parses")),
        entries(parse(tar, usize::MAX, false).expect("it parsed before"))
    );
}

/// One member with a valid header.
pub fn member(type_flag: u8, name: &str, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::new(type_flag));
    header.set_path(name).expect("a short name");
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// Puts the right checksum into every block that names a dialect, so that the fuzzer need not find it.
pub fn fix_checksums(tar: &mut [u8]) {
    for block in tar.as_chunks_mut::<512>().0 {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}
