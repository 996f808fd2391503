//! Indexes that say what is not so, from a store that the node trusts: found out, quarantined, the image fetched the ordinary way.

use std::path::PathBuf;

use crate::rig::{Node, assert_content, large, sha256, wait_until};

/// Offsets in the header of an index (`agent/crates/image/src/index/header.rs`).
const TOC_DIGEST: usize = 128;
const SECTIONS: usize = 160;
const HEADER_LEN: usize = 280;

/// An index blob taken apart.
struct Index {
    header: Vec<u8>,
    sections: Vec<Vec<u8>>,
}

impl Index {
    fn parse(blob: &[u8]) -> Self {
        let number =
            |at: usize| usize::try_from(u64::from_le_bytes(blob[at..at + 8].try_into().unwrap())).unwrap();
        let section = |place: usize| {
            let (start, len) = (number(SECTIONS + place * 24), number(SECTIONS + place * 24 + 8));
            blob[start..start + len].to_vec()
        };
        Self { header: blob[..HEADER_LEN].to_vec(), sections: (0..5).map(section).collect() }
    }

    /// The skeleton, changed.
    fn skeleton(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut raw = zstd::decode_all(self.sections[0].as_slice()).unwrap();
        change(&mut raw);
        self.sections[0] = zstd::bulk::compress(&raw, 3).unwrap();
    }

    /// A blob that is consistent in itself.
    fn blob(mut self) -> Vec<u8> {
        let mut offset = HEADER_LEN;
        for (place, section) in self.sections.iter().enumerate() {
            let at = SECTIONS + place * 24;
            self.header[at..at + 8].copy_from_slice(&(offset as u64).to_le_bytes());
            self.header[at + 8..at + 16].copy_from_slice(&(section.len() as u64).to_le_bytes());
            offset += section.len();
        }
        let toc: Vec<u8> = self.sections[..4].concat();
        self.header[TOC_DIGEST..TOC_DIGEST + 32].copy_from_slice(blake3::hash(&toc).as_bytes());
        [self.header, self.sections.concat()].concat()
    }
}

/// A node that trusts its store, in which the largest index was changed by somebody who can write there.
fn with_a_lie(lie: impl FnOnce(&mut Index)) -> Node {
    let node = Node::new("");
    let store = node.path("indexes");
    let url = format!("file://{}", store.display());
    node.ok(&["index", "--store", &url, &node.image()]);
    let dir = store.join("sluice/v1/index");
    let blobs: Vec<PathBuf> =
        std::fs::read_dir(dir.join("blobs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let largest = blobs.iter().max_by_key(|path| std::fs::metadata(path).unwrap().len()).unwrap();
    let honest = std::fs::read(largest).unwrap();
    let mut index = Index::parse(&honest);
    lie(&mut index);
    let lying = index.blob();
    // As its publisher would have: named by its digests.
    std::fs::write(dir.join("blobs").join(format!("sha256-{}", sha256(&lying))), &lying).unwrap();
    let header = u64::try_from(lying.len() - Index::parse(&lying).sections[4].len()).unwrap();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_file() {
            continue;
        }
        let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for layer in manifest["layers"].as_array_mut().unwrap() {
            if layer["digest"] == format!("sha256:{}", sha256(&honest)) {
                layer["digest"] = format!("sha256:{}", sha256(&lying)).into();
                layer["size"] = lying.len().into();
                layer["annotations"]["dev.sluice.index.toc-length"] = header.to_string().into();
                layer["annotations"]["dev.sluice.index.header"] =
                    format!("sha256:{}", sha256(&lying[..HEADER_LEN])).into();
            }
        }
        std::fs::write(&path, manifest.to_string()).unwrap();
    }
    std::fs::write(node.path("config.toml"), format!("index_store = {url:?}\npublish_index = false\n"))
        .unwrap();
    node
}

/// Makes `/bin/busybox` set-user-id: the mode, and the checksum of its header.
fn set_user_id(index: &mut Index) {
    index.skeleton(|tar| {
        let name = b"bin/busybox\0";
        let at = tar.windows(name.len()).position(|window| window == name).unwrap();
        let header = &mut tar[at..at + 512];
        assert_eq!(&header[100..108], b"0000755\0");
        header[100..108].copy_from_slice(b"0004755\0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    });
}

/// Says that the last chunk is another: a claim that no bytes of the layer fulfil.
fn wrong_digest(index: &mut Index) {
    let last = index.sections[2].len() - 1;
    index.sections[2][last] ^= 1;
}

fn caught(node: &Node) {
    wait_until("the lie is found out", || node.status()["indexes_quarantined"] == 1);
    wait_until("the image is local", || node.status()["images"][0]["state"] == "local");
    let events = node.ok(&["events"]);
    assert!(events.contains("IndexQuarantined") || events.contains("lied"), "{events}");
    let kept = std::fs::read_dir(node.path("root/trust/quarantine")).unwrap().count();
    assert_eq!(kept, 1, "it is kept to be looked at");
    // Whoever starts now gets the image as it is.
    let dir = node.room("after");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    assert_content(&dir.join("data/large"), &large());
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(dir.join("bin/busybox")).unwrap());
    assert_eq!(mode & 0o7777, 0o755);
    node.ok(&["umount", &dir.to_string_lossy()]);
    let said = String::from_utf8(node.run(&["check", &node.image()]).stdout).unwrap();
    assert!(said.contains("quarantine"), "{said}");
    assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
}

#[test]
fn an_index_that_invents_metadata_is_found_out_and_never_used_again() {
    let node = with_a_lie(set_user_id);
    assert_eq!(node.shell("cat /data/changed"), "after");
    caught(&node);
    // Neither after everything is fetched anew.
    node.ok(&["rm", &node.image()]);
    assert_eq!(node.shell("cat /data/changed"), "after");
    assert_eq!(node.status()["indexes_quarantined"], 1, "it was not believed again");
    assert_eq!(node.status()["images"][0]["state"], "local", "pulled in order");
}

#[test]
fn an_index_that_invents_digests_is_found_out() {
    let node = with_a_lie(wrong_digest);
    assert_eq!(node.shell("cat /data/changed"), "after");
    caught(&node);
}

/// Every checkpoint's window is another: what decodes from there is nothing that the digests allow.
fn wrong_windows(index: &mut Index) {
    for byte in &mut index.sections[4] {
        *byte ^= 0x55;
    }
}

#[test]
fn checkpoints_that_decode_elsewhere_show_nothing_wrong_and_the_layer_comes_whole() {
    let node = with_a_lie(wrong_windows);
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    // Who reads by the lie waits for the whole.
    assert_content(&dir.join("data/large"), &large());
    wait_until("the image is local", || node.status()["images"][0]["state"] == "local");
    // Its contents were true: who has it mounted goes on.
    assert_eq!(node.status()["indexes_quarantined"], 0);
    node.ok(&["umount", &dir.to_string_lossy()]);
}

#[test]
fn a_mount_made_by_a_lie_ends_with_errors_and_not_with_lies() {
    let node = with_a_lie(set_user_id);
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    caught(&node);
    // What was read before stays in the page cache; nothing else comes through the old mount.
    match std::fs::read(dir.join("data/many/299")) {
        Ok(found) => assert_eq!(found, crate::rig::one_of_many(299)),
        Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}"),
    }
    node.ok(&["umount", &dir.to_string_lossy()]);
}
