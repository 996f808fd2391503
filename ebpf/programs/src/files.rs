//! Opens and executions of watched files.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use aya_ebpf::macros::{fentry, kprobe, raw_tracepoint, tracepoint};
use aya_ebpf::programs::{FEntryContext, ProbeContext, RawTracePointContext, TracePointContext};
use sluice_events::{ExecEvent, Kind, OVERLAY_MAGIC, OpenEvent, PATH_LEN, level};

use crate::kernel::{
    Inode, Pointer, TypedFile, Watched, mount_namespace, open_file, read, typed, typed_mount_namespace,
    typed_open_file, typed_watched, under_overlay, watched_file,
};
use crate::maps::offset;
use crate::record::{head, head_in, reserve, submit};
use crate::seen::Seen;

/// Offset of the result in the record of `syscalls:sys_exit_*`, the same in all kernels since 2.6.
const EXIT_RESULT: usize = 16;

/// At the exits of `open`, `openat` and `openat2`: the descriptor leads to the file.
#[tracepoint]
pub fn typed_exit_open(ctx: TracePointContext) -> u32 {
    descriptor(&ctx).and_then(typed_open_file).and_then(|file| match file {
        TypedFile::Typed(file) => typed_opened_anywhere(file),
        TypedFile::Plain(file) => opened_anywhere(file, typed_mount_namespace),
    });
    0
}

/// The same on kernels before 5.11.
#[tracepoint]
pub fn exit_open(ctx: TracePointContext) -> u32 {
    descriptor(&ctx).and_then(open_file).and_then(|file| opened_anywhere(file, mount_namespace));
    0
}

/// What the call returned, if that is no error.
#[inline(always)]
fn descriptor(ctx: &TracePointContext) -> Option<u32> {
    // SAFETY: the record of the tracepoint has a long there.
    let result = unsafe { ctx.as_ptr().byte_add(EXIT_RESULT).cast::<i64>().read_volatile() };
    u32::try_from(result).ok()
}

/// A file was opened, maybe through an overlay.
#[inline(always)]
fn opened_anywhere(file: Pointer, mount_namespace: impl Fn() -> u32) -> Option<()> {
    let inode = Inode::of_file(file)?;
    if inode.is_overlay()? {
        let dev = read(inode.sb, offset!(sb_dev))?;
        return opened_above(file, dev, inode.number, inode.size, mount_namespace());
    }
    opened(inode.watched()?, mount_namespace(), level::TRACEPOINT);
    Some(())
}

/// The same by [`typed`] reads.
#[inline(always)]
fn typed_opened_anywhere(file: Pointer) -> Option<()> {
    let inode: Pointer = typed(file, offset!(file_inode));
    let sb: Pointer = typed(inode, offset!(inode_sb));
    if typed::<u64>(sb, offset!(sb_magic)) == OVERLAY_MAGIC {
        let (number, size) = (typed(inode, offset!(inode_ino)), typed(inode, offset!(inode_size)));
        return opened_above(file, typed(sb, offset!(sb_dev)), number, size, typed_mount_namespace());
    }
    opened(typed_watched(inode)?, typed_mount_namespace(), level::TRACEPOINT);
    Some(())
}

/// An overlay's file was opened. That it is none of a watched file is remembered as well: containers that nobody records open files, too.
#[inline(always)]
fn opened_above(file: Pointer, dev: u32, inode: u64, size: u64, mnt_ns: u32) -> Option<()> {
    let seen = Seen::open_above(dev, inode, size, mnt_ns);
    if !seen.is_known() {
        if let Some(watched) = under_overlay(file) {
            record_open(watched, mnt_ns, level::TRACEPOINT);
        }
        seen.remember();
    }
    Some(())
}

/// `security_file_open(struct file *)`. An overlay opens the real file too, so that its inode comes by here.
#[fentry(function = "security_file_open")]
pub fn fentry_open(ctx: FEntryContext) -> i32 {
    if let Some(watched) = typed_watched(typed(ctx.arg(0), offset!(file_inode))) {
        opened(watched, mount_namespace(), level::FEXIT);
    }
    0
}

#[kprobe(function = "security_file_open")]
pub fn kprobe_open(ctx: ProbeContext) -> u32 {
    if let Some(watched) = ctx.arg(0).and_then(Inode::of_file).and_then(|inode| inode.watched()) {
        opened(watched, mount_namespace(), level::KPROBE);
    }
    0
}

#[inline(always)]
fn opened(watched: Watched, mnt_ns: u32, level: u8) {
    if Seen::open(watched, mnt_ns).remember() {
        record_open(watched, mnt_ns, level);
    }
}

#[inline(always)]
fn record_open(watched: Watched, mnt_ns: u32, level: u8) {
    let Some(mut entry) = reserve::<OpenEvent>() else { return };
    entry.write(OpenEvent {
        head: head_in(Kind::Open, level, mnt_ns),
        inode: watched.inode,
        dev: watched.dev,
        reserved: 0,
    });
    submit(entry);
}

/// `sched_process_exec(struct task_struct *, pid_t, struct linux_binprm *)`.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn raw_exec(ctx: RawTracePointContext) -> i32 {
    executed(ctx.arg(2)).map_or(0, |()| 0)
}

#[inline(always)]
fn executed(bprm: Pointer) -> Option<()> {
    let file: Pointer = read(bprm, offset!(bprm_file))?;
    let watched = watched_file(file)?;
    let path: Pointer = read(bprm, offset!(bprm_filename))?;
    let mut entry = reserve::<ExecEvent>()?;
    let event = entry.as_mut_ptr();
    // SAFETY: `event` points to reserved room for the whole record; the helper writes at most the path's length there.
    unsafe {
        (&raw mut (*event).head).write(head(Kind::Exec, level::TRACEPOINT));
        (&raw mut (*event).inode).write(watched.inode);
        (&raw mut (*event).dev).write(watched.dev);
        (&raw mut (*event).reserved).write(0);
        let to = &raw mut (*event).path;
        if bpf_probe_read_kernel_str(to.cast(), PATH_LEN as u32, path.cast()) < 0 {
            (&raw mut (*to)[0]).write(0);
        }
    }
    submit(entry);
    Some(())
}
