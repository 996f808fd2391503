//! Tables of contents that layers bring, made by the tools people use: `fixtures/` has the same tree as an eStargz layer and as a
//! zstd:chunked one of stargz-snapshotter 0.12, and as a zstd:chunked one of skopeo 1.9.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use sluice_image::decode::decode_span;
use sluice_image::entry::{Entry, EntryKind};
use sluice_image::index::embedded::{EmbeddedToc, TAIL_LEN};
use sluice_image::index::{IndexError, LayerIndex};
use sluice_image::records::DigestAlgorithm;

const FIXTURES: [&str; 3] = ["estargz", "zstdchunked-stargz", "zstdchunked"];

struct Fixture {
    layer: Vec<u8>,
    digest: String,
    annotations: BTreeMap<String, String>,
}

fn fixture(name: &str) -> Fixture {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let descriptor = std::fs::read(dir.join(format!("{name}.json"))).expect("descriptor");
    let descriptor: serde_json::Value = serde_json::from_slice(&descriptor).expect("json");
    let layer = std::fs::read(dir.join(name)).expect("layer");
    assert_eq!(descriptor["size"], layer.len());
    Fixture {
        layer,
        digest: descriptor["digest"].as_str().expect("digest").to_owned(),
        annotations: serde_json::from_value(descriptor["annotations"].clone()).expect("annotations"),
    }
}

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(DigestAlgorithm::Sha256.digest(bytes)))
}

fn find(fixture: &Fixture) -> Result<Option<EmbeddedToc>, IndexError> {
    let size = fixture.layer.len() as u64;
    let tail = &fixture.layer[fixture.layer.len() - TAIL_LEN as usize..];
    EmbeddedToc::find(|key| fixture.annotations.get(key).map(String::as_str), size, tail)
}

fn index(fixture: &Fixture) -> Result<LayerIndex, IndexError> {
    let toc = find(fixture)?.expect("a table");
    let range = toc.range().start as usize..toc.range().end as usize;
    toc.index(&fixture.layer[range], &fixture.digest, &sha256(b"the tar"))
}

fn plain(layer: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    if layer.starts_with(&[0x1f, 0x8b]) {
        flate2::read::MultiGzDecoder::new(layer).read_to_end(&mut tar).expect("gzip");
    } else {
        zstd::stream::read::Decoder::new(layer).expect("zstd").read_to_end(&mut tar).expect("zstd");
    }
    tar
}

/// What the `tar` crate finds in the whole layer: a line and content by path.
fn unpacked(layer: &[u8]) -> BTreeMap<String, (String, Vec<u8>)> {
    let tar = plain(layer);
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut found = BTreeMap::new();
    for entry in archive.entries().expect("entries") {
        let mut entry = entry.expect("entry");
        let path = entry
            .path()
            .expect("path")
            .to_string_lossy()
            .trim_start_matches("./")
            .trim_end_matches('/')
            .to_owned();
        if path == "stargz.index.json" || path == ".no.prefetch.landmark" {
            continue;
        }
        let mut xattrs = Vec::new();
        let mut mtime = entry.header().mtime().expect("mtime").to_string();
        for extension in entry.pax_extensions().expect("pax").into_iter().flatten() {
            let extension = extension.expect("pax");
            if let Some(name) = extension.key().expect("key").strip_prefix("SCHILY.xattr.") {
                xattrs.push(format!("{name}={}", hex::encode(extension.value_bytes())));
            } else if extension.key() == Ok("mtime") {
                extension.value().expect("text").clone_into(&mut mtime);
            }
        }
        xattrs.sort();
        let header = entry.header().clone();
        let target =
            |link: Option<std::borrow::Cow<'_, Path>>| link.expect("link").to_string_lossy().into_owned();
        let kind = match header.entry_type() {
            tar::EntryType::Regular => "file".to_owned(),
            tar::EntryType::Directory => "dir".to_owned(),
            tar::EntryType::Symlink => format!("symlink {}", target(entry.link_name().expect("link"))),
            tar::EntryType::Link => {
                format!("link {}", target(entry.link_name().expect("link")).trim_start_matches("./"))
            }
            tar::EntryType::Char => {
                format!(
                    "char {}:{}",
                    header.device_major().expect("major").unwrap_or(0),
                    header.device_minor().expect("minor").unwrap_or(0)
                )
            }
            tar::EntryType::Fifo => "fifo".to_owned(),
            other => panic!("{other:?}"),
        };
        // eStargz rounds times to seconds.
        let seconds = mtime.parse::<f64>().expect("number").round();
        let line = format!(
            "{kind} {:o} {}:{} {seconds} {}",
            header.mode().expect("mode") & 0o7777,
            header.uid().expect("uid"),
            header.gid().expect("gid"),
            xattrs.join(" ")
        );
        let mut content = Vec::new();
        entry.read_to_end(&mut content).expect("content");
        found.insert(path, (line, content));
    }
    found
}

fn line(entry: &Entry) -> String {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let kind = match &entry.kind {
        EntryKind::File { .. } => "file".to_owned(),
        EntryKind::Directory => "dir".to_owned(),
        EntryKind::Symlink { target } => format!("symlink {}", text(target)),
        EntryKind::HardLink { target } => format!("link {}", text(target)),
        EntryKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
        EntryKind::Fifo => "fifo".to_owned(),
        other => panic!("{other:?}"),
    };
    let xattrs = entry.xattrs.iter().map(|(name, value)| format!("{}={}", text(name), hex::encode(value)));
    let seconds = (entry.mtime.seconds as f64 + f64::from(entry.mtime.nanoseconds) / 1e9).round();
    let (mode, uid, gid) = (entry.mode, entry.uid, entry.gid);
    format!("{kind} {mode:o} {uid}:{gid} {seconds} {}", xattrs.collect::<Vec<_>>().join(" "))
}

/// The stand-in tar, from every span decoded by itself.
fn decode(index: &LayerIndex, layer: &[u8]) -> Vec<u8> {
    let header = index.header();
    let windows = header.windows.offset.get() as usize;
    let mut tar = Vec::new();
    for (number, span) in index.spans().iter().enumerate() {
        let next = index.spans().get(number + 1);
        let end = next.map_or(header.tar_size.get(), |next| next.tar_offset.get());
        let to = next.map_or(header.layer_size.get(), |next| next.compressed_offset.get()) as usize;
        let window = windows + span.window_offset.get() as usize;
        let window = &index.blob()[window..window + span.window_len.get() as usize];
        let compressed = &layer[span.compressed_offset.get() as usize..to];
        decode_span(span, window, compressed, end - span.tar_offset.get(), &mut tar).expect("span");
    }
    assert_eq!(tar.len() as u64, header.tar_size.get());
    tar
}

#[test]
fn layers_are_read_by_their_own_tables() {
    for name in FIXTURES {
        let fixture = fixture(name);
        let index = index(&fixture).expect(name);
        assert!(!index.has_own_tar() && !index.spans_are_continuous() && index.random_access(), "{name}");
        assert_eq!(index.digest_algorithm(), DigestAlgorithm::Sha256, "{name}");
        assert_eq!(index.header().layer_digest_text(), fixture.digest, "{name}");
        let tar = decode(&index, &fixture.layer);
        let mut store = vec![0; index.header().store_size.get() as usize];
        let mut found = BTreeMap::new();
        let (mut chunks, mut largest) = (0, 0);
        for item in index.toc().expect("toc") {
            let item = item.expect("item");
            for extent in &item.extents {
                let (to, from) = (extent.store_offset.get() as usize, extent.tar_offset.get() as usize);
                let len = extent.len.get() as usize;
                store[to..to + len].copy_from_slice(&tar[from..from + len]);
            }
            for chunk in &item.chunks {
                let bytes = &store[chunk.store_offset.get() as usize..][..chunk.len.get() as usize];
                assert_eq!(DigestAlgorithm::Sha256.digest(bytes), chunk.digest, "{name}");
                chunks += 1;
                largest = largest.max(chunk.len.get());
            }
            let entry = item.entry.expect("known kind");
            let content = match entry.kind {
                EntryKind::File { size, store_offset } => {
                    store[store_offset as usize..(store_offset + size) as usize].to_vec()
                }
                _ => Vec::new(),
            };
            found.insert(String::from_utf8(entry.path.clone()).expect("text"), (line(&entry), content));
        }
        assert_eq!(found, unpacked(&fixture.layer), "{name}");
        // The eStargz layer was made with chunks of 4096 bytes; five contents are equal to none, one to another.
        assert_eq!((chunks, largest), if name == "estargz" { (12, 4096) } else { (5, 13_893) }, "{name}");
    }
}

#[test]
fn other_layers_have_no_table() {
    let mut without = fixture("estargz");
    without.annotations.clear();
    assert_eq!(find(&without).expect("fine"), None);
    let mut ordinary = fixture("estargz");
    ordinary.layer = plain(&ordinary.layer);
    assert_eq!(find(&ordinary).expect("fine"), None);
    let mut newer = fixture("zstdchunked");
    let renamed =
        |(key, value): (String, String)| (key.replace("io.containers", "io.github.containers"), value);
    newer.annotations = newer.annotations.into_iter().map(renamed).collect();
    assert!(find(&newer).expect("fine").is_some());
}

#[test]
fn a_table_other_than_the_manifests_is_refused() {
    for name in FIXTURES {
        let mut damaged = fixture(name);
        let range = find(&damaged).expect("fine").expect("a table").range();
        for at in [range.start, (range.start + range.end) / 2, range.end - 1] {
            damaged.layer[at as usize] ^= 0x10;
            assert!(index(&damaged).is_err(), "{name} {at}");
            damaged.layer[at as usize] ^= 0x10;
        }
        assert!(index(&damaged).is_ok(), "{name}");
        for value in damaged.annotations.values_mut() {
            *value = value.replace("sha256:", "sha256:0").replacen("0", "1", 1);
        }
        assert!(find(&damaged).is_err() || index(&damaged).is_err(), "{name}");
    }
}

/// A zstd:chunked layer of 1 MiB with this table at its end.
fn chunked(table: &str) -> Result<LayerIndex, IndexError> {
    let bytes = zstd::bulk::compress(table.as_bytes(), 3).expect("compress");
    let (start, checksum) = (1 << 20, sha256(&bytes));
    let position = format!("{start}:{}:{}:1", bytes.len(), table.len());
    let annotation = |key: &str| match key.strip_prefix("io.github.containers.zstd-chunked.") {
        Some("manifest-position") => Some(position.as_str()),
        Some("manifest-checksum") => Some(checksum.as_str()),
        _ => None,
    };
    let toc = EmbeddedToc::find(annotation, start + bytes.len() as u64 + 4096, &[])?.expect("a table");
    toc.index(&bytes, &sha256(b"layer"), &sha256(b"tar"))
}

#[test]
fn tables_that_lie_are_refused() {
    let digest = sha256(b"x");
    let file = |name: &str, more: &str| {
        format!(r#"{{"type":"reg","name":"{name}","digest":"{digest}","chunkDigest":"{digest}",{more}}}"#)
    };
    let chunk = |more: &str| format!(r#"{{"type":"chunk","name":"f","chunkDigest":"{digest}",{more}}}"#);
    let table = |rows: &[String]| format!(r#"{{"version":1,"entries":[{}]}}"#, rows.join(","));
    for (rows, accepted) in [
        (vec![file("f", r#""size":5,"offset":100"#)], true),
        (vec![file("f", r#""size":5,"offset":100"#), file("g", r#""size":6,"offset":101"#)], true),
        (vec![file("f", r#""size":5,"offset":100"#), file("g", r#""size":6,"offset":100"#)], false),
        (vec![file("f", r#""size":5,"offset":100"#), file("g", r#""size":6,"offset":99"#)], false),
        (vec![file("f", r#""size":5,"offset":1048576"#)], false),
        (vec![file("f", r#""size":99999999999,"offset":100"#)], false),
        (vec![file("f", r#""size":18446744073709551615,"offset":100"#)], false),
        (vec![file("f", r#""size":5,"offset":100,"chunkSize":4"#)], false),
        (vec![file("f", r#""size":5,"offset":100,"innerOffset":4"#)], false),
        (vec![file("f", r#""size":0"#), chunk(r#""offset":100,"chunkOffset":1"#)], false),
        (vec![file("f", r#""size":9000,"offset":100"#), chunk(r#""offset":200,"chunkOffset":4096"#)], true),
        (vec![file("f", r#""size":9000,"offset":100"#), chunk(r#""offset":200,"chunkOffset":4097"#)], true),
        (vec![file("f", r#""size":9000,"offset":100"#), chunk(r#""offset":200,"chunkOffset":9000"#)], false),
        (vec![file("f", r#""size":9000,"offset":100"#), chunk(r#""offset":50,"chunkOffset":4096"#)], false),
        (
            vec![
                file("f", r#""size":9000,"offset":100"#),
                chunk(r#""chunkOffset":4096,"chunkType":"zeros""#),
            ],
            true,
        ),
        (vec![file("../f", r#""size":5,"offset":100"#)], false),
        (vec![file(&"n".repeat(5000), r#""size":5,"offset":100"#)], false),
        (vec![r#"{"type":"symlink","name":"s","linkName":"\u0000"}"#.to_owned()], false),
        (vec![format!(r#"{{"type":"symlink","name":"s","linkName":"{}"}}"#, "n".repeat(5000))], false),
        (vec![r#"{"type":"dir","name":"a\u0000b"}"#.to_owned()], false),
        (vec![r#"{"type":"socket","name":"s"}"#.to_owned()], false),
        (vec![r#"{"type":"dir","name":"d","xattrs":{"user.x":"*"}}"#.to_owned()], false),
        (vec![r#"{"type":"dir","name":"d","modtime":"yesterday"}"#.to_owned()], false),
    ] {
        let made = chunked(&table(&rows));
        assert_eq!(made.is_ok(), accepted, "{rows:?}: {made:?}");
        if let Ok(index) = made {
            assert!(index.toc().expect("toc").all(|item| item.is_ok()), "{rows:?}");
        }
    }
    assert!(chunked(r#"{"version":2,"entries":[]}"#).is_err());
    assert!(chunked("[]").is_err());
}

#[test]
fn spans_group_contents_and_end_at_chunks() {
    let digest = sha256(b"x");
    let rows: Vec<String> = (0..9000_u64)
        .map(|number| {
            let offset = number * 100 + 1;
            format!(
                r#"{{"type":"reg","name":"f{number}","size":{},"offset":{offset},"chunkDigest":"{digest}"}}"#,
                1000 + number
            )
        })
        .collect();
    let index = chunked(&format!(r#"{{"version":1,"entries":[{}]}}"#, rows.join(","))).expect("index");
    assert!(index.spans().len() > 3, "{}", index.spans().len());
    let starts: Vec<u64> = index.spans().iter().map(|span| span.tar_offset.get()).collect();
    assert!(starts.windows(2).all(|pair| pair[1] - pair[0] < 8 << 20));
    let extents: Vec<u64> = index
        .toc()
        .expect("toc")
        .flat_map(|item| item.expect("item").extents)
        .map(|extent| extent.tar_offset.get())
        .collect();
    assert!(starts.iter().skip(1).all(|start| extents.binary_search(start).is_ok()));
}
