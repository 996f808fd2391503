//! An image's EROFS metadata: its layers' tables of contents, merged and written.
//!
//! The tree of a merge takes some 180 bytes per entry, and images may have millions. The agent's memory must not depend on
//! that, so a large tree is merged in a process of its own (`sluice write-metadata`), with which its memory goes.

use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use sluice_image::entry::Entry;
use sluice_image::erofs::{self, Form};
use sluice_image::index::LayerIndex;
use sluice_image::index::header::{HEADER_LEN, IndexHeader};
use sluice_image::merge::Tree;
use sluice_registry::ResolvedImage;

use super::Node;

/// Entries that the agent merges itself: at most 9 MiB of heap, and a process of its own would cost several milliseconds.
pub(super) const MERGED_HERE: u64 = 50_000;

/// Entries decoded at a time, and how many times ahead of the merge.
const BATCH: usize = 512;
const BATCHES_AHEAD: usize = 4;

/// What is to be merged, lowest layer first, and where to.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    layers: Vec<LayerTable>,
    /// As [`Form::OneDevice`].
    one_device: bool,
    temporary: PathBuf,
    target: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct LayerTable {
    digest: String,
    index: PathBuf,
    /// Of its local file.
    blocks: u64,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Metadata {
    /// Blocks of each layer's local file.
    pub(super) layer_blocks: Vec<u64>,
    /// What the layers have that the image cannot.
    pub(super) notes: Vec<String>,
}

impl Node {
    /// Writes the image's EROFS metadata into the store: of the layers' tables of contents as they were `merged` already, else they
    /// are decoded again and merged here.
    pub(super) async fn write_metadata(
        &self,
        image: &ResolvedImage,
        merged: Option<Tree>,
    ) -> Result<Metadata> {
        let (store, layers, config) = (self.store.clone(), image.layers.clone(), self.config.file.clone());
        let target = self.store.erofs_path(&image.manifest_digest)?;
        let one_device = self.form == Form::OneDevice;
        tokio::task::spawn_blocking(move || -> Result<Metadata> {
            let mut job = Job { layers: Vec::new(), one_device, temporary: store.temporary(), target };
            let mut entries = 0_u64;
            for layer in layers {
                let stored = store.layer(&layer.digest)?;
                let stored = stored.with_context(|| format!("layer {} vanished", layer.digest))?;
                let index = stored.index_path();
                let header =
                    stored_header(&index).with_context(|| format!("index of layer {}", layer.digest))?;
                entries = entries.saturating_add(header.entry_count.get());
                let blocks = stored.size() / sluice_image::records::BLOCK_SIZE;
                job.layers.push(LayerTable { digest: layer.digest, index, blocks });
            }
            match merged {
                Some(tree) => job.write(&tree),
                None if entries > MERGED_HERE => job.run_elsewhere(config.as_deref()),
                None => job.run(),
            }
        })
        .await?
    }
}

/// Applies a layer by its index in the store; the next entries are decoded meanwhile.
pub(super) fn apply_stored(tree: &mut Tree, index: &Path) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, decoded) = sync_channel(BATCHES_AHEAD);
        scope.spawn(move || decode(index, &sender));
        tree.apply(decoded.into_iter().flatten())
    })
}

/// Gives all entries, or the error that keeps some from being given last, as long as anybody takes them.
fn decode(index: &Path, to: &SyncSender<Vec<Result<Entry>>>) {
    let decode = || -> Result<()> {
        let index = LayerIndex::from_blob(std::fs::read(index)?).context("its index")?;
        let mut batch = Vec::with_capacity(BATCH);
        for entry in index.entries()? {
            batch.push(Ok(entry?));
            if batch.len() == BATCH
                && to.send(std::mem::replace(&mut batch, Vec::with_capacity(BATCH))).is_err()
            {
                return Ok(());
            }
        }
        drop(to.send(batch));
        Ok(())
    };
    if let Err(error) = decode() {
        drop(to.send(vec![Err(error)]));
    }
}

impl Job {
    fn run(&self) -> Result<Metadata> {
        self.write(&self.merged()?)
    }

    fn write(&self, tree: &Tree) -> Result<Metadata> {
        let layer_blocks: Vec<u64> = self.layers.iter().map(|layer| layer.blocks).collect();
        let file = tempfile::NamedTempFile::new_in(&self.temporary)
            .with_context(|| format!("cannot create a file in {}", self.temporary.display()))?;
        let mut file = BufWriter::new(file);
        let form = if self.one_device { Form::OneDevice } else { Form::Devices };
        erofs::write(tree, &layer_blocks, form, &mut file)?;
        let file = file.into_inner().map_err(|error| anyhow!("cannot write the EROFS image: {error}"))?;
        file.as_file().sync_data()?;
        file.persist(&self.target).with_context(|| format!("cannot write {}", self.target.display()))?;
        Ok(Metadata { layer_blocks, notes: tree.dropped().notes() })
    }

    /// Layers are applied one after the other.
    fn merged(&self) -> Result<Tree> {
        let mut tree = Tree::new();
        for layer in &self.layers {
            apply_stored(&mut tree, &layer.index).with_context(|| format!("layer {}", layer.digest))?;
        }
        Ok(tree)
    }

    fn run_elsewhere(&self, config: Option<&Path>) -> Result<Metadata> {
        let mut command = Command::new(crate::program::own()?);
        if let Some(config) = config {
            command.arg("--config").arg(config);
        }
        let mut worker = command
            .arg("write-metadata")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start a process that merges the layers")?;
        if let Some(mut input) = worker.stdin.take() {
            input.write_all(&serde_json::to_vec(self)?)?;
        }
        let output = worker.wait_with_output().context("cannot wait for the merge of the layers")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}", said.trim().trim_start_matches("sluice: "));
        }
        serde_json::from_slice(&output.stdout).context("the merge of the layers gave no result")
    }
}

/// `sluice write-metadata`: a job on standard input, its result on standard output.
pub(crate) fn merge_for_agent() -> Result<()> {
    let mut job = Vec::new();
    std::io::stdin().lock().read_to_end(&mut job)?;
    let job: Job = serde_json::from_slice(&job).context("no job on standard input")?;
    Ok(serde_json::to_writer(std::io::stdout().lock(), &job.run()?)?)
}

/// The header of an index in the store.
pub(super) fn stored_header(index: &Path) -> Result<IndexHeader> {
    let mut header = vec![0; HEADER_LEN];
    std::fs::File::open(index)?.read_exact(&mut header)?;
    Ok(IndexHeader::parse(&header)?)
}
