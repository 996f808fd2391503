//! Calls that change names or attributes and fail.
//!
//! Inside the kernel (level 2 and 3) only those on symbolic links of an overlay or of a watched file system are recorded. From
//! system-call tracepoints (level 1) the programs see paths, results and the directory that a path begins at: failures are
//! recorded if that is in such a file system, and the agent looks at what the paths name. Never more than so many per second.

use aya_ebpf::helpers::generated::{bpf_probe_read_kernel_str, bpf_probe_read_user_str};
use core::hint::black_box;

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user};
use aya_ebpf::macros::{fexit, kprobe, kretprobe, tracepoint};
use aya_ebpf::programs::{FExitContext, ProbeContext, RetProbeContext, TracePointContext};
use sluice_events::{
    ABSENT, BASE_DEPTH, Call, Drop, FailedEvent, Kind, NAME_LEN, OVERLAY_MAGIC, PATH_LEN, level,
};

use crate::kernel::{Pointer, current, open_file, read};
use crate::maps::{BUDGET, PENDING, lost, offset, watch_of};
use crate::record::{head, now_ns, reserve, submit_now};

/// Failures recorded per second and processor.
const PER_SECOND: u64 = 500;
const SECOND_NS: u64 = 1_000_000_000;
const S_IFMT: u16 = 0o170_000;
const S_IFLNK: u16 = 0o120_000;
const AT_FDCWD: i32 = -100;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const AT_SYMLINK_FOLLOW: u32 = 0x400;
/// First argument in the record of `syscalls:sys_enter_*`, the same in all kernels since 2.6.
const ENTER_ARGUMENTS: usize = 16;
/// The result in the record of `syscalls:sys_exit_*`.
const EXIT_RESULT: usize = 16;

/// How many failures were recorded in a second, by processor.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Budget {
    second: u64,
    recorded: u64,
}

/// A call under way. `old` and `new` are addresses of paths (level 1) or of dentries (level 2).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Pending {
    old: u64,
    new: u64,
    old_dir: i32,
    flags: u32,
    call: u16,
    /// Calls of the same function within this one: an overlay renames in its upper layer (level 2).
    depth: u16,
    reserved: u32,
}

impl Pending {
    fn new(call: Call, old: u64, new: u64) -> Self {
        Self { old, new, old_dir: AT_FDCWD, flags: 0, call: call as u16, depth: 0, reserved: 0 }
    }
}

// ---- Level 1: system-call tracepoints ----

#[inline(always)]
fn argument(ctx: &TracePointContext, number: usize) -> u64 {
    // SAFETY: the record of the tracepoint holds the call's arguments, 8 bytes each.
    unsafe { ctx.read_at(ENTER_ARGUMENTS + number * 8) }.unwrap_or(0)
}

#[inline(always)]
fn enter(pending: &Pending) -> u32 {
    // Without room the failure is not seen.
    if PENDING.insert(&bpf_get_current_pid_tgid(), pending, 0).is_err() {
        lost(Drop::TooManyFailures);
    }
    0
}

/// `rename(old, new)`.
#[tracepoint]
pub fn enter_rename(ctx: TracePointContext) -> u32 {
    enter(&Pending::new(Call::Rename, argument(&ctx, 0), argument(&ctx, 1)))
}

/// `renameat(old_dir, old, new_dir, new)`.
#[tracepoint]
pub fn enter_renameat(ctx: TracePointContext) -> u32 {
    enter(&two_directories(&ctx, Call::Renameat, 0))
}

/// `renameat2(old_dir, old, new_dir, new, flags)`.
#[tracepoint]
pub fn enter_renameat2(ctx: TracePointContext) -> u32 {
    enter(&two_directories(&ctx, Call::Renameat2, argument(&ctx, 4) as u32))
}

/// `link(old, new)`.
#[tracepoint]
pub fn enter_link(ctx: TracePointContext) -> u32 {
    enter(&Pending::new(Call::Link, argument(&ctx, 0), argument(&ctx, 1)))
}

/// `linkat(old_dir, old, new_dir, new, flags)`.
#[tracepoint]
pub fn enter_linkat(ctx: TracePointContext) -> u32 {
    let flags = argument(&ctx, 4) as u32;
    if flags & AT_SYMLINK_FOLLOW != 0 {
        return 0;
    }
    enter(&two_directories(&ctx, Call::Linkat, flags))
}

/// `lchown(path, user, group)`.
#[tracepoint]
pub fn enter_lchown(ctx: TracePointContext) -> u32 {
    enter(&Pending::new(Call::Lchown, argument(&ctx, 0), 0))
}

/// `fchownat(dir, path, user, group, flags)`.
#[tracepoint]
pub fn enter_fchownat(ctx: TracePointContext) -> u32 {
    one_directory(&ctx, Call::Fchownat, argument(&ctx, 4) as u32)
}

/// `utimensat(dir, path, times, flags)`.
#[tracepoint]
pub fn enter_utimensat(ctx: TracePointContext) -> u32 {
    one_directory(&ctx, Call::Utimensat, argument(&ctx, 3) as u32)
}

#[inline(always)]
fn two_directories(ctx: &TracePointContext, call: Call, flags: u32) -> Pending {
    let mut pending = Pending::new(call, argument(ctx, 1), argument(ctx, 3));
    pending.old_dir = argument(ctx, 0) as i32;
    pending.flags = flags;
    pending
}

#[inline(always)]
fn one_directory(ctx: &TracePointContext, call: Call, flags: u32) -> u32 {
    if flags & AT_SYMLINK_NOFOLLOW == 0 {
        return 0;
    }
    let mut pending = Pending::new(call, argument(ctx, 1), 0);
    pending.old_dir = argument(ctx, 0) as i32;
    pending.flags = flags;
    enter(&pending)
}

/// At the exit of all of them. Paths are read here: on entry they may not be in memory yet.
#[tracepoint]
pub fn exit_call(ctx: TracePointContext) -> u32 {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: the entry is the running thread's own; it is copied before it is removed.
    let Some(pending) = (unsafe { PENDING.get(&thread) }).copied() else { return 0 };
    // It is there: this thread has just found it.
    PENDING.remove(&thread).ok();
    // SAFETY: the record of the tracepoint has a long there.
    let result: i64 = unsafe { ctx.read_at(EXIT_RESULT) }.unwrap_or(0);
    if result < 0 {
        failed_paths(&pending, (-result) as u32).unwrap_or(());
    }
    0
}

#[inline(always)]
fn failed_paths(pending: &Pending, errno: u32) -> Option<()> {
    let base = base(pending)?;
    let sb: Pointer = read(base, offset!(dentry_sb))?;
    let (magic, dev) = ours(sb)?;
    within_budget()?;
    let mut entry = reserve::<FailedEvent>()?;
    let event = entry.as_mut_ptr();
    let object = Object { inode: 0, magic, dev, mode: 0 };
    // SAFETY: `event` points to reserved room for the whole record; the helper writes at most the path's length there,
    // and copies from any address or fails.
    unsafe {
        describe(event, pending, errno, object, level::TRACEPOINT);
        write_base(&raw mut (*event).base, base);
        let to = &raw mut (*event).old;
        if bpf_probe_read_user_str(to.cast(), PATH_LEN as u32, pending.old as *const _) < 0 {
            (&raw mut (*to)[0]).write(0);
        }
        let to = &raw mut (*event).new;
        if bpf_probe_read_user_str(to.cast(), PATH_LEN as u32, pending.new as *const _) < 0 {
            (&raw mut (*to)[0]).write(0);
        }
    }
    submit_now(entry);
    Some(())
}

/// The directory that `old` begins at.
#[inline(always)]
fn base(pending: &Pending) -> Option<Pointer> {
    let mut first = 0_u8;
    // SAFETY: the helper copies from any address, or fails.
    if let Ok(byte) = unsafe { bpf_probe_read_user(pending.old as *const u8) } {
        first = byte;
    }
    if first != b'/' && pending.old_dir >= 0 {
        return read(open_file(pending.old_dir as u32)?, offset!(file_dentry));
    }
    let fs: Pointer = read(current(), offset!(task_fs))?;
    read(fs, if first == b'/' { offset!(fs_root) } else { offset!(fs_pwd) })
}

/// Magic and device number of an overlay or of a watched file system.
#[inline(always)]
fn ours(sb: Pointer) -> Option<(u64, u32)> {
    let magic: u64 = read(sb, offset!(sb_magic))?;
    let dev: u32 = read(sb, offset!(sb_dev))?;
    if magic != OVERLAY_MAGIC && watch_of(dev).is_none() {
        return None;
    }
    Some((magic, dev))
}

/// Writes the names from `dentry` up to the root of its file system.
///
/// # Safety
///
/// `to` must point to room for them.
#[inline(always)]
unsafe fn write_base(to: *mut [[u8; NAME_LEN]; BASE_DEPTH], dentry: Pointer) {
    let mut dentry = dentry;
    for depth in 0..BASE_DEPTH {
        // SAFETY: the caller has the room, and `depth` is within it.
        let slot = unsafe { &raw mut (*to)[depth] };
        let parent: Pointer = read(dentry, offset!(dentry_parent)).unwrap_or(dentry);
        let name: Pointer = read(dentry, offset!(dentry_name)).unwrap_or(core::ptr::null());
        // SAFETY: the slot has room for as much as the helper may write.
        unsafe {
            if parent == dentry || bpf_probe_read_kernel_str(slot.cast(), NAME_LEN as u32, name.cast()) < 0 {
                (&raw mut (*slot)[0]).write(0);
                break;
            }
        }
        dentry = parent;
    }
}

// ---- Levels 2 and 3: the functions that do it ----

/// `vfs_rename(struct renamedata *)`; before 5.12 `(old_dir, old_dentry, new_dir, new_dentry, delegated, flags)`.
#[fexit(function = "vfs_rename")]
pub fn fexit_rename(ctx: FExitContext) -> i32 {
    if offset!(rename_old) == ABSENT {
        let mut pending = Pending::new(Call::AnyRename, ctx.arg(1), ctx.arg(3));
        pending.flags = ctx.arg(5);
        failed_dentry(&pending, ctx.arg(6), level::FEXIT).unwrap_or(());
    } else {
        failed_dentry(&renamed(ctx.arg(0)), ctx.arg(1), level::FEXIT).unwrap_or(());
    }
    0
}

/// `vfs_link(old_dentry, dir, new_dentry, delegated)`; since 5.12 with the mount's identities before.
///
/// The black boxes keep the compiler from making one load out of two at a computed place of the context, which the verifier
/// refuses.
#[fexit(function = "vfs_link")]
pub fn fexit_link(ctx: FExitContext) -> i32 {
    let (old, new, result) = if offset!(link_args) == 4 {
        (black_box(ctx.arg(0)), black_box(ctx.arg(2)), black_box(ctx.arg(4)))
    } else {
        (black_box(ctx.arg(1)), black_box(ctx.arg(3)), black_box(ctx.arg(5)))
    };
    failed_dentry(&Pending::new(Call::AnyLink, old, new), result, level::FEXIT).unwrap_or(());
    0
}

/// `notify_change(dentry, attributes, delegated)`; since 5.12 with the mount's identities before.
#[fexit(function = "notify_change")]
pub fn fexit_change(ctx: FExitContext) -> i32 {
    let (old, result) = if offset!(change_args) == 3 {
        (black_box(ctx.arg(0)), black_box(ctx.arg(3)))
    } else {
        (black_box(ctx.arg(1)), black_box(ctx.arg(4)))
    };
    failed_dentry(&Pending::new(Call::AnyAttributes, old, 0), result, level::FEXIT).unwrap_or(());
    0
}

#[kprobe(function = "vfs_rename")]
pub fn kprobe_rename(ctx: ProbeContext) -> u32 {
    let pending = if offset!(rename_old) == ABSENT {
        let mut pending = Pending::new(Call::AnyRename, ctx.arg(1).unwrap_or(0), ctx.arg(3).unwrap_or(0));
        pending.flags = ctx.arg(5).unwrap_or(0);
        pending
    } else {
        let Some(data) = ctx.arg(0) else { return 0 };
        renamed(data)
    };
    begin(&pending)
}

#[kprobe(function = "vfs_link")]
pub fn kprobe_link(ctx: ProbeContext) -> u32 {
    let (old, new) = if offset!(link_args) == 4 {
        (black_box(ctx.arg(0)), black_box(ctx.arg(2)))
    } else {
        (black_box(ctx.arg(1)), black_box(ctx.arg(3)))
    };
    begin(&Pending::new(Call::AnyLink, old.unwrap_or(0), new.unwrap_or(0)))
}

#[kprobe(function = "notify_change")]
pub fn kprobe_change(ctx: ProbeContext) -> u32 {
    let old = if offset!(change_args) == 3 { black_box(ctx.arg(0)) } else { black_box(ctx.arg(1)) };
    begin(&Pending::new(Call::AnyAttributes, old.unwrap_or(0), 0))
}

/// At the return of all three.
#[kretprobe]
pub fn kretprobe_call(ctx: RetProbeContext) -> u32 {
    let thread = bpf_get_current_pid_tgid();
    let Some(slot) = PENDING.get_ptr_mut(&thread) else { return 0 };
    // SAFETY: the entry is the running thread's own.
    let slot = unsafe { &mut *slot };
    if slot.depth > 0 {
        slot.depth -= 1;
        return 0;
    }
    let pending = *slot;
    // It is there: this thread has just found it.
    PENDING.remove(&thread).ok();
    failed_dentry(&pending, ctx.ret(), level::KPROBE).unwrap_or(());
    0
}

/// Remembers the outermost call of this thread that is worth it.
#[inline(always)]
fn begin(pending: &Pending) -> u32 {
    let thread = bpf_get_current_pid_tgid();
    if let Some(outer) = PENDING.get_ptr_mut(&thread) {
        // SAFETY: the entry is the running thread's own.
        let outer = unsafe { &mut *outer };
        outer.depth = outer.depth.saturating_add(1);
        return 0;
    }
    if object(pending.old as Pointer).is_none() {
        return 0;
    }
    enter(pending)
}

/// What a `struct renamedata` says.
#[inline(always)]
fn renamed(data: Pointer) -> Pending {
    let old = read(data, offset!(rename_old)).unwrap_or(0);
    let new = read(data, offset!(rename_new)).unwrap_or(0);
    let mut pending = Pending::new(Call::AnyRename, old, new);
    pending.flags = read(data, offset!(rename_flags)).unwrap_or(0);
    pending
}

/// What a call was about.
#[derive(Clone, Copy)]
struct Object {
    inode: u64,
    magic: u64,
    dev: u32,
    mode: u16,
}

/// The symbolic link that a dentry names, if it is in an overlay or in a watched file system.
#[inline(always)]
fn object(dentry: Pointer) -> Option<Object> {
    let inode: Pointer = read(dentry, offset!(dentry_inode))?;
    let mode: u16 = read(inode, offset!(inode_mode))?;
    if mode & S_IFMT != S_IFLNK {
        return None;
    }
    let sb: Pointer = read(inode, offset!(inode_sb))?;
    let (magic, dev) = ours(sb)?;
    Some(Object { inode: read(inode, offset!(inode_ino))?, magic, dev, mode })
}

#[inline(always)]
fn failed_dentry(pending: &Pending, result: i32, level: u8) -> Option<()> {
    if result >= 0 {
        return None;
    }
    let object = object(pending.old as Pointer)?;
    within_budget()?;
    let parent: Pointer = read(pending.old as Pointer, offset!(dentry_parent))?;
    let old: Pointer = read(pending.old as Pointer, offset!(dentry_name)).unwrap_or(core::ptr::null());
    let new: Pointer = read(pending.new as Pointer, offset!(dentry_name)).unwrap_or(core::ptr::null());
    let mut entry = reserve::<FailedEvent>()?;
    let event = entry.as_mut_ptr();
    // SAFETY: as in `failed_paths`.
    unsafe {
        describe(event, pending, result.unsigned_abs(), object, level);
        write_base(&raw mut (*event).base, parent);
        let to = &raw mut (*event).old;
        if bpf_probe_read_kernel_str(to.cast(), PATH_LEN as u32, old.cast()) < 0 {
            (&raw mut (*to)[0]).write(0);
        }
        let to = &raw mut (*event).new;
        if bpf_probe_read_kernel_str(to.cast(), PATH_LEN as u32, new.cast()) < 0 {
            (&raw mut (*to)[0]).write(0);
        }
    }
    submit_now(entry);
    Some(())
}

/// Writes all but the paths.
///
/// # Safety
///
/// `event` must point to room for the record.
#[inline(always)]
unsafe fn describe(event: *mut FailedEvent, pending: &Pending, errno: u32, object: Object, level: u8) {
    // SAFETY: the caller has the room.
    unsafe {
        (&raw mut (*event).head).write(head(Kind::Failed, level));
        (&raw mut (*event).inode).write(object.inode);
        (&raw mut (*event).magic).write(object.magic);
        (&raw mut (*event).dev).write(object.dev);
        (&raw mut (*event).errno).write(errno);
        (&raw mut (*event).call).write(pending.call);
        (&raw mut (*event).mode).write(object.mode);
        (&raw mut (*event).flags).write(pending.flags);
    }
}

/// `None` when enough was recorded in this second.
#[inline(always)]
fn within_budget() -> Option<()> {
    let budget = BUDGET.get_ptr_mut(0)?;
    // SAFETY: the pointer is to this processor's entry, which no other writes.
    let budget = unsafe { &mut *budget };
    let second = now_ns() / SECOND_NS;
    if budget.second != second {
        budget.second = second;
        budget.recorded = 0;
    }
    if budget.recorded >= PER_SECOND {
        lost(Drop::TooManyFailures);
        return None;
    }
    budget.recorded += 1;
    Some(())
}
