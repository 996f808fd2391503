//! Whether the kernel lets us attach programs to functions by trampolines, tried with a program of two instructions.
//!
//! aya wants all of the kernel's types before it tries, which takes tens of MiB: worth it only where they are of use.

#![allow(unsafe_code, reason = "aya has no call for this")]

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use crate::btf::Btf;

/// `BPF_PROG_LOAD`, `linux/bpf.h`.
const PROG_LOAD: libc::c_int = 5;
/// `BPF_PROG_TYPE_TRACING`.
const TRACING: u32 = 26;
/// `BPF_TRACE_FENTRY`.
const FENTRY: u32 = 24;
/// A function that all kernels since 5.10 have.
const FUNCTION: &str = "security_file_open";

/// What of `union bpf_attr` loading a program takes (Linux 5.5).
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 4],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach: u32,
    types: u32,
    function_size: u32,
    functions: u64,
    function_count: u32,
    line_size: u32,
    lines: u64,
    line_count: u32,
    attach_type_id: u32,
    attach_program: u32,
    reserved: u32,
}

/// Why trampolines are not to be had, if the kernel says so.
pub(crate) fn refused(types: &Btf) -> Option<Errno> {
    // Without the function the usual way says what is wrong.
    let function = types.function(FUNCTION)?;
    // r0 = 0; exit
    let instructions: [u64; 2] = [0xB7, 0x95];
    let attributes = LoadAttributes {
        kind: TRACING,
        instruction_count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach: FENTRY,
        attach_type_id: function,
        ..LoadAttributes::default()
    };
    let size = size_of::<LoadAttributes>();
    // SAFETY: the structure has the layout and size that the kernel is told, and what it points to lives until the call returns.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attributes, size) };
    match Errno::result(loaded) {
        Ok(descriptor) => {
            if let Ok(descriptor) = i32::try_from(descriptor) {
                // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
                drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
            }
            None
        }
        Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::EOPNOTSUPP | Errno::ENOSYS)) => Some(errno),
        // Something is wrong with this program, maybe not with others.
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(offset_of!(LoadAttributes, kernel_version), 40);
        assert_eq!(offset_of!(LoadAttributes, expected_attach), 68);
        assert_eq!(offset_of!(LoadAttributes, attach_type_id), 108);
        assert_eq!(size_of::<LoadAttributes>(), 120);
    }
}
