//! Memory that the kernel writes to while a ring lives: entries' headers and payloads.

use std::io;
use std::ptr::NonNull;

/// Bytes of `struct fuse_uring_req_header`: 128 in/out header, 128 operation header, 32 of the entry's own.
const HEADER_BYTES: usize = 288;
/// Where the two iovecs of the registration are, behind the header.
const IOVECS: usize = 320;
/// One entry's headers and iovecs; a multiple of the alignment of all of them.
const META_BYTES: usize = 512;

/// `flags` of `struct fuse_uring_ent_in_out`, which is at 256.
const FLAGS: usize = 256;
/// `commit_id` of the same.
const COMMIT_ID: usize = 256 + 8;
/// `payload_sz` of the same.
const PAYLOAD_SIZE: usize = 256 + 16;
/// `offset` of the same (7.46): where in the queue's pool the kernel put the payload.
const POOL_OFFSET: usize = 256 + 20;
/// The request's pages are a buffer of the ring, and it has no payload (`FUSE_URING_ENT_ZERO_COPY`, 7.46).
const ENTRY_ZERO_COPY: u64 = 1 << 0;

/// Memory of a number of entries, all zero at first. Pages are taken when they are first touched.
#[derive(Debug)]
pub(super) struct Region {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the region is plain memory with one owner; what points into it is used by that owner's thread only.
unsafe impl Send for Region {}

impl Region {
    pub(super) fn new(entries: usize, payload_bytes: usize) -> io::Result<(Self, Vec<Memory>)> {
        let meta = (entries * META_BYTES).next_multiple_of(4096);
        let bytes = meta + entries * payload_bytes;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Self { start, bytes };
        let at = |offset: usize| {
            debug_assert!(offset < bytes, "entries end within the region");
            // SAFETY: `offset` is less than the length of the mapping.
            unsafe { start.add(offset) }
        };
        let memory = |entry: usize| Memory {
            meta: at(entry * META_BYTES),
            payload: if payload_bytes == 0 { start } else { at(meta + entry * payload_bytes) },
            payload_bytes,
            pool_bytes: 0,
        };
        Ok((region, (0..entries).map(memory).collect()))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone; `FuseRing` closes its ring before, after which the kernel copies nothing here
        // (copies run in the submitter's `io_uring_enter`, reads into registered buffers hold the pages themselves).
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(result, 0, "a whole mapping can be unmapped");
    }
}

/// One entry's place in a region. Whoever owns the entry upholds that the region lives and that the kernel does not
/// have the entry when a method with a reference in its signature is called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    meta: NonNull<u8>,
    payload: NonNull<u8>,
    payload_bytes: usize,
    /// Payloads of the queue's pool, which begins at `payload`, in bytes; 0: this entry has a payload of its own.
    pool_bytes: usize,
}

impl Memory {
    /// With payloads of `payload_bytes` each from a pool: all of `pool`'s payload.
    pub(super) fn with_pool(self, pool: &Self, payload_bytes: usize) -> Self {
        Self { payload: pool.payload, payload_bytes, pool_bytes: pool.payload_bytes, ..self }
    }

    /// Whether the pages of the request in this entry are a buffer of the ring.
    pub(super) fn is_zero_copied(&self) -> bool {
        self.pool_bytes > 0 && u64::from_ne_bytes(self.read(FLAGS)) & ENTRY_ZERO_COPY != 0
    }

    /// Where the payload is, and how long; none for a request that is zero-copied.
    fn place(&self) -> (NonNull<u8>, usize) {
        if self.pool_bytes == 0 {
            return (self.payload, self.payload_bytes);
        }
        let offset = u32::from_ne_bytes(self.read(POOL_OFFSET)) as usize;
        if self.is_zero_copied() || offset + self.payload_bytes > self.pool_bytes {
            return (self.payload, 0);
        }
        // SAFETY: within the queue's pool, as was just checked.
        (unsafe { self.payload.add(offset) }, self.payload_bytes)
    }

    /// Of the request in this entry, or of a new entry.
    pub(super) fn payload_iovec(&self) -> libc::iovec {
        let (start, length) = self.place();
        libc::iovec { iov_base: start.as_ptr().cast(), iov_len: length }
    }

    /// Writes the two iovecs that a registration points to; gives their address.
    pub(super) fn write_iovecs(&self) -> u64 {
        let headers = libc::iovec { iov_base: self.meta.as_ptr().cast(), iov_len: HEADER_BYTES };
        // SAFETY: within the entry's meta bytes, see `IOVECS`.
        let place = unsafe { self.meta.add(IOVECS) };
        let payload = match self.pool_bytes {
            0 => self.payload_iovec(),
            _ => libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
        };
        // SAFETY: `place` is aligned (512 + 320) and has room for two iovecs; the kernel only reads it.
        unsafe { place.cast::<[libc::iovec; 2]>().write([headers, payload]) };
        place.as_ptr() as u64
    }

    /// The request's `fuse_in_header` (40 bytes) and, from 128, the operation's own header.
    pub(super) fn headers(&self) -> &[u8; 256] {
        // SAFETY: initialised (mapped zero, then written by the kernel), within the region, and not the kernel's now.
        unsafe { self.meta.cast::<[u8; 256]>().as_ref() }
    }

    pub(super) fn payload(&self, length: usize) -> &[u8] {
        let (start, all) = self.place();
        // SAFETY: as for `headers`; no more than the payload's length.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), length.min(all)) }
    }

    pub(super) fn payload_mut(&mut self) -> &mut [u8] {
        let (start, length) = self.place();
        // SAFETY: as for `headers`; borrowed mutably from the one owner of the entry.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), length) }
    }

    /// What the kernel calls this request, and how many bytes it put into the payload.
    pub(super) fn entry_header(&self) -> (u64, usize) {
        (u64::from_ne_bytes(self.read(COMMIT_ID)), u32::from_ne_bytes(self.read(PAYLOAD_SIZE)) as usize)
    }

    /// Writes `struct fuse_out_header` and the payload's length.
    pub(super) fn write_reply(&mut self, unique: u64, error: i32, payload_bytes: u32) {
        let length = 16 + payload_bytes;
        self.write(0, length.to_ne_bytes());
        self.write(4, error.to_ne_bytes());
        self.write(8, unique.to_ne_bytes());
        self.write(PAYLOAD_SIZE, payload_bytes.to_ne_bytes());
    }

    fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        assert!(offset + N <= HEADER_BYTES, "within the header");
        // SAFETY: within the header, as was just checked.
        let place = unsafe { self.meta.add(offset) };
        // SAFETY: initialised memory of this entry; byte arrays have no alignment.
        unsafe { place.cast::<[u8; N]>().read() }
    }

    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        assert!(offset + N <= HEADER_BYTES, "within the header");
        // SAFETY: within the header, as was just checked.
        let place = unsafe { self.meta.add(offset) };
        // SAFETY: memory of this entry, borrowed mutably; byte arrays have no alignment.
        unsafe { place.cast::<[u8; N]>().write(bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_do_not_overlap_and_replies_are_where_the_kernel_looks() {
        let (_region, mut entries) = Region::new(3, 8192).expect("mapped");
        for (number, memory) in entries.iter_mut().enumerate() {
            memory.payload_mut().fill(number as u8 + 1);
            memory.write_reply(7 + number as u64, -5, 4096);
            memory.write_iovecs();
        }
        for (number, memory) in entries.iter().enumerate() {
            assert!(memory.payload(8192).iter().all(|byte| *byte == number as u8 + 1));
            let headers = memory.headers();
            assert_eq!(headers[..4], 4112_u32.to_ne_bytes());
            assert_eq!(headers[4..8], (-5_i32).to_ne_bytes());
            assert_eq!(headers[8..16], (7 + number as u64).to_ne_bytes());
            assert_eq!(memory.entry_header(), (0, 4096));
        }
    }

    #[test]
    fn a_payload_is_where_in_the_pool_the_kernel_says_and_nowhere_else() {
        let (_pool, pool) = Region::new(1, 3 * 8192).expect("mapped");
        let (_region, entries) = Region::new(1, 0).expect("mapped");
        let mut memory = entries[0].with_pool(&pool[0], 8192);
        let pool = pool[0].payload_iovec();
        for (offset, flags, bytes) in [(8192_u32, 0_u64, 8192), (16_384, 0, 8192), (16_385, 0, 0), (0, 1, 0)]
        {
            memory.write(POOL_OFFSET, offset.to_ne_bytes());
            memory.write(FLAGS, flags.to_ne_bytes());
            let place = memory.payload_iovec();
            assert_eq!((place.iov_len, memory.payload_mut().len()), (bytes, bytes), "{offset}");
            assert!(bytes == 0 || place.iov_base == pool.iov_base.wrapping_byte_add(offset as usize));
            assert_eq!(memory.is_zero_copied(), flags == 1);
        }
    }
}
