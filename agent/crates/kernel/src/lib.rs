//! The kernel interface: loop devices, mounts, reflinks. The only crate with unsafe code.
#![allow(unsafe_code, reason = "the one crate that talks to the kernel through ioctl and raw descriptors")]
