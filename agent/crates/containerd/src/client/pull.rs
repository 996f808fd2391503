//! One pull: documents, layers, the image's name.

use std::collections::HashMap;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use prost_types::FieldMask;
use tonic::{Code, Status};

use super::{
    ClientError, LayerSource, PlannedLayer, PullPlan, PullReport, Service, chain_ids, refused, unique,
};
use crate::proto::content::content_client::ContentClient;
use crate::proto::content::{self, WriteAction, WriteContentRequest};
use crate::proto::diff::ApplyRequest;
use crate::proto::diff::diff_client::DiffClient;
use crate::proto::images::images_client::ImagesClient;
use crate::proto::images::{CreateImageRequest, Image, UpdateImageRequest};
use crate::proto::snapshots::snapshots_client::SnapshotsClient;
use crate::proto::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use crate::proto::types::{Descriptor, Mount};
use crate::remote::labels;

/// Bytes of one message to the content store; gRPC's usual limit is 4 MiB.
const PIECE_BYTES: usize = 1 << 20;

pub(super) struct Pull<'a> {
    pub(super) service: Service,
    pub(super) plan: &'a PullPlan,
    pub(super) source: &'a dyn LayerSource,
}

impl Pull<'_> {
    pub(super) async fn run(&self, note: &mut (dyn FnMut(String) + Send)) -> Result<PullReport, ClientError> {
        let plan = self.plan;
        let chain = chain_ids(plan.layers.iter().map(|layer| layer.diff_id.as_str()));
        self.put_documents(chain.last()).await?;
        let mut report = PullReport::default();
        let mut parent = String::new();
        for (layer, chain_id) in plan.layers.iter().zip(&chain) {
            match self.layer(layer, chain_id, &parent).await? {
                Outcome::Present => report.present += 1,
                Outcome::Served => report.served += 1,
                Outcome::Unpacked => {
                    note(format!("layer {} was downloaded and unpacked", layer.digest));
                    report.unpacked += 1;
                }
            }
            parent.clone_from(chain_id);
        }
        self.name_image().await?;
        Ok(report)
    }

    /// Manifest and configuration, with the references that containerd's garbage collection follows.
    async fn put_documents(&self, top: Option<&String>) -> Result<(), ClientError> {
        let plan = self.plan;
        let from = (format!("containerd.io/distribution.source.{}", plan.registry), plan.repository.clone());
        let mut references = HashMap::from([
            from.clone(),
            ("containerd.io/gc.ref.content.config".to_owned(), plan.config_digest.clone()),
        ]);
        for (number, layer) in plan.layers.iter().enumerate() {
            references.insert(format!("containerd.io/gc.ref.content.l.{number}"), layer.digest.clone());
        }
        let mut of_config = HashMap::from([from]);
        if let Some(top) = top {
            of_config.insert(format!("containerd.io/gc.ref.snapshot.{}", plan.snapshotter), top.clone());
        }
        self.put_blob(&plan.config_digest, &plan.config, of_config).await?;
        self.put_blob(&plan.manifest_digest, &plan.manifest, references).await
    }

    async fn put_blob(
        &self,
        digest: &str,
        bytes: &Bytes,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let whole = bytes.clone();
        let source = futures::stream::once(async move { Ok::<_, String>(whole) }).boxed();
        if !self.write(digest, bytes.len() as u64, source, labels.clone()).await? {
            return self.label(digest, labels).await;
        }
        Ok(())
    }

    async fn label(&self, digest: &str, labels: HashMap<String, String>) -> Result<(), ClientError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = content::Info { digest: digest.to_owned(), size: 0, labels };
        let request = content::UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let updated = ContentClient::new(self.service.clone()).update(request).await;
        updated.map_err(refused(format!("label {digest}"))).map(|_| ())
    }

    /// Writes a blob; false if containerd has it.
    async fn write(
        &self,
        digest: &str,
        size: u64,
        pieces: BoxStream<'static, Result<Bytes, String>>,
        labels: HashMap<String, String>,
    ) -> Result<bool, ClientError> {
        let failed = || refused(format!("store {digest}"));
        let total = i64::try_from(size).unwrap_or(i64::MAX);
        let reference = unique(digest);
        let (sender, receiver) = tokio::sync::mpsc::channel::<WriteContentRequest>(4);
        let head = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.clone(),
            total,
            expected: digest.to_owned(),
            ..Default::default()
        };
        let commit = WriteContentRequest { action: WriteAction::Commit.into(), labels, ..head.clone() };
        let feeding = feed(sender, head, pieces, commit);
        let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut client = ContentClient::new(self.service.clone());
        let writing = async {
            let mut answers = client.write(requests).await?.into_inner();
            while answers.message().await?.is_some() {}
            Ok::<(), Status>(())
        };
        let (fed, written) = tokio::join!(feeding, writing);
        match written {
            Err(status) if status.code() == Code::AlreadyExists => return Ok(false),
            written => {
                fed.map_err(|reason| ClientError::Layer { digest: digest.to_owned(), reason })?;
                written.map_err(failed())?;
            }
        }
        Ok(true)
    }

    async fn layer(
        &self,
        layer: &PlannedLayer,
        chain_id: &str,
        parent: &str,
    ) -> Result<Outcome, ClientError> {
        if self.exists(chain_id).await? {
            return Ok(Outcome::Present);
        }
        let snapshot_labels = self.labels(layer, chain_id);
        let key = unique(&format!("extract {chain_id}"));
        let prepared = SnapshotsClient::new(self.service.clone())
            .prepare(PrepareSnapshotRequest {
                snapshotter: self.plan.snapshotter.clone(),
                key: key.clone(),
                parent: parent.to_owned(),
                labels: snapshot_labels.clone(),
            })
            .await;
        let mounts = match prepared {
            Ok(prepared) => prepared.into_inner().mounts,
            Err(status) if status.code() == Code::AlreadyExists && self.exists(chain_id).await? => {
                return Ok(Outcome::Served);
            }
            Err(status) => return Err(refused(format!("prepare {chain_id}"))(status)),
        };
        let unpacked = self.unpack(layer, chain_id, &key, mounts, snapshot_labels).await;
        if unpacked.is_err() {
            self.drop_snapshot(key).await;
        }
        unpacked
    }

    async fn exists(&self, key: &str) -> Result<bool, ClientError> {
        let request = StatSnapshotRequest { snapshotter: self.plan.snapshotter.clone(), key: key.to_owned() };
        match SnapshotsClient::new(self.service.clone()).stat(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(format!("look for snapshot {key}"))(status)),
        }
    }

    fn labels(&self, layer: &PlannedLayer, chain_id: &str) -> HashMap<String, String> {
        [
            (labels::TARGET, chain_id),
            (labels::IMAGE, &self.plan.reference),
            (labels::MANIFEST, &self.plan.manifest_digest),
            (labels::LAYER, &layer.digest),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    async fn unpack(
        &self,
        layer: &PlannedLayer,
        chain_id: &str,
        key: &str,
        mounts: Vec<Mount>,
        labels: HashMap<String, String>,
    ) -> Result<Outcome, ClientError> {
        let uncompressed = ("containerd.io/uncompressed".to_owned(), layer.diff_id.clone());
        self.write(&layer.digest, layer.size, self.source.read(layer), HashMap::from([uncompressed])).await?;
        let diff = Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            size: i64::try_from(layer.size).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        let applied = DiffClient::new(self.service.clone())
            .apply(ApplyRequest { diff: Some(diff), mounts })
            .await
            .map_err(refused(format!("unpack {}", layer.digest)))?
            .into_inner();
        if applied.applied.is_none_or(|applied| applied.digest != layer.diff_id) {
            let reason = "its content is not what the image's configuration says".to_owned();
            return Err(ClientError::Layer { digest: layer.digest.clone(), reason });
        }
        let committed = SnapshotsClient::new(self.service.clone())
            .commit(CommitSnapshotRequest {
                snapshotter: self.plan.snapshotter.clone(),
                name: chain_id.to_owned(),
                key: key.to_owned(),
                labels,
            })
            .await;
        match committed {
            Err(status) if status.code() == Code::AlreadyExists => {
                // Another pull was faster.
                self.drop_snapshot(key.to_owned()).await;
                Ok(Outcome::Present)
            }
            committed => committed.map_err(refused(format!("commit {chain_id}"))).map(|_| Outcome::Unpacked),
        }
    }

    async fn drop_snapshot(&self, key: String) {
        let request = RemoveSnapshotRequest { snapshotter: self.plan.snapshotter.clone(), key };
        if let Err(status) = SnapshotsClient::new(self.service.clone()).remove(request).await {
            // The lease's end collects it.
            tracing::debug!(%status, "a half-made snapshot stays until the lease ends");
        }
    }

    async fn name_image(&self) -> Result<(), ClientError> {
        let image = Image {
            name: self.plan.reference.clone(),
            labels: HashMap::new(),
            target: Some(Descriptor {
                media_type: self.plan.media_type.clone(),
                digest: self.plan.manifest_digest.clone(),
                size: i64::try_from(self.plan.manifest.len()).unwrap_or(i64::MAX),
                annotations: HashMap::new(),
            }),
        };
        let mut client = ImagesClient::new(self.service.clone());
        match client.create(CreateImageRequest { image: Some(image.clone()) }).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let updated = client.update(UpdateImageRequest { image: Some(image) }).await;
                updated.map_err(refused("name the image")).map(|_| ())
            }
            created => created.map_err(refused("name the image")).map(|_| ()),
        }
    }
}

enum Outcome {
    Present,
    Served,
    Unpacked,
}

/// Feeds a content writer: what it is, its bytes, its end. The error is the source's; a reader that left says why itself.
async fn feed(
    sender: tokio::sync::mpsc::Sender<WriteContentRequest>,
    head: WriteContentRequest,
    mut pieces: BoxStream<'static, Result<Bytes, String>>,
    commit: WriteContentRequest,
) -> Result<(), String> {
    let mut offset = 0;
    if sender.send(head.clone()).await.is_err() {
        return Ok(());
    }
    while let Some(piece) = pieces.next().await {
        let mut piece = piece?;
        while !piece.is_empty() {
            let data = piece.split_to(piece.len().min(PIECE_BYTES));
            let len = i64::try_from(data.len()).unwrap_or(i64::MAX);
            let request = WriteContentRequest {
                action: WriteAction::Write.into(),
                offset,
                data: data.to_vec(),
                ..head.clone()
            };
            if sender.send(request).await.is_err() {
                return Ok(());
            }
            offset += len;
        }
    }
    let sent = sender.send(WriteContentRequest { offset, ..commit }).await;
    // A reader that left has said why in its answer.
    drop(sent);
    Ok(())
}
