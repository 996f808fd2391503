//! How much the store may take: of the disk, of its quota, and of memory while neither has room.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::StoreError;
use crate::writer::Queue;

/// What the store may take.
#[derive(Debug, Clone, Copy)]
pub struct StoreLimits {
    /// Verified bytes kept in memory, over all layers, while the disk takes no more.
    pub memory_budget_bytes: u64,
    /// Bytes that the store may allocate on disk; none: as much as there is.
    pub quota_bytes: Option<u64>,
    /// Bytes of the disk that contents leave free, so that the state can still be written when it is full.
    pub reserve_bytes: u64,
}

impl StoreLimits {
    /// No quota, and a reserve of 16 MiB.
    pub fn memory(memory_budget_bytes: u64) -> Self {
        Self { memory_budget_bytes, quota_bytes: None, reserve_bytes: 16 << 20 }
    }
}

/// Keeps account of what is written.
#[derive(Debug)]
pub(crate) struct Space {
    root: PathBuf,
    limits: StoreLimits,
    /// Allocated bytes when last measured, and what was written since.
    used: AtomicU64,
    full: AtomicBool,
    /// Until the file system says that it cannot share blocks between files.
    pub(crate) may_share: AtomicBool,
    pub(crate) memory: MemoryBudget,
    /// What is about to be written.
    pub(crate) queue: Arc<Queue>,
    /// A layer that was complete is so no more.
    pub(crate) lost: Arc<tokio::sync::Notify>,
}

impl Space {
    pub(crate) fn new(root: &Path, limits: StoreLimits) -> Self {
        Self {
            root: root.to_path_buf(),
            limits,
            used: AtomicU64::new(0),
            full: AtomicBool::new(false),
            may_share: AtomicBool::new(true),
            memory: MemoryBudget { limit: limits.memory_budget_bytes, used: AtomicU64::new(0) },
            queue: Arc::new(Queue::closed()),
            lost: Arc::default(),
        }
    }

    pub(crate) fn limits(&self) -> &StoreLimits {
        &self.limits
    }

    /// Whether `len` bytes may be written; they count as written from then on.
    pub(crate) fn admit(&self, len: u64) -> io::Result<()> {
        let admitted = self.check(len);
        match &admitted {
            Ok(()) => {
                self.used.fetch_add(len, Ordering::AcqRel);
                self.now_full(false, None);
            }
            Err(error) => self.now_full(true, Some(error)),
        }
        admitted
    }

    /// Whether `len` bytes might be written now; if so the store is not full any more.
    pub(crate) fn recheck(&self, len: u64) -> bool {
        let room = self.check(len).is_ok();
        if room {
            self.now_full(false, None);
        }
        room
    }

    /// Whether `len` bytes might be written now.
    pub(crate) fn check(&self, len: u64) -> io::Result<()> {
        let used = self.used.load(Ordering::Acquire);
        if self.limits.quota_bytes.is_some_and(|quota| used.saturating_add(len) > quota) {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "the store's quota is used up"));
        }
        if self.limits.reserve_bytes > 0 {
            let space = sluice_kernel::file::space(&self.root).map_err(io::Error::other)?;
            // What is queued has no space yet.
            let wanted = len.saturating_add(self.queue.bytes());
            if space.available_bytes < self.limits.reserve_bytes.saturating_add(wanted) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "the disk is full"));
            }
        }
        Ok(())
    }

    /// What was found on disk takes the place of what was counted.
    pub(crate) fn measured(&self, used: u64) {
        self.used.store(used, Ordering::Release);
    }

    /// What was written is not there any more.
    pub(crate) fn freed(&self, len: u64) {
        self.used.fetch_sub(len.min(self.used.load(Ordering::Acquire)), Ordering::AcqRel);
    }

    /// A write that found no space although it was admitted.
    pub(crate) fn refused(&self, len: u64, error: &io::Error) {
        self.freed(len);
        self.now_full(is_full(error), Some(error));
    }

    /// Says it once when space runs out, and once when it is back.
    fn now_full(&self, full: bool, error: Option<&io::Error>) {
        if self.full.swap(full, Ordering::AcqRel) == full {
            return;
        }
        let root = self.root.display();
        match error {
            Some(error) if full => {
                tracing::warn!(%root, %error, "no space in the layer store: reads go on from memory, the background fill pauses");
            }
            _ => tracing::info!(%root, "the layer store has space again"),
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }
}

/// Whether an error means that there is no space.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl StoreError {
    /// Whether a file that must be there is not.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether there is no space: trying again helps once there is.
    pub fn is_full(&self) -> bool {
        match self {
            Self::File { source, .. } | Self::Lost { source, .. } => is_full(source),
            Self::State(error) => matches!(&**error, redb::Error::Io(error) if is_full(error)),
            Self::OnlyInMemory(_) => true,
            _ => false,
        }
    }
}

/// Memory that all layers share.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    limit: u64,
    used: AtomicU64,
}

impl MemoryBudget {
    pub(crate) fn take(&self, len: u64) -> bool {
        let fits = |used: u64| used.checked_add(len).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok()
    }

    /// Takes what there may not be.
    pub(crate) fn take_anyway(&self, len: u64) {
        self.used.fetch_add(len, Ordering::AcqRel);
    }

    pub(crate) fn give_back(&self, len: u64) {
        self.used.fetch_sub(len, Ordering::AcqRel);
    }
}
