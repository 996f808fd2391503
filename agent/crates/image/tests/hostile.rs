//! Layers that want to break out, to confuse or to exhaust: refused with a reason, or taken as every other implementation takes
//! them. What unpacking makes of such layers stands in the `container` crate's tests.

use std::io::Write;
use std::time::{Duration, Instant};

use sluice_image::erofs::{self, Form};
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_image::merge::Tree;

/// A tar as nobody well-meaning writes it.
#[derive(Default)]
struct Layer(Vec<u8>);

impl Layer {
    fn header(mut self, kind: u8, name: &[u8], link: &[u8], size: u64) -> Self {
        let mut header = [0_u8; 512];
        let (name, link) = (&name[..name.len().min(100)], &link[..link.len().min(100)]);
        header[..name.len()].copy_from_slice(name);
        header[100..107].copy_from_slice(b"0000755");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link);
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(header);
        self
    }

    fn data(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.header(b'0', name.as_bytes(), b"", content.len() as u64).data(content)
    }

    fn dir(self, name: &str) -> Self {
        self.header(b'5', name.as_bytes(), b"", 0)
    }

    fn link(self, kind: u8, name: &str, target: &str) -> Self {
        self.header(kind, name.as_bytes(), target.as_bytes(), 0)
    }

    /// PAX records in front of the next entry.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut len = rest + 1;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            body.extend(format!("{len} {key}=").as_bytes());
            body.extend(*value);
            body.push(b'\n');
        }
        self.header(b'x', b"pax", b"", body.len() as u64).data(&body)
    }

    fn tar(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

fn index(layer: &[u8]) -> Result<LayerIndex, String> {
    let failed = |error: sluice_image::index::IndexError| error.to_string();
    let mut indexer = LayerIndexer::new(IndexOptions::default(), NoSink).map_err(failed)?;
    indexer.push(layer).map_err(failed)?;
    let digest = ring::digest::digest(&ring::digest::SHA256, layer);
    Ok(indexer.finish(&format!("sha256:{}", hex::encode(digest))).map_err(failed)?.0)
}

/// All the way to the image's metadata; its size, or why not.
fn mount(layers: &[Vec<u8>]) -> Result<u64, String> {
    let mut tree = Tree::new();
    let mut blocks = Vec::new();
    for layer in layers {
        let index = index(layer)?;
        let entries = index.entries().map_err(|error| error.to_string())?;
        tree.apply::<Box<dyn std::error::Error>>(entries.map(|entry| entry.map_err(Into::into)))
            .map_err(|error| error.to_string())?;
        blocks.push(index.header().store_size.get() / 4096);
    }
    let mut out = Vec::new();
    erofs::write(&tree, &blocks, Form::Devices, &mut out).map_err(|error| error.to_string())?;
    Ok(out.len() as u64)
}

#[test]
fn what_breaks_a_rule_is_named() {
    let long = "n".repeat(300);
    let path = "p/".repeat(2100);
    let deep: Vec<u8> = {
        // Each directory by a symbolic link to the one before: no single path is long.
        let mut layer = Layer::default().dir("0");
        let mut at = "0".to_owned();
        for depth in 1..=1100 {
            let name = format!("l{depth}");
            at = if depth % 40 == 0 {
                layer = layer.link(b'2', &name, &at);
                format!("{name}/d")
            } else {
                format!("{at}/d")
            };
            layer = layer.pax(&[("path", at.as_bytes())]).dir("long");
        }
        layer.tar()
    };
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        (
            "out by ..",
            Layer::default().file("../etc/passwd", b"x").tar(),
            &["../etc/passwd", "leaves the root"],
        ),
        ("out by a/../..", Layer::default().file("a/../../x", b"x").tar(), &["leaves the root"]),
        (
            "a hard link out",
            Layer::default().link(b'1', "mine", "../../etc/shadow").tar(),
            &["leaves the root"],
        ),
        (
            "a hard link to itself",
            Layer::default().link(b'1', "a", "a").tar(),
            &["hard link `a`", "no such file"],
        ),
        (
            "a cycle of hard links",
            Layer::default().link(b'1', "a", "b").link(b'1', "b", "a").tar(),
            &["hard link `a` to `b`", "no such file"],
        ),
        ("a hard link to a directory", Layer::default().dir("d").link(b'1', "a", "d").tar(), &["directory"]),
        (
            "a loop of symbolic links",
            Layer::default().link(b'2', "a", "b").link(b'2', "b", "a").file("a/x", b"x").tar(),
            &["a/x", "symbolic link"],
        ),
        (
            "a name of 300 bytes",
            Layer::default().pax(&[("path", long.as_bytes())]).file("x", b"x").tar(),
            &["255"],
        ),
        (
            "a path of 4200 bytes",
            Layer::default().pax(&[("path", path.as_bytes())]).file("x", b"x").tar(),
            &["4096"],
        ),
        ("a tree that is too deep", deep, &["deep"]),
        (
            "an attribute of 70,000 bytes",
            Layer::default().pax(&[("SCHILY.xattr.user.a", &[b'x'; 70_000])]).file("x", b"x").tar(),
            &["65,535"],
        ),
        (
            "12,000 attributes",
            {
                let names: Vec<String> =
                    (0..12_000).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
                let records: Vec<(&str, &[u8])> =
                    names.iter().map(|name| (name.as_str(), &b"a value of twenty by"[..])).collect();
                Layer::default().pax(&records).file("x", b"x").tar()
            },
            &["attributes"],
        ),
        (
            "attributes of 2 MiB",
            Layer::default().pax(&[("SCHILY.xattr.user.a", &vec![b'x'; 2 << 20])]).file("x", b"x").tar(),
            &["extended header", "1048576"],
        ),
        (
            "overlapping segments",
            Layer::default()
                .pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,10,5,10")])
                .file("x", &[7; 20])
                .tar(),
            &["sparse"],
        ),
        (
            "a file larger than any layer",
            Layer::default()
                .pax(&[("GNU.sparse.size", b"1152921504606846976"), ("GNU.sparse.map", b"0,1")])
                .file("x", b"x")
                .tar(),
            &["1 TiB"],
        ),
        (
            "a size that is a lie",
            Layer::default().header(b'0', b"x", b"", 1 << 32).data(b"x").0,
            &["ends", "inside"],
        ),
    ];
    for (name, layer, words) in cases {
        let began = Instant::now();
        let error = mount(&[layer]).expect_err(name);
        for word in words {
            assert!(error.contains(word), "{name}: `{word}` is not in `{error}`");
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{name} took {:?}", began.elapsed());
    }
}

#[test]
fn what_is_odd_but_allowed_is_taken() {
    let nested = "d/".repeat(900);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("absolute paths are inside", Layer::default().file("/etc/passwd", b"x").tar()),
        ("links that lead out", Layer::default().link(b'2', "a", "/etc").link(b'2', "b", "../../..").tar()),
        (
            "a file behind such a link",
            Layer::default().link(b'2', "a", "/etc").dir("etc").file("a/x", b"x").tar(),
        ),
        ("the same name often", (0..2000).fold(Layer::default(), |layer, _| layer.file("x", b"x")).tar()),
        (
            "a directory over a file over a directory",
            Layer::default().dir("x").file("x", b"1").dir("x").tar(),
        ),
        ("900 directories deep", Layer::default().pax(&[("path", nested.as_bytes())]).dir("x").tar()),
        (
            "devices, as containerd's",
            Layer::default().header(b'3', b"null", b"", 0).header(b'4', b"sda", b"", 0).tar(),
        ),
        ("60,000 bytes of an attribute", {
            Layer::default().pax(&[("SCHILY.xattr.user.a", &[b'x'; 60_000])]).file("x", b"x").tar()
        }),
        ("unknown kinds", Layer::default().header(b'V', b"label", b"", 0).header(b'Z', b"x", b"", 0).tar()),
        ("nothing at all", Vec::new()),
    ];
    for (name, layer) in cases {
        mount(&[layer]).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn bombs_are_read_in_bounded_memory_and_time() {
    // A gigabyte that compresses to some megabytes; then 300,000 entries.
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    bomb.write_all(&Layer::default().header(b'0', b"zeros", b"", 1 << 30).0).expect("in memory");
    for _ in 0..1024 {
        bomb.write_all(&vec![0; 1 << 20]).expect("in memory");
    }
    bomb.write_all(&[0; 1024]).expect("in memory");
    let before = resident_peak();
    let index = index(&bomb.finish().expect("in memory")).expect("it is a layer");
    assert_eq!(index.header().tar_size.get(), (1 << 30) + 1536);
    let grown = resident_peak() - before;
    assert!(grown < 64 << 20, "{} MiB more were resident", grown >> 20);
    let many =
        (0..300_000).fold(Layer::default(), |layer, number| layer.file(&format!("f{number}"), b"")).tar();
    mount(&[many]).expect("many entries");
}

/// `VmHWM` of this process, in bytes.
fn resident_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("there");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}
