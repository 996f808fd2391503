//! Where the running kernel keeps what the programs read.
//!
//! The programs are one object for all kernels. Before it is loaded, the agent finds these numbers in the kernel's type
//! information (BTF) and writes them over the object's read-only data, where the verifier takes them for constants and
//! leaves out what they make unreachable.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The kernel has no such thing.
pub const ABSENT: u32 = u32::MAX;

/// How `sched_switch` tells the state of the thread that goes, `Offsets::switch_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum SwitchState {
    /// Not at all: read it at [`Offsets::task_state`].
    InTask = 0,
    /// As the fourth argument (Linux 5.18).
    Argument = 1,
}

/// What `private_data` of an overlay's open file is, `Offsets::overlay_file`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum OverlayFile {
    /// Not known: overlayfs is a module that is not loaded yet.
    Unknown = 0,
    /// The real file.
    Real = 1,
    /// A `struct ovl_file`, which begins with the real file (6.13).
    Structure = 2,
}

/// Byte offsets of fields, and a few facts about functions' arguments. [`ABSENT`]: not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Offsets {
    /// `struct folio` (before 5.16 `struct page`): `mapping`.
    pub folio_mapping: u32,
    /// The same: `index`.
    pub folio_index: u32,
    /// The same: `flags`.
    pub folio_flags: u32,
    /// Bit of `flags` that says that the folio has several pages (`PG_head`).
    pub folio_head_bit: u32,
    /// Byte that holds the order of a folio with several pages.
    pub folio_order: u32,
    /// `struct address_space`: `host`.
    pub mapping_host: u32,
    /// `struct inode`: `i_sb`.
    pub inode_sb: u32,
    /// `struct inode`: `i_ino`.
    pub inode_ino: u32,
    /// `struct inode`: `i_size`.
    pub inode_size: u32,
    /// `struct inode`: `i_mode`.
    pub inode_mode: u32,
    /// `struct inode`: `i_mapping`.
    pub inode_mapping: u32,
    /// `struct inode`: `i_data`.
    pub inode_data: u32,
    /// `struct super_block`: `s_dev`.
    pub sb_dev: u32,
    /// `struct super_block`: `s_magic`.
    pub sb_magic: u32,
    /// `struct file`: `f_inode`.
    pub file_inode: u32,
    /// `struct file`: `private_data`.
    pub file_private: u32,
    /// `struct task_struct`: `nsproxy`.
    pub task_nsproxy: u32,
    /// `struct nsproxy`: `mnt_ns`.
    pub nsproxy_mnt_ns: u32,
    /// `struct mnt_namespace`: `ns.inum`.
    pub mnt_ns_inum: u32,
    /// `struct task_struct`: `pid`.
    pub task_pid: u32,
    /// `struct task_struct`: `files`.
    pub task_files: u32,
    /// `struct task_struct`: `__state` or `state`.
    pub task_state: u32,
    /// `struct task_struct`: byte that holds `in_iowait`.
    pub task_iowait: u32,
    /// The bit of that byte, as a mask.
    pub task_iowait_mask: u32,
    /// `struct files_struct`: `fdt`.
    pub files_fdt: u32,
    /// `struct files_struct`: `fdtab`, the table that `fdt` points to until a process has many descriptors.
    pub files_fdtab: u32,
    /// `struct files_struct`: `fd_array`, the array of that table.
    pub files_fd_array: u32,
    /// `struct fdtable`: `fd`.
    pub fdtable_fd: u32,
    /// `struct linux_binprm`: `file`.
    pub bprm_file: u32,
    /// `struct linux_binprm`: `filename`.
    pub bprm_filename: u32,
    /// `struct kiocb`: `ki_filp`.
    pub kiocb_file: u32,
    /// `struct kiocb`: `ki_pos`.
    pub kiocb_pos: u32,
    /// `struct iov_iter`: `count`.
    pub iter_count: u32,
    /// `struct vm_fault`: `vma`.
    pub fault_vma: u32,
    /// `struct vm_fault`: `pgoff`.
    pub fault_pgoff: u32,
    /// `struct vm_area_struct`: `vm_file`.
    pub vma_file: u32,
    /// `struct dentry`: `d_inode`.
    pub dentry_inode: u32,
    /// `struct dentry`: `d_name.name`.
    pub dentry_name: u32,
    /// `struct dentry`: `d_parent`.
    pub dentry_parent: u32,
    /// `struct dentry`: `d_sb`.
    pub dentry_sb: u32,
    /// `struct task_struct`: `fs`.
    pub task_fs: u32,
    /// `struct fs_struct`: `root.dentry`.
    pub fs_root: u32,
    /// `struct fs_struct`: `pwd.dentry`.
    pub fs_pwd: u32,
    /// `struct file`: `f_path.dentry`.
    pub file_dentry: u32,
    /// `struct renamedata`: `old_dentry` (5.12; before, the dentries are arguments).
    pub rename_old: u32,
    /// `struct renamedata`: `new_dentry`.
    pub rename_new: u32,
    /// `struct renamedata`: `flags`.
    pub rename_flags: u32,
    /// How many arguments `vfs_link` has.
    pub link_args: u32,
    /// How many arguments `notify_change` has.
    pub change_args: u32,
    /// A [`SwitchState`].
    pub switch_state: u32,
    /// An [`OverlayFile`].
    pub overlay_file: u32,
}

impl Offsets {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self {
        folio_mapping: ABSENT,
        folio_index: ABSENT,
        folio_flags: ABSENT,
        folio_head_bit: ABSENT,
        folio_order: ABSENT,
        mapping_host: ABSENT,
        inode_sb: ABSENT,
        inode_ino: ABSENT,
        inode_size: ABSENT,
        inode_mode: ABSENT,
        inode_mapping: ABSENT,
        inode_data: ABSENT,
        sb_dev: ABSENT,
        sb_magic: ABSENT,
        file_inode: ABSENT,
        file_private: ABSENT,
        task_nsproxy: ABSENT,
        nsproxy_mnt_ns: ABSENT,
        mnt_ns_inum: ABSENT,
        task_pid: ABSENT,
        task_files: ABSENT,
        task_state: ABSENT,
        task_iowait: ABSENT,
        task_iowait_mask: ABSENT,
        files_fdt: ABSENT,
        files_fdtab: ABSENT,
        files_fd_array: ABSENT,
        fdtable_fd: ABSENT,
        bprm_file: ABSENT,
        bprm_filename: ABSENT,
        kiocb_file: ABSENT,
        kiocb_pos: ABSENT,
        iter_count: ABSENT,
        fault_vma: ABSENT,
        fault_pgoff: ABSENT,
        vma_file: ABSENT,
        dentry_inode: ABSENT,
        dentry_name: ABSENT,
        dentry_parent: ABSENT,
        dentry_sb: ABSENT,
        task_fs: ABSENT,
        fs_root: ABSENT,
        fs_pwd: ABSENT,
        file_dentry: ABSENT,
        rename_old: ABSENT,
        rename_new: ABSENT,
        rename_flags: ABSENT,
        link_args: ABSENT,
        change_args: ABSENT,
        switch_state: ABSENT,
        overlay_file: OverlayFile::Unknown as u32,
    };
}

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn it_is_an_array_of_words() {
        assert_eq!(size_of::<Offsets>(), 51 * 4);
    }
}
