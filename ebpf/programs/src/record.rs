//! Heads of records, and handing records over.

use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_ns,
};
use aya_ebpf::maps::ring_buf::RingBufEntry;
use sluice_events::{Drop, Head, Kind, VERSION};

use crate::kernel::mount_namespace;
use crate::maps::{EVENTS, lost};

/// The agent is woken each time that so much more waits; before, it looks by itself now and then. A power of two.
const WAKE_BYTES: u64 = 256 << 10;
/// So near behind such a border, at least one record more: several processors hand over what lies there, and each of them might take
/// another one for the one that crosses it.
const WAKE_WINDOW: u64 = 1 << 10;
const QUERY_AVAILABLE: u64 = 0;
const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper only reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

/// The running thread.
#[inline(always)]
pub fn pid() -> u32 {
    bpf_get_current_pid_tgid() as u32
}

/// The running thread's control group.
#[inline(always)]
pub fn cgroup() -> u64 {
    // SAFETY: the helper only reads a number.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Says who runs, and when.
#[inline(always)]
pub fn head(kind: Kind, level: u8) -> Head {
    head_in(kind, level, mount_namespace())
}

/// The same where the mount namespace is known.
#[inline(always)]
pub fn head_in(kind: Kind, level: u8, mnt_ns: u32) -> Head {
    let id = bpf_get_current_pid_tgid();
    Head {
        time_ns: now_ns(),
        cgroup: cgroup(),
        mnt_ns,
        kind: kind as u16,
        version: VERSION,
        level,
        tgid: (id >> 32) as u32,
        pid: id as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
    }
}

/// Room for a record; counts a loss when there is none.
#[inline(always)]
pub fn reserve<T: 'static>() -> Option<RingBufEntry<T>> {
    let entry = EVENTS.reserve::<T>(0);
    if entry.is_none() {
        lost(Drop::RingFull);
    }
    entry
}

/// Hands a record over.
#[inline(always)]
pub fn submit<T: 'static>(entry: RingBufEntry<T>) {
    // Each time costs an interrupt, and the other processor's rest.
    let available = EVENTS.query(QUERY_AVAILABLE);
    let wake = available >= WAKE_BYTES && available % WAKE_BYTES < WAKE_WINDOW;
    entry.submit(if wake { FORCE_WAKEUP } else { NO_WAKEUP });
}

/// Hands over a record that somebody waits for: rare ones only.
#[inline(always)]
pub fn submit_now<T: 'static>(entry: RingBufEntry<T>) {
    entry.submit(FORCE_WAKEUP);
}
