//! Which pages of watched files are accessed, and which come into the page cache.
//!
//! An access is a record, once per page and mount namespace, so it is seen whether the page is in memory or not. What comes
//! into the page cache (asked for or read ahead, page by page) is only marked in a map that the agent takes out.

use aya_ebpf::macros::{btf_tracepoint, fentry, kprobe, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, FEntryContext, ProbeContext, RawTracePointContext};
use sluice_events::{
    ABSENT, AccessEvent, CHUNK_PAGES, CHUNK_SHIFT, Drop, FillKey, FillValue, Kind, Waiting, level,
};

use crate::kernel::{
    Inode, Pointer, Watched, Words, mount_namespace, read, typed, typed_mount_namespace, typed_watched,
};
use crate::maps::{FILLED, WAITING, lost, offset};
use crate::record::{cgroup, head_in, now_ns, pid, reserve, submit};
use crate::seen::Seen;

const PAGE_SHIFT: u32 = 12;
/// A folio of more pages than 2 to this would be larger than any the kernel makes.
const MAX_ORDER: u32 = 9;

#[btf_tracepoint(function = "mm_filemap_get_pages")]
pub fn typed_get_pages(ctx: BtfTracePointContext) -> i32 {
    typed_access(ctx.arg(0), ctx.arg(1), ctx.arg(2), Kind::Read)
}

#[btf_tracepoint(function = "mm_filemap_fault")]
pub fn typed_fault(ctx: BtfTracePointContext) -> i32 {
    let page: u64 = ctx.arg(1);
    typed_access(ctx.arg(0), page, page, Kind::Fault)
}

#[btf_tracepoint(function = "mm_filemap_map_pages")]
pub fn typed_map_pages(ctx: BtfTracePointContext) -> i32 {
    typed_access(ctx.arg(0), ctx.arg(1), ctx.arg(2), Kind::Around)
}

#[raw_tracepoint(tracepoint = "mm_filemap_get_pages")]
pub fn raw_get_pages(ctx: RawTracePointContext) -> i32 {
    access(ctx.arg(0), ctx.arg(1), ctx.arg(2), Kind::Read)
}

#[raw_tracepoint(tracepoint = "mm_filemap_fault")]
pub fn raw_fault(ctx: RawTracePointContext) -> i32 {
    let page: u64 = ctx.arg(1);
    access(ctx.arg(0), page, page, Kind::Fault)
}

#[raw_tracepoint(tracepoint = "mm_filemap_map_pages")]
pub fn raw_map_pages(ctx: RawTracePointContext) -> i32 {
    access(ctx.arg(0), ctx.arg(1), ctx.arg(2), Kind::Around)
}

/// `filemap_read(struct kiocb *, struct iov_iter *, ...)`.
#[fentry(function = "filemap_read")]
pub fn fentry_read(ctx: FEntryContext) -> i32 {
    let (iocb, iter): (Pointer, Pointer) = (ctx.arg(0), ctx.arg(1));
    let file: Pointer = typed(iocb, offset!(kiocb_file));
    if let Some(watched) = typed_watched(typed(file, offset!(file_inode))) {
        let (position, count) = (typed(iocb, offset!(kiocb_pos)), typed(iter, offset!(iter_count)));
        read_call(watched, position, count, level::FEXIT);
    }
    0
}

#[kprobe(function = "filemap_read")]
pub fn kprobe_read(ctx: ProbeContext) -> u32 {
    let call = || {
        let (iocb, iter): (Pointer, Pointer) = (ctx.arg(0)?, ctx.arg(1)?);
        let watched = Inode::of_file(read(iocb, offset!(kiocb_file))?)?.watched()?;
        let (position, count) = (read(iocb, offset!(kiocb_pos))?, read(iter, offset!(iter_count))?);
        read_call(watched, position, count, level::KPROBE);
        Some(())
    };
    call().map_or(0, |()| 0)
}

#[fentry(function = "filemap_fault")]
pub fn fentry_fault(ctx: FEntryContext) -> i32 {
    typed_fault_call(ctx.arg(0))
}

#[kprobe(function = "filemap_fault")]
pub fn kprobe_fault(ctx: ProbeContext) -> u32 {
    ctx.arg(0).and_then(fault_call).map_or(0, |()| 0)
}

/// The page of the fault itself: exact, unlike the tracepoint of the same name.
#[fentry(function = "filemap_map_pages")]
pub fn fentry_map_pages(ctx: FEntryContext) -> i32 {
    typed_fault_call(ctx.arg(0))
}

#[kprobe(function = "filemap_map_pages")]
pub fn kprobe_map_pages(ctx: ProbeContext) -> u32 {
    ctx.arg(0).and_then(fault_call).map_or(0, |()| 0)
}

#[raw_tracepoint(tracepoint = "mm_filemap_add_to_page_cache")]
pub fn raw_fill(ctx: RawTracePointContext) -> i32 {
    fill(ctx.arg(0)).map_or(0, |()| 0)
}

#[inline(always)]
fn read_call(watched: Watched, position: u64, count: u64, level: u8) {
    if count > 0 {
        let last = position.saturating_add(count - 1) >> PAGE_SHIFT;
        touched(watched, position >> PAGE_SHIFT, last, Kind::Read, level, mount_namespace());
    }
}

/// `filemap_fault(struct vm_fault *)` and its like.
#[inline(always)]
fn typed_fault_call(fault: Pointer) -> i32 {
    let file: Pointer = typed(typed(fault, offset!(fault_vma)), offset!(vma_file));
    if let Some(watched) = typed_watched(typed(file, offset!(file_inode))) {
        let page: u64 = typed(fault, offset!(fault_pgoff));
        touched(watched, page, page, Kind::Fault, level::FEXIT, mount_namespace());
    }
    0
}

/// The same.
#[inline(always)]
fn fault_call(fault: Pointer) -> Option<()> {
    let file: Pointer = read(read(fault, offset!(fault_vma))?, offset!(vma_file))?;
    let watched = Inode::of_file(file)?.watched()?;
    let page: u64 = read(fault, offset!(fault_pgoff))?;
    touched(watched, page, page, Kind::Fault, level::KPROBE, mount_namespace());
    Some(())
}

#[inline(always)]
fn typed_access(mapping: Pointer, first: u64, last: u64, kind: Kind) -> i32 {
    if let Some(watched) = typed_watched(typed(mapping, offset!(mapping_host))) {
        touched(watched, first, last, kind, level::TRACEPOINT, typed_mount_namespace());
    }
    0
}

#[inline(always)]
fn access(mapping: Pointer, first: u64, last: u64, kind: Kind) -> i32 {
    if let Some(watched) = Inode::of_mapping(mapping).and_then(|inode| inode.watched()) {
        touched(watched, first, last, kind, level::TRACEPOINT, mount_namespace());
    }
    0
}

/// Records pages `first..=last` of a file if one of them was not accessed before from this mount namespace.
#[inline(always)]
fn touched(watched: Watched, first: u64, last: u64, kind: Kind, level: u8, mnt_ns: u32) {
    // Programs read with large buffers: what is behind the end was not read.
    let Some(end) = watched.size.checked_sub(1) else { return };
    let last = last.min(end >> PAGE_SHIFT);
    if last < first {
        return;
    }
    // Pages that are known and have left the memory are waited for too: their coming back says so.
    let Some((first, last)) = first_touch(watched, first, last, mnt_ns) else { return };
    let fault = kind as u16 == Kind::Fault as u16;
    // The tracepoint of reads comes after the waiting, and what is mapped around a fault is not waited for.
    if fault || level > level::TRACEPOINT {
        asked(watched, first, 0, u32::from(fault), mnt_ns);
    }
    let Some(mut entry) = reserve::<AccessEvent>() else { return };
    entry.write(AccessEvent {
        head: head_in(kind, level, mnt_ns),
        inode: watched.inode,
        first_page: first,
        pages: (last - first + 1) as u32,
        dev: watched.dev,
    });
    submit(entry);
}

/// Those of pages `first..=last` that are in a chunk, a bit each.
#[inline(always)]
fn part_in(chunk: u64, first: u64, last: u64) -> u32 {
    let begin = chunk << CHUNK_SHIFT;
    let from = first.max(begin) - begin;
    let to = last.min(begin + CHUNK_PAGES as u64 - 1) - begin;
    (u32::MAX << (from & 31)) & (u32::MAX >> (31 - (to & 31)))
}

/// The part of `first..=last` that holds all pages not yet known to be recorded; remembers that they are.
#[inline(always)]
fn first_touch(watched: Watched, first: u64, last: u64, mnt_ns: u32) -> Option<(u64, u64)> {
    let (first_chunk, last_chunk) = (first >> CHUNK_SHIFT, last >> CHUNK_SHIFT);
    if last_chunk - first_chunk > 1 {
        return Seen::run(watched, first, last, mnt_ns).remember_run().then_some((first, last));
    }
    if first_chunk == last_chunk {
        return is_new(watched, first_chunk, first, last, mnt_ns).then_some((first, last));
    }
    // What is mapped around a fault is often in two chunks: it is aligned in memory, not in the file.
    let border = last_chunk << CHUNK_SHIFT;
    let in_first = is_new(watched, first_chunk, first, border - 1, mnt_ns);
    match (in_first, is_new(watched, last_chunk, border, last, mnt_ns)) {
        (true, true) => Some((first, last)),
        (true, false) => Some((first, border - 1)),
        (false, true) => Some((border, last)),
        (false, false) => None,
    }
}

/// Remembers the part in one chunk. Says whether that was new.
#[inline(always)]
fn is_new(watched: Watched, chunk: u64, first: u64, last: u64, mnt_ns: u32) -> bool {
    Seen::pages(watched, chunk, part_in(chunk, first, last), mnt_ns).remember()
}

/// Notes what the running thread asks for, in case it has to sleep for it: `pages` of them are being brought into memory.
#[inline(always)]
fn asked(watched: Watched, page: u64, pages: u64, exact: u32, mnt_ns: u32) {
    let pid = pid();
    if let Some(waiting) = WAITING.get_ptr_mut(&pid) {
        // SAFETY: the pointer is to the running thread's own entry.
        let waiting = unsafe { &mut *waiting };
        // Another namespace or another control group mean that the number may have been given to a new thread.
        if waiting.cgroup == cgroup() && waiting.mnt_ns == mnt_ns {
            let continues = pages > 0 && (waiting.run_end == page || waiting.exact != 0);
            if !continues || waiting.inode != watched.inode || waiting.dev != watched.dev {
                (waiting.inode, waiting.page, waiting.dev) = (watched.inode, page, watched.dev);
                waiting.exact = exact;
            }
            (waiting.watch, waiting.run_end, waiting.since_ns) = (watched.watch, page + pages, 0);
            return;
        }
    }
    let head = head_in(Kind::Blocked, 0, mnt_ns);
    let waiting = Waiting {
        inode: watched.inode,
        page,
        run_end: page + pages,
        since_ns: 0,
        cgroup: head.cgroup,
        dev: watched.dev,
        mnt_ns: head.mnt_ns,
        tgid: head.tgid,
        exact,
        watch: watched.watch,
        reserved: 0,
        comm: head.comm,
    };
    // Without an entry a sleep is not seen.
    if WAITING.insert(&pid, &waiting, 0).is_err() {
        lost(Drop::FillMapFull);
    }
}

/// Marks the pages of a folio that was put into the page cache.
#[inline(always)]
fn fill(folio: Pointer) -> Option<()> {
    // From `flags` to `index`.
    let words = Words::<5>::read(folio, 0)?;
    let mapping = words.get(offset!(folio_mapping))? as Pointer;
    let Some(watched) = Inode::of_mapping(mapping).and_then(|inode| inode.watched()) else {
        // The thread's next sleep is for another file system.
        WAITING.remove(&pid()).ok();
        return None;
    };
    let index = words.get(offset!(folio_index))?;
    let order = order(folio);
    let mnt_ns = mount_namespace();
    asked(watched, index, 1 << order, 0, mnt_ns);
    if order <= CHUNK_SHIFT {
        let chunk = index >> CHUNK_SHIFT;
        // A folio's place is a multiple of its size.
        fill_chunk(FillKey { inode: watched.inode, chunk, watch: watched.watch, mnt_ns }, index, order);
        return Some(());
    }
    // Rare: a record of its own costs less than to mark each chunk.
    let mut entry = reserve::<AccessEvent>()?;
    entry.write(AccessEvent {
        head: head_in(Kind::Fill, level::TRACEPOINT, mnt_ns),
        inode: watched.inode,
        first_page: index,
        pages: 1 << order,
        dev: watched.dev,
    });
    submit(entry);
    Some(())
}

/// The binary logarithm of how many pages a folio has.
#[inline(always)]
fn order(folio: Pointer) -> u32 {
    if offset!(folio_order) == ABSENT {
        return 0;
    }
    let flags: u64 = read(folio, offset!(folio_flags)).unwrap_or(0);
    if flags & (1 << (offset!(folio_head_bit) & 63)) == 0 {
        return 0;
    }
    let order: u8 = read(folio, offset!(folio_order)).unwrap_or(0);
    u32::from(order).min(MAX_ORDER)
}

#[inline(always)]
fn fill_chunk(key: FillKey, index: u64, order: u32) {
    let value = match FILLED.get_ptr_mut(&key) {
        Some(value) => value,
        None => {
            let head = head_in(Kind::Read, 0, key.mnt_ns);
            let new = FillValue {
                first_ns: now_ns(),
                cgroup: head.cgroup,
                tgid: head.tgid,
                pid: head.pid,
                comm: head.comm,
                pages: [0; CHUNK_PAGES],
            };
            // Not over an entry that another processor has just made.
            FILLED.insert(&key, &new, 1).ok();
            let Some(value) = FILLED.get_ptr_mut(&key) else { return lost(Drop::FillMapFull) };
            value
        }
    };
    let place = (index & (CHUNK_PAGES as u64 - 1)) as usize;
    if order == 0 {
        // SAFETY: the pointer is to an entry of the map, and the place is within its array.
        unsafe { (*value).pages[place] = 1 }
        return;
    }
    // Few branches: the verifier of older kernels walks through each combination of them.
    for page in 0..CHUNK_PAGES {
        if page >> order == place >> order {
            // SAFETY: as above.
            unsafe { (*value).pages[page] = 1 }
        }
    }
}
