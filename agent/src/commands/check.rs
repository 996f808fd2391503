//! `sluice check`: can an image be streamed, from what, layer by layer, and what happens if not.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use sluice_image::decode::Compression;
use sluice_kernel::Abilities;
use sluice_registry::Client;

use super::status::size;
use crate::config::Config;
use crate::node::{
    artifact_store, cannot_stream, embedded_index, header_digest, read_index, registry_client, trust,
    unsupported,
};

/// Exit code 0: every layer can be streamed at random; 1: not so.
pub(crate) async fn check(config: &Arc<Config>, name: &str, store: Option<String>) -> Result<ExitCode> {
    let registry = registry_client(config, None)?;
    let image = registry.resolve(&Client::parse(name)?).await?;
    say!("{} {}", image.reference, image.manifest_digest);
    if let Some(reason) = cannot_stream(&Abilities::probe()) {
        say!("node: {reason}; images are pulled the ordinary way");
    }
    let trust = trust(config, store.as_deref())?;
    let store = artifact_store(config, store.as_deref(), &registry)?;
    let found = trust.find(&store, &image).await?;
    let mut all = true;
    for layer in &image.layers {
        let (streams, verdict) = match found.indexes.get(&layer.digest) {
            Some((blob, reader)) => match read_index(layer, blob, reader).await {
                Ok(index) if trust.condemned(&header_digest(&index)) => {
                    (false, "its stream index lied before and is in quarantine: streamed in order".to_owned())
                }
                Ok(index) if index.random_access() => {
                    (true, "stream index found: streamed at random".to_owned())
                }
                Ok(_) => (false, "stream index found, but one undivided frame: streamed in order".to_owned()),
                Err(error) => (false, format!("stream index refused ({error:#}): streamed in order")),
            },
            None => match unsupported(&layer.media_type) {
                Some(reason) => (false, format!("{reason}: the image cannot be used")),
                None if matches!(embedded_index(&registry, &image, layer).await, Ok(Some(_))) => {
                    (true, "its own table of contents: streamed at random by it".to_owned())
                }
                None => {
                    let head = registry
                        .blob(&image.reference, &layer.digest, layer.size)
                        .read_all(0..layer.size.min(8), false)
                        .await;
                    let kind = head.map(|bytes| match Compression::sniff(&bytes) {
                        Compression::Gzip => "gzip",
                        Compression::Zstd => "zstd",
                        Compression::None => "plain tar",
                    });
                    let kind = kind.unwrap_or("unreadable");
                    (
                        false,
                        format!("no index, {kind}: the first pull streams it in order and makes its index"),
                    )
                }
            },
        };
        all &= streams;
        say!("{} {:>10}  {verdict}", layer.digest.get(..19).unwrap_or(&layer.digest), size(layer.size));
        if let Some(reason) = found.refused.get(&layer.digest) {
            say!("  the published stream index is not trusted: {reason}");
        }
    }
    say!("{}", if all { "streamable" } else { "not streamable yet; `sluice index` makes it so" });
    Ok(ExitCode::from(u8::from(!all)))
}
