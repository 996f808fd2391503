//! The running kernel's offsets, for the eBPF programs.
//!
//! Never from the version: distributions move things between versions. Each has alternatives where kernels differ.

use sluice_events::{ABSENT, Offsets, OverlayFile, SwitchState};

use crate::btf::Btf;

/// Finds all; what the kernel does not have is [`ABSENT`].
pub(crate) fn resolve(btf: &Btf) -> Offsets {
    let find = |alternatives: &[(&str, &str)]| {
        let mut found = alternatives.iter().filter_map(|(structure, path)| btf.offset(structure, path));
        found.next().unwrap_or(ABSENT)
    };
    let at = |structure: &str, path: &str| find(&[(structure, path)]);
    // Before 5.16 pages stood where folios stand; folios begin with what pages began with.
    let folio = if btf.has_structure("folio") { "folio" } else { "page" };
    let (iowait, iowait_mask) = btf.bit("task_struct", "in_iowait").unwrap_or((ABSENT, 0));
    let state = match btf.tracepoint_arguments("sched_switch") {
        Some(3) => SwitchState::InTask as u32,
        Some(_) => SwitchState::Argument as u32,
        None => ABSENT,
    };
    Offsets {
        folio_mapping: at(folio, "mapping"),
        folio_index: at(folio, "index"),
        folio_flags: at(folio, "flags"),
        folio_head_bit: btf.value("pageflags", "PG_head").unwrap_or(ABSENT),
        // A byte of its own until 6.5, then the lowest byte of the second page's flags. Before folios EROFS used
        // single pages.
        folio_order: find(&[("folio", "_folio_order"), ("folio", "_flags_1")]),
        mapping_host: at("address_space", "host"),
        inode_sb: at("inode", "i_sb"),
        inode_ino: at("inode", "i_ino"),
        inode_size: at("inode", "i_size"),
        inode_mode: at("inode", "i_mode"),
        inode_mapping: at("inode", "i_mapping"),
        inode_data: at("inode", "i_data"),
        sb_dev: at("super_block", "s_dev"),
        sb_magic: at("super_block", "s_magic"),
        file_inode: at("file", "f_inode"),
        file_private: at("file", "private_data"),
        task_nsproxy: at("task_struct", "nsproxy"),
        nsproxy_mnt_ns: at("nsproxy", "mnt_ns"),
        mnt_ns_inum: at("mnt_namespace", "ns.inum"),
        task_pid: at("task_struct", "pid"),
        task_files: at("task_struct", "files"),
        task_state: find(&[("task_struct", "__state"), ("task_struct", "state")]),
        task_iowait: iowait,
        task_iowait_mask: iowait_mask,
        files_fdt: at("files_struct", "fdt"),
        files_fdtab: at("files_struct", "fdtab"),
        files_fd_array: at("files_struct", "fd_array"),
        fdtable_fd: at("fdtable", "fd"),
        bprm_file: at("linux_binprm", "file"),
        bprm_filename: at("linux_binprm", "filename"),
        kiocb_file: at("kiocb", "ki_filp"),
        kiocb_pos: at("kiocb", "ki_pos"),
        iter_count: at("iov_iter", "count"),
        fault_vma: at("vm_fault", "vma"),
        fault_pgoff: at("vm_fault", "pgoff"),
        vma_file: at("vm_area_struct", "vm_file"),
        dentry_inode: at("dentry", "d_inode"),
        dentry_name: find(&[("dentry", "d_name.name"), ("dentry", "__d_name.name")]),
        dentry_parent: at("dentry", "d_parent"),
        dentry_sb: at("dentry", "d_sb"),
        task_fs: at("task_struct", "fs"),
        fs_root: at("fs_struct", "root.dentry"),
        fs_pwd: at("fs_struct", "pwd.dentry"),
        file_dentry: find(&[("file", "f_path.dentry"), ("file", "__f_path.dentry")]),
        rename_old: at("renamedata", "old_dentry"),
        rename_new: at("renamedata", "new_dentry"),
        rename_flags: at("renamedata", "flags"),
        link_args: btf.arguments("vfs_link").unwrap_or(ABSENT),
        change_args: btf.arguments("notify_change").unwrap_or(ABSENT),
        switch_state: state,
        overlay_file: overlay_file(btf) as u32,
    }
}

/// The overlay's types are in the kernel's own or in the module's, of which only the names are looked at.
fn overlay_file(btf: &Btf) -> OverlayFile {
    let module = std::fs::read("/sys/kernel/btf/overlay");
    let of_module = |name: &[u8]| module.as_ref().is_ok_and(|types| names(types, name));
    if btf.has_structure("ovl_file") || of_module(b"ovl_file") {
        OverlayFile::Structure
    } else if btf.has_structure("ovl_inode") || module.is_ok() {
        OverlayFile::Real
    } else {
        OverlayFile::Unknown
    }
}

/// Whether a name, between zero bytes, is in type information.
fn names(types: &[u8], name: &[u8]) -> bool {
    types.split(|byte| *byte == 0).any(|one| one == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_what_the_tracepoints_need() {
        let offsets = resolve(&Btf::running().expect("this kernel has type information"));
        let Offsets { folio_mapping, inode_sb, sb_dev, task_nsproxy, mnt_ns_inum, .. } = offsets;
        for one in [folio_mapping, inode_sb, sb_dev, task_nsproxy, mnt_ns_inum, offsets.task_iowait] {
            assert_ne!(one, ABSENT, "{offsets:?}");
        }
        assert_ne!(offsets.fs_pwd, offsets.fs_root);
    }
}
