//! Random stacks of layers, merged, written and read back, against a model that is a map from path to object.

use std::collections::BTreeMap;

use proptest::prelude::*;
use sluice_image::entry::{Entry, EntryKind, Timestamp};
use sluice_image::erofs::{self, Form, reader::Reader};
use sluice_image::merge::{MergeError, Tree};

const LAYER_BLOCKS: u64 = 64;

#[derive(Debug, Clone)]
enum Op {
    File(String, u8),
    Dir(String, u16),
    Whiteout(String),
    Opaque(String),
}

/// Short names, so that layers meet.
fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["a", "b", "c"], 1..4).prop_map(|parts| parts.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (path(), 0..64u8).prop_map(|(path, block)| Op::File(path, block)),
        3 => (path(), 0..0o1000u16).prop_map(|(path, mode)| Op::Dir(path, mode)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Object {
    File { layer: usize, block: u8 },
    Dir { mode: u16 },
}

type Model = BTreeMap<String, Object>;

fn remove(model: &mut Model, path: &str) {
    let below = format!("{path}/");
    model.retain(|name, _| name != path && !name.starts_with(&below));
}

/// Whiteouts first, all at once, on the lower layers; then the layer's own entries: what the specification says.
fn apply(model: &mut Model, layer: usize, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Whiteout(path) => remove(model, path),
            Op::Opaque(path) => {
                let below = format!("{path}/");
                model.retain(|name, _| !name.starts_with(&below));
            }
            _ => {}
        }
    }
    for op in ops {
        let (path, object) = match op {
            Op::File(path, block) => (path, Object::File { layer, block: *block }),
            Op::Dir(path, mode) => (path, Object::Dir { mode: *mode }),
            _ => continue,
        };
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            if !matches!(model.get(parent), Some(Object::Dir { .. })) {
                remove(model, parent);
                model.insert(parent.to_owned(), Object::Dir { mode: 0o755 });
            }
        }
        let both = matches!((model.get(path), object), (Some(Object::Dir { .. }), Object::Dir { .. }));
        if !both {
            remove(model, path);
        }
        model.insert(path.clone(), object);
    }
}

fn entry(op: &Op) -> Entry {
    let (path, kind, mode) = match op {
        Op::File(path, block) => {
            (path.clone(), EntryKind::File { size: 4096, store_offset: u64::from(*block) * 4096 }, 0o644)
        }
        Op::Dir(path, mode) => (path.clone(), EntryKind::Directory, u32::from(*mode)),
        Op::Whiteout(path) => {
            let (parent, name) = path.rsplit_once('/').map_or(("", path.as_str()), |both| both);
            let path = if parent.is_empty() { format!(".wh.{name}") } else { format!("{parent}/.wh.{name}") };
            (path, EntryKind::File { size: 0, store_offset: 0 }, 0)
        }
        Op::Opaque(path) => (format!("{path}/.wh..wh..opq"), EntryKind::File { size: 0, store_offset: 0 }, 0),
    };
    let path = path.into_bytes();
    Entry { path, kind, mode, uid: 0, gid: 0, mtime: Timestamp::default(), xattrs: Vec::new() }
}

/// Layers with whiteouts list the parents of what they hold, as real ones do: whether a directory that is hidden and only
/// implied by a deeper entry keeps its lower attributes, the specification leaves open. Others leave parents out.
fn with_parents(ops: Vec<Op>) -> Vec<Op> {
    if !ops.iter().any(|op| matches!(op, Op::Whiteout(_) | Op::Opaque(_))) {
        return ops;
    }
    let mut all = Vec::new();
    for op in ops {
        if let Op::File(path, _) | Op::Dir(path, _) = &op {
            all.extend(path.match_indices('/').map(|(at, _)| Op::Dir(path[..at].to_owned(), 0o750)));
        }
        all.push(op);
    }
    all
}

fn read_back(layers: &[Vec<Op>], form: Form) -> Model {
    let mut tree = Tree::new();
    for layer in layers {
        tree.apply::<MergeError>(layer.iter().map(|op| Ok(entry(op)))).expect("merges");
    }
    let mut image = Vec::new();
    let blocks = vec![LAYER_BLOCKS; layers.len()];
    let written = erofs::write(&tree, &blocks, form, &mut image).expect("writes");
    assert_eq!(written.bytes, image.len() as u64);
    let reader = Reader::new(image, &written.layer_offsets).expect("opens");
    let mut names = Vec::new();
    reader
        .walk(&mut |path, nid| names.push((String::from_utf8(path.to_vec()).expect("text"), nid)))
        .expect("walks");
    let mut sorted: Vec<u64> = names.iter().map(|(_, nid)| *nid).collect();
    sorted.sort_unstable();
    let paths = reader.paths(&sorted).expect("walks");
    assert!(paths.iter().all(Option::is_some));
    let mut found = Model::new();
    for (path, nid) in names.into_iter().filter(|(path, _)| !path.is_empty()) {
        assert_eq!(reader.lookup(path.as_bytes()).expect("reads"), Some(nid), "{path}");
        let object = match reader.location(nid).expect("reads") {
            Some(at) => Object::File { layer: at.layer, block: (at.store_offset / 4096) as u8 },
            None => Object::Dir { mode: reader.attributes(nid).expect("reads").mode & 0o7777 },
        };
        found.insert(path, object);
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stacks_equal_the_model(layers in proptest::collection::vec(proptest::collection::vec(op(), 0..12), 0..5)) {
        let layers: Vec<Vec<Op>> = layers.into_iter().map(with_parents).collect();
        let mut model = Model::new();
        for (number, ops) in layers.iter().enumerate() {
            apply(&mut model, number, ops);
        }
        prop_assert_eq!(&read_back(&layers, Form::Devices), &model);
        prop_assert_eq!(&read_back(&layers, Form::OneDevice), &model);
    }

    #[test]
    fn damaged_images_never_panic(seed in proptest::collection::vec((0..16_384usize, any::<u8>()), 1..40)) {
        let mut tree = Tree::new();
        let ops: Vec<Op> = (0..300).map(|n| Op::File(format!("d{}/f{n}", n % 7), n as u8 % 64)).collect();
        tree.apply::<MergeError>(ops.iter().map(|op| Ok(entry(op)))).expect("merges");
        let mut image = Vec::new();
        let written = erofs::write(&tree, &[LAYER_BLOCKS], Form::Devices, &mut image).expect("writes");
        let length = image.len();
        for (at, byte) in seed {
            image[at % length] = byte;
        }
        if let Ok(reader) = Reader::new(image, &written.layer_offsets) {
            let mut count = 0u32;
            // Errors are what is hoped for; an undamaged part reads as before.
            if reader.walk(&mut |_, _| count += 1).is_ok() {
                prop_assert!(count >= 1);
            }
        }
    }
}

#[test]
fn content_outside_its_layer_is_refused() {
    let mut tree = Tree::new();
    let file = Entry {
        path: b"f".to_vec(),
        kind: EntryKind::File { size: 8192, store_offset: (LAYER_BLOCKS - 1) * 4096 },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    };
    tree.apply::<MergeError>([Ok(file)].into_iter()).expect("merges");
    let error = erofs::write(&tree, &[LAYER_BLOCKS], Form::Devices, &mut Vec::new()).expect_err("accepted");
    assert!(matches!(error, erofs::ErofsError::OutsideLayer { layer: 0, .. }), "{error}");
}

#[test]
fn symbolic_links_cannot_be_used_to_nest_without_limit() {
    let mut tree = Tree::new();
    let object = |path: String, kind| Entry {
        path: path.into_bytes(),
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    };
    let deep = "d/".repeat(900);
    let mut entries = vec![object(format!("{deep}x"), EntryKind::Directory)];
    for round in 1..20 {
        let from = if round == 1 { String::new() } else { format!("l{}/", round - 1) };
        let target = format!("{from}{deep}").trim_end_matches('/').as_bytes().to_vec();
        entries.push(object(format!("l{round}"), EntryKind::Symlink { target }));
        entries.push(object(format!("l{round}/{deep}x"), EntryKind::Directory));
    }
    let merged = tree.apply::<MergeError>(entries.into_iter().map(Ok));
    assert!(matches!(merged, Err(MergeError::Path { .. })), "{merged:?}");
}

/// Thirty directories, each with two names, are a thousand million paths.
#[test]
fn a_directory_with_two_names_does_not_make_the_walk_endless() {
    let mut tree = Tree::new();
    let ops = (0..30).flat_map(|depth| {
        let parent = "a/".repeat(depth);
        [Op::Dir(format!("{parent}a"), 0o755), Op::Dir(format!("{parent}b"), 0o755)]
    });
    tree.apply::<MergeError>(ops.map(|op| Ok(entry(&op)))).expect("merges");
    let mut image = Vec::new();
    let written = erofs::write(&tree, &[0], Form::Devices, &mut image).expect("writes");
    let mut doubled = 0;
    for names in 48..image.len() - 5 {
        // Four entries of 12 bytes, then their names: `.`, `..`, `a`, `b`; `b` shall lead where `a` leads.
        if image[names..names + 5] == *b"...ab" && image[names - 40..names - 38] == 48_u16.to_le_bytes() {
            image.copy_within(names - 24..names - 16, names - 12);
            doubled += 1;
        }
    }
    assert_eq!(doubled, 30);
    let reader = Reader::new(image, &written.layer_offsets).expect("opens");
    let error = reader.walk(&mut |_, _| {}).expect_err("walked");
    assert!(error.to_string().contains("in two directories"), "{error}");
}
