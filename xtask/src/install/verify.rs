//! A small image, streamed by what was installed: the proof that this node can do it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::output;
use crate::sluice::{Registry, Sluice};

/// The one file of the image.
const TEXT: &str = "streamed\n";

/// Serves an image from an embedded registry, mounts it through an agent with directories of its own, and reads it.
pub(super) fn verify(binary: &Path) -> Result<()> {
    let dir = std::env::temp_dir().join(format!("sluice-verify-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = stream(binary, &dir);
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    result.context("the installed agent cannot stream on this node")?;
    println!("verified: a small image was streamed and read");
    Ok(())
}

fn stream(binary: &Path, dir: &Path) -> Result<()> {
    let layout = dir.join("layouts/tiny");
    std::fs::create_dir_all(layout.join("tree"))?;
    std::fs::write(layout.join("tree/file"), TEXT)?;
    make_image(&layout, &[])?;
    let registry = Registry::start(binary, &dir.join("layouts"), "1gbit", "0ms")?;
    let sluice = Sluice::new(binary, &dir.join("agent"), "[registry]\nplain_http = [\"*\"]\n")?;
    let target = dir.join("mounted");
    std::fs::create_dir_all(&target)?;
    let image = registry.image("tiny");
    let path = target.to_str().context("the temporary directory's name is not text")?;
    sluice.run(&["mount", &image, path])?;
    let text = std::fs::read_to_string(target.join("file"));
    let status = sluice.status();
    sluice.run(&["umount", path])?;
    if text.context("the image cannot be read")? != TEXT {
        bail!("the image's file has another content");
    }
    let state = status?.pointer("/images/0/state").and_then(|state| state.as_str().map(str::to_owned));
    if state.as_deref() == Some("unpacked") {
        bail!("the image was unpacked: this node cannot stream; `sluice status` and the agent's log say why");
    }
    Ok(())
}

/// An OCI layout with the files of its directory `tree` in one layer, by the node's tar and sha256sum.
pub(crate) fn make_image(layout: &Path, command: &[&str]) -> Result<()> {
    std::fs::create_dir_all(layout.join("blobs/sha256"))?;
    let tree = layout.join("tree");
    let tar = layout.join("layer.tar");
    output(Command::new("tar").arg("-C").arg(&tree).arg("-cf").arg(&tar).arg("."))?;
    let layer = put(layout, &std::fs::read(&tar)?)?;
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = format!(
        r#"{{"architecture":"{arch}","os":"linux","config":{{"Cmd":{}}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        serde_json::to_string(command)?,
        layer.0
    );
    let config = put(layout, config.as_bytes())?;
    let descriptor = |kind: &str, (digest, size): &(String, usize)| {
        format!(r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{digest}","size":{size}}}"#)
    };
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}]}}"#,
        descriptor("config.v1+json", &config),
        descriptor("layer.v1.tar", &layer)
    );
    let (digest, size) = put(layout, manifest.as_bytes())?;
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{size},"annotations":{{"org.opencontainers.image.ref.name":"latest"}}}}]}}"#
    );
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    std::fs::write(layout.join("index.json"), index)?;
    Ok(())
}

/// Writes a blob; its digest and size.
fn put(layout: &Path, bytes: &[u8]) -> Result<(String, usize)> {
    let staged = layout.join("staged");
    std::fs::write(&staged, bytes)?;
    let sum = output(Command::new("sha256sum").arg(&staged))?;
    let hex = sum.split_whitespace().next().context("sha256sum said nothing")?.to_owned();
    std::fs::rename(&staged, layout.join("blobs/sha256").join(&hex))?;
    Ok((format!("sha256:{hex}"), bytes.len()))
}
