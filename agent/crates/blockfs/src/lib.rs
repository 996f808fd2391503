//! Layers as block devices: FUSE files, loop devices, EROFS mounts, hand-over to the kernel.
