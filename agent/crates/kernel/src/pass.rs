//! Messages over a Unix socket that bring a descriptor along (`SCM_RIGHTS`).
//!
//! Between the agent and the server of its block files. Knows nothing of what the messages say.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Room for the control message of one descriptor, aligned as `cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

const FD_BYTES: u32 = size_of::<RawFd>() as u32;

/// Sends all of `bytes`, and `descriptor` with the first of them. Blocks while the socket is full.
pub fn send(stream: &UnixStream, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        match send_once(stream, rest, descriptor.filter(|_| sent == 0)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn send_once(stream: &UnixStream, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut message = empty_message(&mut part);
    if let Some(descriptor) = descriptor {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: a calculation with a number.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(FD_BYTES) } as _;
        // SAFETY: `message` points to a control buffer of the length it says, large enough for one header.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: a calculation with a number.
        let length = unsafe { libc::CMSG_LEN(FD_BYTES) };
        // SAFETY: `header` points into `control`, which is aligned, zeroed and borrowed by nobody else.
        let header = unsafe { &mut *header };
        header.cmsg_level = libc::SOL_SOCKET;
        header.cmsg_type = libc::SCM_RIGHTS;
        header.cmsg_len = length as _;
        // SAFETY: a calculation with a pointer into `control`.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: `CMSG_SPACE` left room for one descriptor behind the header; no alignment is assumed.
        unsafe { data.cast::<RawFd>().write_unaligned(descriptor.as_raw_fd()) };
    }
    // SAFETY: `message` and all it points to outlive the call; MSG_NOSIGNAL makes a closed peer an error.
    let result = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(result).map_err(|_negative| io::Error::last_os_error())
}

/// Fills `buffer`, and gives the descriptor that came with its bytes, if any. `UnexpectedEof`: the peer is gone.
pub fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Option<OwnedFd>> {
    let (mut filled, mut descriptor) = (0, None);
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match receive_once(stream, rest) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((count, came)) => {
                filled += count;
                descriptor = descriptor.or(came);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(descriptor)
}

fn receive_once(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut message = empty_message(&mut part);
    message.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: a calculation with a number. No more than one descriptor fits: the kernel closes what is beyond.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(FD_BYTES) } as _;
    // SAFETY: `message` and the buffers it points to outlive the call and are borrowed by nobody else.
    let result = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(result).map_err(|_negative| io::Error::last_os_error())?;
    // SAFETY: the kernel has set the length of the control buffer; the result is null or points into it.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: null, or a header that the kernel wrote.
    let Some(header) = (unsafe { header.as_ref() }) else { return Ok((count, None)) };
    if header.cmsg_level != libc::SOL_SOCKET || header.cmsg_type != libc::SCM_RIGHTS {
        return Ok((count, None));
    }
    // SAFETY: a calculation with a pointer into `control`.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: a message of this type holds at least one descriptor; no alignment is assumed.
    let fd = unsafe { data.cast::<RawFd>().read_unaligned() };
    // SAFETY: the kernel has just made this descriptor for us and nobody else owns it.
    Ok((count, Some(unsafe { OwnedFd::from_raw_fd(fd) })))
}

fn empty_message(part: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: plain numbers and pointers, for all of which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_arrives_with_its_bytes_and_only_then() {
        let (here, there) = UnixStream::pair().expect("pair");
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(b"content").expect("written");
        file.rewind().expect("seek");
        send(&here, b"first", None).expect("sent");
        send(&here, b"second", Some(file.as_fd())).expect("sent");
        drop((here, file));
        let mut buffer = [0; 5];
        assert!(receive(&there, &mut buffer).expect("received").is_none());
        assert_eq!(&buffer, b"first");
        let mut buffer = [0; 6];
        let came = receive(&there, &mut buffer).expect("received").expect("a descriptor");
        assert_eq!(&buffer, b"second");
        let mut text = String::new();
        File::from(came).read_to_string(&mut text).expect("reads");
        assert_eq!(text, "content");
        let error = receive(&there, &mut buffer).expect_err("the peer is gone");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn messages_larger_than_the_socket_pass() {
        let (here, there) = UnixStream::pair().expect("pair");
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| send(&here, &bytes, None).expect("sent"));
            let mut all = vec![0; bytes.len()];
            receive(&there, &mut all).expect("received");
            assert!(all == bytes);
        });
    }
}
