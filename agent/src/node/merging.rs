//! Entries of an image's layers, from where they are decoded to where they are merged: so each layer is decoded once, for the tables
//! in the store and for the image's tree, and layers are merged while others are still on their way.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use sluice_image::entry::Entry;
use sluice_image::merge::Tree;
use sluice_registry::Layer;
use tokio::task::JoinHandle;

use super::metadata::{MERGED_HERE, apply_stored};

/// Entries given at a time.
const BATCH: usize = 512;

/// What is given of a layer. One whose way ends with none of the last two did not come.
#[derive(Debug)]
enum Given {
    Entries(Vec<Entry>),
    /// There are no more.
    End,
    /// All of it is in the store, and decoded from this index when its turn comes: nothing of it waits in memory.
    Stored(PathBuf),
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Merging {
    ways: Mutex<HashMap<String, Sender<Given>>>,
    /// Entries that may still be kept: those of a layer wait for the layers below it.
    room: AtomicU64,
    void: AtomicBool,
    tree: JoinHandle<Result<Option<Tree>, anyhow::Error>>,
}

impl Merging {
    /// Of `layers`, lowest first. None if one is there twice, since it would have to be kept.
    pub(super) fn begin(layers: &[Layer]) -> Option<Self> {
        let mut ways = HashMap::new();
        let mut arrivals = Vec::new();
        for layer in layers {
            let (sender, receiver) = channel();
            if ways.insert(layer.digest.clone(), sender).is_some() {
                return None;
            }
            arrivals.push((layer.digest.clone(), receiver));
        }
        let tree = tokio::task::spawn_blocking(move || merge(arrivals));
        let (ways, room) = (Mutex::new(ways), AtomicU64::new(MERGED_HERE));
        Some(Self { ways, room, void: AtomicBool::new(false), tree })
    }

    /// The way for a layer's entries, of which the index tells the number; none if they are too many.
    pub(super) fn way(&self, layer: &str, count: u64) -> Option<Way> {
        let to = self.ways.lock().unwrap_or_else(PoisonError::into_inner).remove(layer)?;
        let take = |room: u64| room.checked_sub(count);
        self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        Some(Way { to, batch: Vec::new(), ends: count == 0 })
    }

    /// What was given is not what is in the store.
    pub(super) fn give_up(&self) {
        self.void.store(true, Ordering::Relaxed);
    }

    /// The tree, if all entries of all layers were given.
    pub(super) async fn tree(self) -> Result<Option<Tree>> {
        // Layers that nobody gives will not come any more.
        drop(self.ways);
        let tree = self.tree.await.context("the merge of the layers was cut short")??;
        Ok(tree.filter(|_| !self.void.load(Ordering::Relaxed)))
    }
}

fn merge(arrivals: Vec<(String, Receiver<Given>)>) -> Result<Option<Tree>> {
    let mut tree = Tree::new();
    for (layer, given) in arrivals {
        let mut whole = false;
        let applied = match given.recv() {
            Err(_did_not_come) => return Ok(None),
            Ok(Given::Stored(index)) => {
                whole = true;
                apply_stored(&mut tree, &index)
            }
            Ok(first) => {
                let mut next = Some(first);
                let batches = std::iter::from_fn(|| match next.take().or_else(|| given.recv().ok()) {
                    Some(Given::Entries(batch)) => Some(batch),
                    last => {
                        whole = matches!(last, Some(Given::End));
                        None
                    }
                });
                tree.apply(batches.flatten().map(Ok))
            }
        };
        applied.with_context(|| format!("layer {layer}"))?;
        if !whole {
            return Ok(None);
        }
    }
    Ok(Some(tree))
}

/// Takes a layer's entries in order. They end where it is dropped, unless none came though there are some.
#[derive(Debug)]
pub(super) struct Way {
    to: Sender<Given>,
    batch: Vec<Entry>,
    ends: bool,
}

impl Way {
    pub(super) fn push(&mut self, entry: Entry) {
        self.ends = true;
        self.batch.push(entry);
        if self.batch.len() == BATCH {
            let batch = std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH));
            self.send(Given::Entries(batch));
        }
    }

    /// The layer is in the store, with its index.
    pub(super) fn stored(mut self, index: PathBuf) {
        self.ends = false;
        self.send(Given::Stored(index));
    }

    fn send(&self, given: Given) {
        // Where the merge has failed nobody takes it.
        drop(self.to.send(given));
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        if self.ends {
            let rest = std::mem::take(&mut self.batch);
            self.send(Given::Entries(rest));
            self.send(Given::End);
        }
    }
}

#[cfg(test)]
mod tests {
    use sluice_image::entry::EntryKind;

    use super::*;

    fn layers(digests: &[&str]) -> Vec<Layer> {
        let layer = |digest: &&str| Layer {
            digest: (*digest).to_owned(),
            size: 1,
            media_type: String::new(),
            diff_id: String::new(),
            annotations: HashMap::new(),
        };
        digests.iter().map(layer).collect()
    }

    fn give(merging: &Merging, layer: &str, names: &[String]) {
        let mut way = merging.way(layer, names.len() as u64).expect("there is room");
        for name in names {
            way.push(Entry {
                path: name.clone().into_bytes(),
                kind: EntryKind::Directory,
                mode: 0o755,
                uid: 0,
                gid: 0,
                mtime: sluice_image::entry::Timestamp::default(),
                xattrs: Vec::new(),
            });
        }
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("dir{number}")).collect()
    }

    #[tokio::test]
    async fn layers_are_merged_in_their_order_whenever_they_come() {
        let merging = Merging::begin(&layers(&["a", "b", "c"])).expect("begun");
        give(&merging, "c", &[".wh.dir1".to_owned(), "dir0/x".to_owned()]);
        give(&merging, "b", &[]);
        give(&merging, "a", &names(BATCH * 3));
        let tree = merging.tree().await.expect("merged").expect("all came");
        // The root, all directories, and one more: what a whiteout hides stays without a name.
        assert_eq!(tree.inode_count(), 1 + BATCH * 3 + 1);
    }

    #[tokio::test]
    async fn there_is_no_tree_of_a_part() {
        let merging = Merging::begin(&layers(&["a", "b"])).expect("begun");
        give(&merging, "a", &names(3));
        assert!(merging.tree().await.expect("no error").is_none(), "b did not come");

        let merging = Merging::begin(&layers(&["a"])).expect("begun");
        // It was in the store already when it was to be decoded.
        drop(merging.way("a", 3));
        assert!(merging.tree().await.expect("no error").is_none());

        let merging = Merging::begin(&layers(&["a"])).expect("begun");
        assert!(merging.way("a", MERGED_HERE + 1).is_none(), "too many to be kept");
        assert!(merging.tree().await.expect("no error").is_none());

        let merging = Merging::begin(&layers(&["a"])).expect("begun");
        give(&merging, "a", &names(3));
        merging.give_up();
        assert!(merging.tree().await.expect("no error").is_none(), "another index is in the store");
        assert!(Merging::begin(&layers(&["a", "a"])).is_none());
    }
}
