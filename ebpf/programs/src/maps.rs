//! Maps that the programs share with the agent, and what the agent writes before loading.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use sluice_events::{
    DROP_COUNTERS, Drop, FillKey, FillValue, Offsets, WATCH_BUCKETS, WATCH_WAYS, Waiting, WatchBucket,
    watch_bucket,
};

use crate::failed::{Budget, Pending};
use crate::seen::{Place, SEEN_SLOTS};

/// Where the running kernel keeps things. Written over before loading.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

/// The watched file systems. An array, whose look-up is no call: every access to a file of the machine asks here.
#[map]
static WATCHED: Array<WatchBucket> = Array::with_max_entries(WATCH_BUCKETS, 0);

/// A number that changes, afterwards, whenever [`WATCHED`] does.
#[map]
pub static ROUND: Array<u32> = Array::with_max_entries(1, 0);

/// What is recorded already. An entry that is pushed out costs a second record, nothing else.
#[map]
pub static SEEN: Array<Place> = Array::with_max_entries(SEEN_SLOTS, 0);

/// Records for the agent. The size is set when loading.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// Pages that came into the page cache. The agent takes them out.
#[map]
pub static FILLED: HashMap<FillKey, FillValue> = HashMap::with_max_entries(65_536, 0);

/// What each thread last asked for.
#[map]
pub static WAITING: LruHashMap<u32, Waiting> = LruHashMap::with_max_entries(16_384, 0);

/// Calls under way whose failure would be recorded, by thread.
#[map]
pub static PENDING: LruHashMap<u64, Pending> = LruHashMap::with_max_entries(16_384, 0);

/// How many failures may still be recorded in this second.
#[map]
pub static BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

/// What was lost.
#[map]
pub static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DROP_COUNTERS, 0);

/// Reads one of the [`OFFSETS`]: `offset!(inode_sb)`.
macro_rules! offset {
    ($field:ident) => {
        // SAFETY: the field is a plain number in a static that nobody writes while programs run. Volatile, since what
        // the compiler sees there is not what the agent puts there.
        unsafe { core::ptr::read_volatile(&raw const (*$crate::maps::offsets()).$field) }
    };
}
pub(crate) use offset;

#[inline(always)]
pub fn offsets() -> *const Offsets {
    &raw const OFFSETS
}

/// Number of the watch of a device; `None`: nobody watches it.
#[inline(always)]
pub fn watch_of(dev: u32) -> Option<u32> {
    let bucket = WATCHED.get_ptr(watch_bucket(dev))?;
    for way in 0..WATCH_WAYS {
        // SAFETY: the pointer is to a bucket of the map. A number that is exchanged meanwhile is one of two right ones.
        let entry = unsafe { (&raw const (*bucket)[way]).read_volatile() };
        if entry as u32 != 0 && (entry >> 32) as u32 == dev {
            return Some(entry as u32);
        }
    }
    None
}

/// Counts a loss.
#[inline(always)]
pub fn lost(what: Drop) {
    if let Some(counter) = DROPS.get_ptr_mut(what as u32) {
        // SAFETY: the pointer is this processor's counter, and programs are not preempted by others of their kind there.
        unsafe { *counter += 1 }
    }
}
