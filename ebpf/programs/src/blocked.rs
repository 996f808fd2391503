//! How long threads sleep until bytes of watched files are there.
//!
//! Whoever waits for a page sleeps in the kernel's `io_schedule`, uninterruptibly and counted as waiting for I/O. A thread
//! that goes to sleep that way after it asked a watched file system for something, and no other since, waits for that.

use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use sluice_events::{BlockedEvent, Head, Kind, SwitchState, VERSION, Waiting, level};

use crate::kernel::{Pointer, read, typed};
use crate::maps::{WAITING, offset, watch_of};
use crate::record::{now_ns, pid, reserve, submit};

const TASK_UNINTERRUPTIBLE: u64 = 2;

/// `sched_switch(bool, struct task_struct *prev, struct task_struct *next, unsigned prev_state)`, the last since 5.18.
#[btf_tracepoint(function = "sched_switch")]
pub fn typed_switch(ctx: BtfTracePointContext) -> i32 {
    let (previous, next): (Pointer, Pointer) = (ctx.arg(1), ctx.arg(2));
    let flags = |task| typed::<u8>(task, offset!(task_iowait));
    if waits_for_io(flags(previous)) && sleeps(ctx.arg::<u32>(3).into()) {
        goes_to_sleep();
    }
    // Cleared only by the thread itself, once it runs.
    if waits_for_io(flags(next)) {
        runs_again(typed(next, offset!(task_pid))).unwrap_or(());
    }
    0
}

/// The same on kernels where that cannot be had, or that do not tell the state.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub fn raw_switch(ctx: RawTracePointContext) -> i32 {
    let (previous, next): (Pointer, Pointer) = (ctx.arg(1), ctx.arg(2));
    let state = if offset!(switch_state) == SwitchState::Argument as u32 {
        u64::from(ctx.arg::<u32>(3))
    } else {
        read::<u64>(previous, offset!(task_state)).unwrap_or(0)
    };
    let flags = |task| read::<u8>(task, offset!(task_iowait)).unwrap_or(0);
    if sleeps(state) && waits_for_io(flags(previous)) {
        goes_to_sleep();
    }
    if waits_for_io(flags(next)) {
        read(next, offset!(task_pid)).and_then(runs_again).unwrap_or(());
    }
    0
}

#[inline(always)]
fn sleeps(state: u64) -> bool {
    state & TASK_UNINTERRUPTIBLE != 0
}

#[inline(always)]
fn waits_for_io(flags: u8) -> bool {
    u32::from(flags) & offset!(task_iowait_mask) != 0
}

#[inline(always)]
fn goes_to_sleep() {
    // The thread that goes is still the current one here.
    let Some(waiting) = WAITING.get_ptr_mut(&pid()) else { return };
    // SAFETY: the pointer is to an entry of the map, which stays writable while the program runs.
    let waiting = unsafe { &mut *waiting };
    // Once the watch is over, it sleeps for something else: for the file system's end, for example.
    if watch_of(waiting.dev) == Some(waiting.watch) {
        waiting.since_ns = now_ns();
    }
}

#[inline(always)]
fn runs_again(pid: u32) -> Option<()> {
    let waiting = WAITING.get_ptr_mut(&pid)?;
    // SAFETY: as above.
    let waiting: &mut Waiting = unsafe { &mut *waiting };
    let since = waiting.since_ns;
    if since == 0 {
        return None;
    }
    (waiting.since_ns, waiting.exact, waiting.run_end) = (0, 0, 0);
    let mut entry = reserve::<BlockedEvent>()?;
    let time_ns = now_ns();
    entry.write(BlockedEvent {
        head: Head {
            time_ns,
            cgroup: waiting.cgroup,
            mnt_ns: waiting.mnt_ns,
            kind: Kind::Blocked as u16,
            version: VERSION,
            level: level::TRACEPOINT,
            tgid: waiting.tgid,
            pid,
            comm: waiting.comm,
        },
        inode: waiting.inode,
        page: waiting.page,
        blocked_ns: time_ns.saturating_sub(since),
        dev: waiting.dev,
        reserved: 0,
    });
    submit(entry);
    Some(())
}
