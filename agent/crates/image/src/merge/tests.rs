//! The rules of the merge, one by one; random stacks stand in `tests/merge_model.rs`.

use super::*;

fn entry(path: &str, kind: EntryKind) -> Result<Entry, MergeError> {
    Ok(Entry {
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    })
}

fn file(path: &str) -> Result<Entry, MergeError> {
    entry(path, EntryKind::File { size: 1, store_offset: 0 })
}

fn dir(path: &str) -> Result<Entry, MergeError> {
    entry(path, EntryKind::Directory)
}

fn hard_link(path: &str, target: &str) -> Result<Entry, MergeError> {
    entry(path, EntryKind::HardLink { target: target.as_bytes().to_vec() })
}

fn symlink(path: &str, target: &str) -> Result<Entry, MergeError> {
    entry(path, EntryKind::Symlink { target: target.as_bytes().to_vec() })
}

fn merge(layers: Vec<Vec<Result<Entry, MergeError>>>) -> Result<Vec<String>, MergeError> {
    let mut tree = Tree::new();
    for layer in layers {
        tree.apply(layer.into_iter())?;
    }
    let mut out = Vec::new();
    let mut left = vec![(ROOT, String::new())];
    while let Some((number, path)) = left.pop() {
        if let Some(Inode { kind: Kind::Directory { children, .. }, .. }) = tree.inode(number) {
            for (name, child) in children {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                let layer = match tree.inode(child.inode).expect("inode").kind {
                    Kind::File { layer, .. } => format!("{layer}"),
                    Kind::Directory { .. } => "d".to_owned(),
                    _ => "l".to_owned(),
                };
                out.push(format!("{path}={layer}"));
                left.push((child.inode, path));
            }
        }
    }
    out.sort();
    Ok(out)
}

#[test]
fn whiteouts_hide_lower_layers_only_wherever_they_stand() {
    let lower = || vec![file("a/x"), file("a/y"), file("b"), file("c/deep/z")];
    for (upper, want) in [
        (vec![file("a/.wh.x")], vec!["/a/y=0", "/b=0", "/c/deep/z=0"]),
        (vec![file("a/x"), file("a/.wh.x")], vec!["/a/x=1", "/a/y=0", "/b=0", "/c/deep/z=0"]),
        (vec![file("a/new"), file("a/.wh..wh..opq")], vec!["/a/new=1", "/b=0", "/c/deep/z=0"]),
        (vec![file("a/.wh..wh..opq"), file("a/new")], vec!["/a/new=1", "/b=0", "/c/deep/z=0"]),
        (vec![file(".wh.c"), file(".wh.nothing"), file(".wh..wh.plnk")], vec!["/a/x=0", "/a/y=0", "/b=0"]),
        (vec![file("c/deep/new"), file(".wh.c")], vec!["/a/x=0", "/a/y=0", "/b=0", "/c/deep/new=1"]),
    ] {
        let merged = merge(vec![lower(), upper]).expect("merge");
        let files: Vec<&String> = merged.iter().filter(|line| !line.ends_with("=d")).collect();
        assert_eq!(files, want);
    }
}

#[test]
fn kinds_replace_each_other() {
    let merged = merge(vec![vec![dir("a"), file("a/x"), file("b")], vec![file("a"), dir("b"), file("b/y")]]);
    assert_eq!(merged.expect("merge"), ["/a=1", "/b/y=1", "/b=d"]);
    let merged = merge(vec![vec![file("a/x")], vec![dir("a")], vec![], vec![]]);
    assert_eq!(merged.expect("merge"), ["/a/x=0", "/a=d"]);
}

#[test]
fn parents_are_followed_inside_the_root() {
    let merged =
        merge(vec![vec![dir("usr"), dir("usr/lib"), symlink("lib", "usr/lib")], vec![file("lib/x")]]);
    assert_eq!(merged.expect("merge"), ["/lib=l", "/usr/lib/x=1", "/usr/lib=d", "/usr=d"]);
    let merged = merge(vec![vec![dir("a"), symlink("up", "../../../a")], vec![file("up/x")]]);
    assert_eq!(merged.expect("merge"), ["/a/x=1", "/a=d", "/up=l"]);
    let merged = merge(vec![vec![symlink("p", "q"), symlink("q", "p")], vec![file("p/x")]]);
    assert!(matches!(merged, Err(MergeError::Path { .. })), "{merged:?}");
}

#[test]
fn hard_links_share_an_inode_across_layers() {
    let mut tree = Tree::new();
    tree.apply(vec![file("a")].into_iter()).expect("merge");
    tree.apply(vec![hard_link("b", "a"), file(".wh.a")].into_iter()).expect("merge");
    let b = tree.child(ROOT, b"b").expect("b");
    assert_eq!(tree.inode(b.inode).expect("inode").links, 1);
    assert!(tree.child(ROOT, b"a").is_none());
    for (link, what) in [(hard_link("x", "none"), "no such"), (hard_link("x", "d"), "directory")] {
        let error = merge(vec![vec![dir("d"), link]]).expect_err("accepted");
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn attributes_that_images_may_not_set_are_left_out_and_counted() {
    let names = ["security.capability", "system.nfs4_acl", "trusted.overlay.opaque", "trusted.x", "user.y"];
    let mut with = dir("d").expect("entry");
    with.xattrs = names.iter().map(|name| (name.as_bytes().to_vec(), b"y".to_vec())).collect();
    let mut tree = Tree::new();
    tree.apply::<MergeError>([Ok(with)].into_iter()).expect("merge");
    let inode = tree.inode(tree.child(ROOT, b"d").expect("d").inode).expect("inode");
    let kept: Vec<&[u8]> = tree.xattrs(inode.xattrs).iter().map(|(name, _)| name.as_slice()).collect();
    assert_eq!(kept, [&b"security.capability"[..], b"trusted.x", b"user.y"]);
    assert_eq!(tree.dropped(), Dropped { overlay_xattrs: 1, foreign_xattrs: 1 });
    assert_eq!(tree.dropped().notes().len(), 2);
    assert!(Tree::new().dropped().notes().is_empty());
}

#[test]
fn device_numbers_that_linux_cannot_hold_are_refused() {
    for (major, minor, accepted) in
        [(4095, 1_048_575, true), (4096, 0, false), (0, 1_048_576, false), (u32::MAX, u32::MAX, false)]
    {
        for kind in [EntryKind::CharDevice { major, minor }, EntryKind::BlockDevice { major, minor }] {
            let merged = merge(vec![vec![entry("dev/x", kind)]]);
            assert_eq!(merged.is_ok(), accepted, "{major}:{minor}: {merged:?}");
        }
    }
}

#[test]
fn more_layers_than_are_accepted_are_refused() {
    let mut tree = Tree::new();
    for _ in 0..MAX_LAYERS {
        tree.apply::<MergeError>(std::iter::empty()).expect("merge");
    }
    let error = tree.apply::<MergeError>(std::iter::empty()).expect_err("accepted");
    assert_eq!(error, MergeError::TooManyLayers(MAX_LAYERS));
}
