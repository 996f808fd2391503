//! The kernel interface: loop devices, mounts, FUSE rings, reflinks, abilities. The only crate with unsafe code.
//!
//! Every other crate calls the safe functions here; nothing in here knows of images, layers or registries. Each module
//! has an error type of its own whose source is the errno that the kernel gave.
#![allow(unsafe_code, reason = "the one crate that talks to the kernel through ioctl and raw descriptors")]

pub mod abilities;
pub mod confine;
pub mod file;
mod fsopen;
pub mod fuse;
pub mod fuse_ring;
pub mod inherited;
pub mod loop_device;
pub mod mount;
pub mod mountinfo;
pub mod pass;
pub mod process;

pub use abilities::{Abilities, Ability};
pub use loop_device::{LoopDevice, LoopError, LoopOptions};
pub use mount::{ErofsMount, MountError, OverlayMount, mount_erofs, mount_overlay, unmount};
pub use mountinfo::{MountEntry, mounts};
