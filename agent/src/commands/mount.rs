//! `sluice mount` and `sluice umount`: an image's root file system on a directory, read-only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use sluice_kernel::mount::UnmountOptions;

use super::progress::Progress;
use super::with_client;
use crate::api::{AcquireRequest, Acquired, Holder, ReleaseRequest};
use crate::cli::Global;
use crate::client::Client;
use crate::config::Config;

/// Mounts `image` on `dir`. With `--standalone` it stays in the foreground until interrupted.
pub(crate) async fn mount(
    config: &Arc<Config>,
    global: &Global,
    image: String,
    dir: PathBuf,
    stream: bool,
) -> Result<()> {
    let dir = dir.canonicalize().with_context(|| format!("cannot mount on {}", dir.display()))?;
    let holder = Holder::MountPoint(dir.clone());
    with_client(config, global, async |client| {
        let request =
            AcquireRequest { reference: image.clone(), stream, holder: holder.clone(), start: None };
        let progress = Progress::new(&image);
        let acquired: Acquired = client.follow("acquire", &request, |event| progress.show(event)).await?;
        drop(progress);
        if let Err(error) = sluice_container::mount_read_only(&acquired.lower_dirs, &dir) {
            client.ask::<()>("release", &ReleaseRequest { holder: holder.clone() }).await?;
            return Err(error).with_context(|| format!("cannot mount {image} on {}", dir.display()));
        }
        say!("{}", acquired.manifest_digest);
        if global.standalone {
            super::interrupted()?.await;
            unmount(&dir)?;
            client.ask::<()>("release", &ReleaseRequest { holder: holder.clone() }).await?;
        }
        Ok(())
    })
    .await
}

/// Unmounts `dir` and tells the daemon, if one runs.
pub(crate) async fn umount(config: &Arc<Config>, dir: &Path) -> Result<()> {
    let dir = dir.canonicalize().with_context(|| format!("cannot unmount {}", dir.display()))?;
    if !sluice_kernel::mount::is_mount_point(&dir)? {
        bail!("nothing is mounted on {}", dir.display());
    }
    unmount(&dir)?;
    if let Some(client) = Client::connect_running(config).await? {
        client.ask::<()>("release", &ReleaseRequest { holder: Holder::MountPoint(dir) }).await?;
    }
    Ok(())
}

fn unmount(dir: &Path) -> Result<()> {
    sluice_kernel::unmount(dir, UnmountOptions::default())
        .with_context(|| format!("cannot unmount {}", dir.display()))
}
