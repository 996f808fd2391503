//! Layers as loop devices, and images as EROFS mounts on them.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{ErofsMount, LoopDevice, LoopOptions, loop_device, mount_erofs, unmount};

use crate::BlockFsError;

/// Read-ahead, in KiB, of an image whose layers are all local. EROFS takes that of all an image's files from the device of its
/// *metadata*, whatever device they are on (`s_bdi`, Linux 6.18), when a file is opened. With 128 a handed-over layer, cold, gave
/// 766 to 844 MB/s in sequence (medians of three runs), with 512 it gave 1042, with 1024 1172; layers on FUSE gave 981 to 1168,
/// 1488 and 1478 (`examples/read_speed.rs`, a busy machine).
///
/// It does not make neighbouring small files one request: read-ahead ends with its file, and with direct I/O nothing below EROFS
/// caches. Without direct I/O the loop driver's one worker per device reads one request after the other (Linux 6.18), so that
/// one that waits for the network would hold up all others of its layer.
const LOCAL_READ_AHEAD_KIB: u32 = 512;

/// Read-ahead, in KiB, of an image that is streamed: what is read ahead is fetched, wanted or not. A start touches its files in
/// pieces; with 512 it brought 1.34 times the bytes that it touched, with 128 1.11 times, in the same time.
const STREAMED_READ_AHEAD_KIB: u32 = 128;

/// A device nobody read for as long is at rest: readers that come one after the other are closer together.
const REST: Duration = Duration::from_millis(4);

/// Longest wait for such a moment.
const REST_PATIENCE: Duration = Duration::from_secs(2);

/// A read-only block device on a file. The kernel frees it when neither this nor a mount uses it.
#[derive(Debug)]
pub struct Device {
    device: LoopDevice,
}

impl Device {
    /// Attaches the file at `path`.
    pub fn attach(path: &Path) -> Result<Self, BlockFsError> {
        Self::attach_file(&open(path)?)
    }

    /// Attaches an open file.
    pub fn attach_file(file: &File) -> Result<Self, BlockFsError> {
        let options = LoopOptions::default();
        let device = match LoopDevice::attach(file.as_fd(), options) {
            Ok(device) => device,
            // Some file systems have no direct I/O (tmpfs before 6.6): their files are in memory anyway.
            Err(error) => {
                tracing::debug!(%error, "no direct I/O");
                LoopDevice::attach(file.as_fd(), LoopOptions { direct_io: false, ..options })?
            }
        };
        let device = Self { device };
        device.read_ahead(STREAMED_READ_AHEAD_KIB);
        Ok(device)
    }

    fn read_ahead(&self, kib: u32) {
        if let Err(error) = self.device.set_read_ahead_kib(kib) {
            tracing::debug!(%error, "read-ahead stays as it is");
        }
    }

    /// As device of an image's metadata: files opened from now on are read far ahead.
    pub fn read_far_ahead(&self) {
        self.read_ahead(LOCAL_READ_AHEAD_KIB);
    }

    /// The devices that are on the file at `path`; they stay on it while these live.
    pub fn all_on(path: &Path) -> Result<Vec<Self>, BlockFsError> {
        let mut found = Vec::new();
        for listed in loop_device::list()?.iter().filter(|listed| listed.backing_file == path) {
            let device = LoopDevice::open(listed.number)?;
            // Before it was opened it may have been freed, and be another's by now.
            if device.backing_file()?.as_deref() == Some(path) {
                found.push(Self { device });
            }
        }
        Ok(found)
    }

    /// Takes over a device that is attached already.
    pub fn adopt(number: u32) -> Result<Self, BlockFsError> {
        Ok(Self { device: LoopDevice::open(number)? })
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        self.device.path()
    }

    /// Waits, for two seconds at most, until nobody reads the device: what comes during a hand-over waits for the whole of it (an RCU
    /// grace period, some 20 ms), and a start that reads now and then need not be hit by it.
    pub fn wait_for_rest(&self) {
        let began = Instant::now();
        let mut before = self.device.reads();
        while before.is_some() && began.elapsed() < REST_PATIENCE {
            std::thread::sleep(REST);
            let now = self.device.reads();
            if now == before && now.is_some_and(|(_, under_way)| under_way == 0) {
                return;
            }
            before = now;
        }
    }

    /// Switches the device, in use, to another file of the same size and content.
    pub fn hand_over(&self, path: &Path) -> Result<(), BlockFsError> {
        self.hand_over_to(&open(path)?)
    }

    /// The same with an open file.
    pub fn hand_over_to(&self, file: &File) -> Result<(), BlockFsError> {
        Ok(self.device.change_backing(file.as_fd())?)
    }
}

fn open(path: &Path) -> Result<File, BlockFsError> {
    File::open(path).map_err(|source| BlockFsError::Open { path: path.to_path_buf(), source })
}

/// An image's EROFS mount. It stays when this is dropped: see [`ImageMount::unmount`].
#[derive(Debug)]
pub struct ImageMount {
    dir: PathBuf,
    metadata: Option<Arc<Device>>,
    layers: Vec<Arc<Device>>,
}

impl ImageMount {
    /// Mounts the metadata image `metadata` with its layers' devices on `dir`, which is created. Files are read a little ahead, as
    /// fits what is streamed: see [`Self::metadata`]. Blocks the thread.
    pub fn mount(metadata: &Path, layers: Vec<Arc<Device>>, dir: &Path) -> Result<Self, BlockFsError> {
        let failed = |source| BlockFsError::Open { path: dir.to_path_buf(), source };
        let device = Device::attach(metadata)?;
        std::fs::create_dir_all(dir).map_err(failed)?;
        let erofs = ErofsMount {
            device: device.path().to_path_buf(),
            extra_devices: layers.iter().map(|layer| layer.path().to_path_buf()).collect(),
            restrictions: Restrictions::default(),
        };
        if let Err(error) = mount_erofs(&erofs, dir) {
            remove_mount_point(dir);
            return Err(error.into());
        }
        Ok(Self { dir: dir.to_path_buf(), metadata: Some(Arc::new(device)), layers })
    }

    /// A mount that an earlier agent made.
    pub fn adopt(dir: &Path, layers: Vec<Arc<Device>>) -> Self {
        let metadata = metadata_of(dir).unwrap_or_else(|error| {
            tracing::debug!(%error, dir = %dir.display(), "the device of its metadata is not known");
            None
        });
        Self { dir: dir.to_path_buf(), metadata: metadata.map(Arc::new), layers }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The device of its metadata, whose read-ahead is that of all its files; none if that could not be found.
    pub fn metadata(&self) -> Option<&Arc<Device>> {
        self.metadata.as_ref()
    }

    /// Its layers' devices.
    pub fn layers(&self) -> &[Arc<Device>] {
        &self.layers
    }

    /// Takes the mount out of the tree; who uses it still (a container's overlayfs) keeps it alive until done.
    pub fn unmount(self) -> Result<(), BlockFsError> {
        unmount(&self.dir, UnmountOptions { lazy: true, force: false })?;
        remove_mount_point(&self.dir);
        Ok(())
    }
}

fn metadata_of(dir: &Path) -> Result<Option<Device>, BlockFsError> {
    let failed = |error| BlockFsError::Open { path: dir.to_path_buf(), source: std::io::Error::other(error) };
    let mounts = sluice_kernel::mounts().map_err(failed)?;
    let mount = mounts.iter().rev().find(|mount| mount.target == dir);
    let number = mount.and_then(|mount| {
        let source = std::str::from_utf8(&mount.source).ok()?;
        source.strip_prefix("/dev/loop")?.parse().ok()
    });
    number.map(Device::adopt).transpose()
}

fn remove_mount_point(dir: &Path) {
    if let Err(error) = std::fs::remove_dir(dir) {
        tracing::debug!(%error, dir = %dir.display(), "the mount point stays");
    }
}
