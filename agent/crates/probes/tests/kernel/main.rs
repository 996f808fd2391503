//! The probes in the running kernel, on real file systems. Needs root, as the agent does, mkfs.erofs, python3 and perl, and
//! probes built in (`cargo xtask ebpf`).

mod failures;
mod flood;
mod recording;
mod rig;
mod slow;
