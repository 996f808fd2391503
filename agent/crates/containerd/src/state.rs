//! The snapshots' database: names, parents, labels. Every change is one transaction.
//!
//! The rules (what may be a parent, what may be removed) are those of containerd's own snapshotters. Files are not known here.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::remote::{RemoteLayer, labels};
use crate::usage::Usage;

/// Snapshots by name.
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
/// Pairs of parent (empty for none) and child.
const CHILDREN: TableDefinition<(&str, &str), ()> = TableDefinition::new("children");
/// Snapshots of layers that the node serves, by digest (of their layer, and of their image's manifest) and id.
const REMOTE: TableDefinition<(&str, u64), ()> = TableDefinition::new("remote");
/// `next_id`.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// What is not possible with a snapshot.
#[derive(Debug, Error)]
pub enum StateError {
    /// There is none of this name.
    #[error("snapshot {0} does not exist")]
    NotFound(String),
    /// There is one of this name.
    #[error("snapshot {0} already exists")]
    Exists(String),
    /// What was asked for does not fit the snapshot's state.
    #[error("snapshot {name}: {reason}")]
    State {
        /// Its name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// The question makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The database fails.
    #[error("the snapshots' database fails")]
    Database(#[source] Box<redb::Error>),
    /// A record is not one of ours.
    #[error("a snapshot's record is damaged")]
    Record(#[from] serde_json::Error),
}

fn db<E: Into<redb::Error>>(error: E) -> StateError {
    StateError::Database(Box::new(error.into()))
}

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Read-only, no parent of others.
    View,
    /// Writable.
    Active,
    /// Unchangeable; a parent of others.
    Committed,
}

impl Kind {
    /// As containerd writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// What containerd may know of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its key or name.
    pub name: String,
    /// Its parent's name, maybe empty.
    pub parent: String,
    /// What it is.
    pub kind: Kind,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Since 1970.
    pub created: Duration,
    /// Since 1970.
    pub updated: Duration,
}

/// What the database holds of a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Names its directory; never used again.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) parent: String,
    pub(crate) labels: BTreeMap<String, String>,
    created: Duration,
    updated: Duration,
    /// Of a committed one with files of its own.
    pub(crate) usage: Usage,
    /// Set for a layer that is served by the node: there is no directory then.
    pub(crate) remote: Option<RemoteLayer>,
}

impl Record {
    pub(crate) fn info(self, name: &str) -> SnapshotInfo {
        SnapshotInfo {
            name: name.to_owned(),
            parent: self.parent,
            kind: self.kind,
            labels: self.labels,
            created: self.created,
            updated: self.updated,
        }
    }
}

/// Where a snapshot's files are, topmost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stack {
    /// The snapshot's own.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// Committed snapshots with directories below it.
    pub(crate) parents: Vec<u64>,
    /// What the node serves below those, all layers in one.
    pub(crate) base: Option<RemoteLayer>,
}

/// How a removed snapshot's traces are to be cleaned.
#[derive(Debug)]
pub(crate) struct Removed {
    pub(crate) record: Record,
    /// The last snapshot of this image manifest is gone.
    pub(crate) last_of_image: Option<String>,
}

#[derive(Debug)]
pub(crate) struct State {
    database: Database,
}

impl State {
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let database = Database::create(path).map_err(db)?;
        let write = database.begin_write().map_err(db)?;
        write.open_table(SNAPSHOTS).map_err(db)?;
        write.open_table(CHILDREN).map_err(db)?;
        write.open_table(REMOTE).map_err(db)?;
        write.open_table(META).map_err(db)?;
        write.commit().map_err(db)?;
        Ok(Self { database })
    }

    pub(crate) fn get(&self, name: &str) -> Result<Record, StateError> {
        let read = self.database.begin_read().map_err(db)?;
        find(&read.open_table(SNAPSHOTS).map_err(db)?, name)?
            .ok_or_else(|| StateError::NotFound(name.to_owned()))
    }

    pub(crate) fn all(&self) -> Result<Vec<(String, Record)>, StateError> {
        let read = self.database.begin_read().map_err(db)?;
        let table = read.open_table(SNAPSHOTS).map_err(db)?;
        let mut all = Vec::new();
        for row in table.iter().map_err(db)? {
            let (name, record) = row.map_err(db)?;
            all.push((name.value().to_owned(), serde_json::from_slice(record.value())?));
        }
        Ok(all)
    }

    /// Where the files of an active snapshot or a view are.
    pub(crate) fn stack(&self, name: &str) -> Result<Stack, StateError> {
        let read = self.database.begin_read().map_err(db)?;
        let table = read.open_table(SNAPSHOTS).map_err(db)?;
        let record = find(&table, name)?.ok_or_else(|| StateError::NotFound(name.to_owned()))?;
        if record.kind == Kind::Committed {
            return Err(refuse(name, "it is committed, neither active nor a view"));
        }
        let (parents, base) = below(&table, &record.parent)?;
        Ok(Stack { id: record.id, kind: record.kind, parents, base })
    }

    /// What a snapshot on `parent` would stand on.
    pub(crate) fn below(&self, parent: &str) -> Result<(Vec<u64>, Option<RemoteLayer>), StateError> {
        let read = self.database.begin_read().map_err(db)?;
        below(&read.open_table(SNAPSHOTS).map_err(db)?, parent)
    }

    /// Sets an id aside; it is never given again.
    pub(crate) fn next_id(&self) -> Result<u64, StateError> {
        let write = self.database.begin_write().map_err(db)?;
        let id = take_id(&write)?;
        write.commit().map_err(db)?;
        Ok(id)
    }

    /// Adds an active snapshot or a view. `files_ready` runs when nothing else can fail any more but the commit itself.
    pub(crate) fn create(
        &self,
        new: &NewSnapshot<'_>,
        files_ready: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<std::io::Result<()>, StateError> {
        let NewSnapshot { id, kind, name, parent, labels } = *new;
        let write = self.database.begin_write().map_err(db)?;
        check_new(&write, name, parent)?;
        let record = record(id, kind, parent, labels.clone(), None);
        put(&write, name, &record)?;
        if let Err(error) = files_ready() {
            write.abort().map_err(db)?;
            return Ok(Err(error));
        }
        write.commit().map_err(db)?;
        Ok(Ok(()))
    }

    /// Adds the committed snapshot of a layer that the node serves. False if it is there already.
    pub(crate) fn create_remote(
        &self,
        parent: &str,
        snapshot_labels: &BTreeMap<String, String>,
        layer: &RemoteLayer,
    ) -> Result<bool, StateError> {
        let write = self.database.begin_write().map_err(db)?;
        if remote_child(&write, parent, &layer.chain_id)? {
            return Ok(false);
        }
        let id = take_id(&write)?;
        // The same layers may stand on different parents in different namespaces: the id keeps the names apart.
        let name = format!("remote/{id}/{}", layer.chain_id);
        check_new(&write, &name, parent)?;
        let record = record(id, Kind::Committed, parent, snapshot_labels.clone(), Some(layer.clone()));
        put(&write, &name, &record)?;
        write.commit().map_err(db)?;
        Ok(true)
    }

    /// Makes an active snapshot a committed one with another name.
    pub(crate) fn commit(
        &self,
        key: &str,
        name: &str,
        labels: &BTreeMap<String, String>,
        usage: Usage,
    ) -> Result<(), StateError> {
        let write = self.database.begin_write().map_err(db)?;
        let active = {
            let table = write.open_table(SNAPSHOTS).map_err(db)?;
            find(&table, key)?.ok_or_else(|| StateError::NotFound(key.to_owned()))?
        };
        if active.kind != Kind::Active {
            return Err(refuse(key, "it is not active"));
        }
        check_new(&write, name, &active.parent)?;
        take(&write, key, &active)?;
        let mut committed = record(active.id, Kind::Committed, &active.parent, labels.clone(), None);
        committed.usage = usage;
        put(&write, name, &committed)?;
        write.commit().map_err(db)
    }

    pub(crate) fn remove(&self, name: &str) -> Result<Removed, StateError> {
        let write = self.database.begin_write().map_err(db)?;
        let record = {
            let table = write.open_table(SNAPSHOTS).map_err(db)?;
            find(&table, name)?.ok_or_else(|| StateError::NotFound(name.to_owned()))?
        };
        if !children(&write, name)?.is_empty() {
            return Err(refuse(name, "it has children"));
        }
        take(&write, name, &record)?;
        let mut last_of_image = None;
        if let Some(remote) = &record.remote {
            let table = write.open_table(REMOTE).map_err(db)?;
            if first_with(&table, &remote.manifest_digest)?.is_none() {
                last_of_image = Some(remote.manifest_digest.clone());
            }
        }
        write.commit().map_err(db)?;
        Ok(Removed { record, last_of_image })
    }

    /// Changes labels: all of them, or those that `paths` name (`labels`, `labels.KEY`).
    pub(crate) fn update(
        &self,
        name: &str,
        new_labels: &BTreeMap<String, String>,
        paths: &[String],
    ) -> Result<Record, StateError> {
        let write = self.database.begin_write().map_err(db)?;
        let record = {
            let mut table = write.open_table(SNAPSHOTS).map_err(db)?;
            let mut record = find(&table, name)?.ok_or_else(|| StateError::NotFound(name.to_owned()))?;
            if paths.is_empty() {
                record.labels = new_labels.clone();
            }
            for path in paths {
                apply_path(&mut record.labels, new_labels, path)?;
            }
            record.updated = now();
            table.insert(name, serde_json::to_vec(&record)?.as_slice()).map_err(db)?;
            record
        };
        write.commit().map_err(db)?;
        Ok(record)
    }

    /// True if a snapshot with a smaller id has the same layer: content counts once.
    pub(crate) fn is_counted_elsewhere(&self, record: &Record) -> Result<bool, StateError> {
        let Some(layer) = &record.remote else { return Ok(false) };
        let read = self.database.begin_read().map_err(db)?;
        let first = first_with(&read.open_table(REMOTE).map_err(db)?, &layer.layer_digest)?;
        Ok(first.is_some_and(|id| id < record.id))
    }
}

/// What `State::create` adds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewSnapshot<'a> {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) name: &'a str,
    pub(crate) parent: &'a str,
    pub(crate) labels: &'a BTreeMap<String, String>,
}

fn apply_path(
    labels: &mut BTreeMap<String, String>,
    new_labels: &BTreeMap<String, String>,
    path: &str,
) -> Result<(), StateError> {
    if path == "labels" {
        *labels = new_labels.clone();
        return Ok(());
    }
    let key = path
        .strip_prefix("labels.")
        .ok_or_else(|| StateError::Invalid(format!("`{path}` of a snapshot cannot be changed")))?;
    match new_labels.get(key) {
        Some(value) => labels.insert(key.to_owned(), value.clone()),
        None => labels.remove(key),
    };
    Ok(())
}

fn refuse(name: &str, reason: &'static str) -> StateError {
    StateError::State { name: name.to_owned(), reason }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn record(
    id: u64,
    kind: Kind,
    parent: &str,
    labels: BTreeMap<String, String>,
    remote: Option<RemoteLayer>,
) -> Record {
    let (created, updated) = (now(), now());
    Record { id, kind, parent: parent.to_owned(), labels, created, updated, usage: Usage::default(), remote }
}

fn find(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Option<Record>, StateError> {
    let Some(record) = table.get(name).map_err(db)? else { return Ok(None) };
    Ok(Some(serde_json::from_slice(record.value())?))
}

fn below(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    parent: &str,
) -> Result<(Vec<u64>, Option<RemoteLayer>), StateError> {
    let mut ids = Vec::new();
    let mut name = parent.to_owned();
    while !name.is_empty() {
        let record = find(table, &name)?.ok_or_else(|| StateError::NotFound(name.clone()))?;
        if record.kind != Kind::Committed {
            return Err(StateError::Invalid(format!("parent {name} is not committed")));
        }
        if record.remote.is_some() {
            return Ok((ids, record.remote));
        }
        ids.push(record.id);
        name = record.parent;
    }
    Ok((ids, None))
}

fn take_id(write: &WriteTransaction) -> Result<u64, StateError> {
    let mut meta = write.open_table(META).map_err(db)?;
    let id = meta.get("next_id").map_err(db)?.map_or(1, |id| id.value());
    meta.insert("next_id", id + 1).map_err(db)?;
    Ok(id)
}

fn check_new(write: &WriteTransaction, name: &str, parent: &str) -> Result<(), StateError> {
    if name.is_empty() {
        return Err(StateError::Invalid("a snapshot needs a name".to_owned()));
    }
    let table = write.open_table(SNAPSHOTS).map_err(db)?;
    if find(&table, name)?.is_some() {
        return Err(StateError::Exists(name.to_owned()));
    }
    if !parent.is_empty() {
        let found = find(&table, parent)?.ok_or_else(|| StateError::NotFound(parent.to_owned()))?;
        if found.kind != Kind::Committed {
            return Err(StateError::Invalid(format!("parent {parent} is not committed")));
        }
    }
    Ok(())
}

fn put(write: &WriteTransaction, name: &str, record: &Record) -> Result<(), StateError> {
    let bytes = serde_json::to_vec(record)?;
    write.open_table(SNAPSHOTS).map_err(db)?.insert(name, bytes.as_slice()).map_err(db)?;
    write.open_table(CHILDREN).map_err(db)?.insert((record.parent.as_str(), name), ()).map_err(db)?;
    let mut table = write.open_table(REMOTE).map_err(db)?;
    for digest in digests(record) {
        table.insert((digest, record.id), ()).map_err(db)?;
    }
    Ok(())
}

fn take(write: &WriteTransaction, name: &str, record: &Record) -> Result<(), StateError> {
    write.open_table(SNAPSHOTS).map_err(db)?.remove(name).map_err(db)?;
    write.open_table(CHILDREN).map_err(db)?.remove((record.parent.as_str(), name)).map_err(db)?;
    let mut table = write.open_table(REMOTE).map_err(db)?;
    for digest in digests(record) {
        table.remove((digest, record.id)).map_err(db)?;
    }
    Ok(())
}

/// By what a snapshot of a served layer is found.
fn digests(record: &Record) -> impl Iterator<Item = &str> {
    record.remote.iter().flat_map(|layer| [layer.layer_digest.as_str(), layer.manifest_digest.as_str()])
}

/// The smallest id of a served snapshot with this digest.
fn first_with(
    table: &impl ReadableTable<(&'static str, u64), ()>,
    digest: &str,
) -> Result<Option<u64>, StateError> {
    let first = table.range((digest, 0)..=(digest, u64::MAX)).map_err(db)?.next();
    Ok(first.transpose().map_err(db)?.map(|(key, _)| key.value().1))
}

fn children(write: &WriteTransaction, parent: &str) -> Result<Vec<String>, StateError> {
    let table = write.open_table(CHILDREN).map_err(db)?;
    let mut names = Vec::new();
    for row in table.range((parent, "")..).map_err(db)? {
        let (key, _) = row.map_err(db)?;
        let (of, name) = key.value();
        if of != parent {
            break;
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

/// Whether one of `parent`'s children is the remote snapshot for `chain_id`.
fn remote_child(write: &WriteTransaction, parent: &str, chain_id: &str) -> Result<bool, StateError> {
    let names = children(write, parent)?;
    let table = write.open_table(SNAPSHOTS).map_err(db)?;
    for name in names {
        if let Some(record) = find(&table, &name)?
            && record.remote.is_some()
            && record.labels.get(labels::TARGET).is_some_and(|target| target == chain_id)
        {
            return Ok(true);
        }
    }
    Ok(false)
}
