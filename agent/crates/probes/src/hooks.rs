//! Which hooks give which capability, best first.

use sluice_events::{ABSENT, Offsets, SwitchState};
use sluice_trace::{Capability, Level};

/// Where a program is attached.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hook {
    /// A tracepoint with the kernel's own arguments: program, tracepoint.
    Raw(&'static str, &'static str),
    /// The same for a program that is loaded by the kernel's own types: program, tracepoint.
    Typed(&'static str, &'static str),
    /// Tracepoints of system calls, those that the architecture has: program, names.
    Syscalls(&'static str, &'static [&'static str]),
    /// The entry of a function: program, names that it has had; the first that exists.
    Entry(&'static str, &'static [&'static str]),
    /// The exit of a function: program, name.
    Exit(&'static str, &'static str),
    /// A probe at a function: program, names that it has had; the first that can be had.
    Kprobe(&'static str, &'static [&'static str]),
    /// A probe at the return of all of some functions: program, names.
    Kretprobe(&'static str, &'static [&'static str]),
}

impl Hook {
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Raw(program, _)
            | Self::Typed(program, _)
            | Self::Exit(program, _)
            | Self::Syscalls(program, _)
            | Self::Entry(program, _)
            | Self::Kprobe(program, _)
            | Self::Kretprobe(program, _) => program,
        }
    }
}

/// One way to a capability: all its hooks, or nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) capability: Capability,
    pub(crate) level: Level,
    pub(crate) hooks: &'static [Hook],
    /// Offsets without which its programs see nothing.
    pub(crate) needs: fn(&Offsets) -> Vec<u32>,
}

impl Way {
    /// Whether its programs are loaded by the kernel's own types.
    pub(crate) fn needs_types(&self) -> bool {
        let typed = |hook: &Hook| matches!(hook, Hook::Typed(..) | Hook::Entry(..) | Hook::Exit(..));
        self.hooks.iter().any(typed)
    }

    pub(crate) fn is_possible(&self, offsets: &Offsets) -> bool {
        let common = [
            offsets.inode_sb,
            offsets.inode_ino,
            offsets.inode_size,
            offsets.inode_mapping,
            offsets.inode_data,
            offsets.sb_dev,
            offsets.sb_magic,
            offsets.task_nsproxy,
            offsets.nsproxy_mnt_ns,
            offsets.mnt_ns_inum,
        ];
        common.into_iter().chain((self.needs)(offsets)).all(|one| one != ABSENT)
    }
}

/// `generic_file_buffered_read` was renamed in 5.12.
const READ: &[&str] = &["filemap_read", "generic_file_buffered_read"];

const OPENS: &[&str] = &["sys_exit_open", "sys_exit_openat", "sys_exit_openat2"];

/// Best first, per capability.
///
/// *Read* prefers the tracepoint (6.12): it also sees `splice` and `sendfile`, and costs less than a probe. *Fault*
/// prefers functions: they know the page of the fault, where the tracepoint tells the 16 pages around it.
pub(crate) const WAYS: &[Way] = &[
    Way {
        capability: Capability::Fill,
        level: Level::Tracepoint,
        hooks: &[Hook::Raw("raw_fill", "mm_filemap_add_to_page_cache")],
        needs: |o| vec![o.folio_mapping, o.folio_index, o.mapping_host],
    },
    Way {
        capability: Capability::Read,
        level: Level::Tracepoint,
        hooks: &[Hook::Typed("typed_get_pages", "mm_filemap_get_pages")],
        needs: |o| vec![o.mapping_host],
    },
    Way {
        capability: Capability::Read,
        level: Level::Tracepoint,
        hooks: &[Hook::Raw("raw_get_pages", "mm_filemap_get_pages")],
        needs: |o| vec![o.mapping_host],
    },
    Way {
        capability: Capability::Read,
        level: Level::Fexit,
        hooks: &[Hook::Entry("fentry_read", READ)],
        needs: |o| vec![o.kiocb_file, o.kiocb_pos, o.iter_count, o.file_inode],
    },
    Way {
        capability: Capability::Read,
        level: Level::Kprobe,
        hooks: &[Hook::Kprobe("kprobe_read", READ)],
        needs: |o| vec![o.kiocb_file, o.kiocb_pos, o.iter_count, o.file_inode],
    },
    Way {
        capability: Capability::Fault,
        level: Level::Fexit,
        hooks: &[
            Hook::Entry("fentry_fault", &["filemap_fault"]),
            Hook::Entry("fentry_map_pages", &["filemap_map_pages"]),
        ],
        needs: |o| vec![o.fault_vma, o.fault_pgoff, o.vma_file, o.file_inode],
    },
    Way {
        capability: Capability::Fault,
        level: Level::Kprobe,
        hooks: &[
            Hook::Kprobe("kprobe_fault", &["filemap_fault"]),
            Hook::Kprobe("kprobe_map_pages", &["filemap_map_pages"]),
        ],
        needs: |o| vec![o.fault_vma, o.fault_pgoff, o.vma_file, o.file_inode],
    },
    Way {
        capability: Capability::Fault,
        level: Level::Tracepoint,
        hooks: &[
            Hook::Typed("typed_fault", "mm_filemap_fault"),
            Hook::Typed("typed_map_pages", "mm_filemap_map_pages"),
        ],
        needs: |o| vec![o.mapping_host],
    },
    Way {
        capability: Capability::Fault,
        level: Level::Tracepoint,
        hooks: &[
            Hook::Raw("raw_fault", "mm_filemap_fault"),
            Hook::Raw("raw_map_pages", "mm_filemap_map_pages"),
        ],
        needs: |o| vec![o.mapping_host],
    },
    Way {
        capability: Capability::Open,
        level: Level::Fexit,
        hooks: &[Hook::Entry("fentry_open", &["security_file_open"])],
        needs: |o| vec![o.file_inode],
    },
    Way {
        capability: Capability::Open,
        level: Level::Kprobe,
        hooks: &[Hook::Kprobe("kprobe_open", &["security_file_open"])],
        needs: |o| vec![o.file_inode],
    },
    Way {
        capability: Capability::Open,
        level: Level::Tracepoint,
        hooks: &[Hook::Syscalls("typed_exit_open", OPENS)],
        needs: |o| vec![o.file_inode, o.file_private, o.task_files, o.files_fdt, o.fdtable_fd],
    },
    Way {
        capability: Capability::Open,
        level: Level::Tracepoint,
        hooks: &[Hook::Syscalls("exit_open", OPENS)],
        needs: |o| vec![o.file_inode, o.file_private, o.task_files, o.files_fdt, o.fdtable_fd],
    },
    Way {
        capability: Capability::Exec,
        level: Level::Tracepoint,
        hooks: &[Hook::Raw("raw_exec", "sched_process_exec")],
        needs: |o| vec![o.file_inode, o.file_private, o.bprm_file, o.bprm_filename],
    },
    Way {
        capability: Capability::Blocked,
        level: Level::Tracepoint,
        hooks: &[Hook::Typed("typed_switch", "sched_switch")],
        needs: |o| {
            // It has no other way to learn the state.
            let state = if o.switch_state == SwitchState::Argument as u32 { 0 } else { ABSENT };
            vec![o.task_iowait, o.task_pid, state]
        },
    },
    Way {
        capability: Capability::Blocked,
        level: Level::Tracepoint,
        hooks: &[Hook::Raw("raw_switch", "sched_switch")],
        needs: |o| vec![o.task_iowait, o.task_pid, o.task_state, o.switch_state],
    },
    Way {
        capability: Capability::FailedCall,
        level: Level::Fexit,
        hooks: &[
            Hook::Exit("fexit_rename", "vfs_rename"),
            Hook::Exit("fexit_link", "vfs_link"),
            Hook::Exit("fexit_change", "notify_change"),
        ],
        needs: dentries,
    },
    Way {
        capability: Capability::FailedCall,
        level: Level::Kprobe,
        hooks: &[
            Hook::Kprobe("kprobe_rename", &["vfs_rename"]),
            Hook::Kprobe("kprobe_link", &["vfs_link"]),
            Hook::Kprobe("kprobe_change", &["notify_change"]),
            Hook::Kretprobe("kretprobe_call", &["vfs_rename", "vfs_link", "notify_change"]),
        ],
        needs: dentries,
    },
    Way {
        capability: Capability::FailedCall,
        level: Level::Tracepoint,
        hooks: &[
            Hook::Syscalls("enter_rename", &["sys_enter_rename"]),
            Hook::Syscalls("enter_renameat", &["sys_enter_renameat"]),
            Hook::Syscalls("enter_renameat2", &["sys_enter_renameat2"]),
            Hook::Syscalls("enter_link", &["sys_enter_link"]),
            Hook::Syscalls("enter_linkat", &["sys_enter_linkat"]),
            Hook::Syscalls("enter_lchown", &["sys_enter_lchown"]),
            Hook::Syscalls("enter_fchownat", &["sys_enter_fchownat"]),
            Hook::Syscalls("enter_utimensat", &["sys_enter_utimensat"]),
            Hook::Syscalls(
                "exit_call",
                &[
                    "sys_exit_rename",
                    "sys_exit_renameat",
                    "sys_exit_renameat2",
                    "sys_exit_link",
                    "sys_exit_linkat",
                    "sys_exit_lchown",
                    "sys_exit_fchownat",
                    "sys_exit_utimensat",
                ],
            ),
        ],
        needs: |o| {
            let own = [o.task_files, o.files_fdt, o.fdtable_fd, o.file_dentry, o.dentry_sb];
            own.into_iter().chain([o.task_fs, o.fs_root, o.fs_pwd, o.dentry_name, o.dentry_parent]).collect()
        },
    },
];

fn dentries(o: &Offsets) -> Vec<u32> {
    vec![o.dentry_inode, o.dentry_name, o.dentry_parent, o.inode_mode, o.link_args, o.change_args]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_has_a_way_by_tracepoints() {
        for capability in Capability::ALL {
            let mut ways = WAYS.iter().filter(|way| way.capability == capability);
            assert!(ways.any(|way| way.level == Level::Tracepoint), "{capability:?}");
        }
    }
}
