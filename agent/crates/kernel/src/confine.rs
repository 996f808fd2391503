//! Gives up for good what a process does not need: capabilities, and system calls that only an intruder would make.
//!
//! Both hold for all that the process starts from then on. To be called before there are threads: capabilities are a thread's own
//! (capabilities(7)).

use nix::errno::Errno;

/// Capabilities of mounting, of writing image files with their owners, modes, devices and attributes, of OCI runtimes, and
/// of probes. Numbers as in capability.h, which only ever grows.
pub const NODE: [u8; 21] = [
    0,  // CAP_CHOWN
    1,  // CAP_DAC_OVERRIDE
    2,  // CAP_DAC_READ_SEARCH
    3,  // CAP_FOWNER
    4,  // CAP_FSETID
    5,  // CAP_KILL
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    8,  // CAP_SETPCAP
    10, // CAP_NET_BIND_SERVICE
    13, // CAP_NET_RAW
    18, // CAP_SYS_CHROOT
    19, // CAP_SYS_PTRACE
    21, // CAP_SYS_ADMIN
    23, // CAP_SYS_NICE
    24, // CAP_SYS_RESOURCE
    27, // CAP_MKNOD
    29, // CAP_AUDIT_WRITE
    31, // CAP_SETFCAP
    38, // CAP_PERFMON
    39, // CAP_BPF
];
/// Capabilities of a process that mounts FUSE and serves files.
pub const SERVER: [u8; 4] = [
    1,  // CAP_DAC_OVERRIDE
    21, // CAP_SYS_ADMIN
    23, // CAP_SYS_NICE
    24, // CAP_SYS_RESOURCE
];
/// One more than the highest number that a 64-bit set holds.
const CAPABILITIES: u8 = 64;
/// `_LINUX_CAPABILITY_VERSION_3`: sets of 64 bits in two halves.
const VERSION_3: u32 = 0x2008_0522;

/// System calls that are answered with EPERM: new kernels and modules, the clock, swapping, ports, other processes' memory.
const DENIED: [libc::c_long; 18] = [
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_open_by_handle_at,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_userfaultfd,
];
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;
/// From here on numbers are those of x32 (x86-64 only).
const X32: u32 = 0x4000_0000;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps these capabilities, as far as they are there, and no other.
pub fn keep_capabilities(kept: &[u8]) -> Result<(), Errno> {
    for number in (0..CAPABILITIES).filter(|number| !kept.contains(number)) {
        // SAFETY: the call takes numbers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        match Errno::result(dropped) {
            // No such capability on this kernel.
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    let mut halves = [Half { effective: 0, permitted: 0, inheritable: 0 }; 2];
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: the kernel writes two halves of this version behind the pointer, which has room for them.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw const header, halves.as_mut_ptr()) })?;
    for (half, low) in halves.iter_mut().zip([0, 32]) {
        let mask = kept
            .iter()
            .filter(|bit| (low..low + 32).contains(*bit))
            .fold(0, |mask, bit| mask | 1 << (bit - low));
        half.permitted &= mask;
        half.effective &= mask;
        half.inheritable &= mask;
    }
    // SAFETY: the kernel reads two halves of this version.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) }).map(drop)
}

/// Denies the system calls above, and all of other architectures, to this process and what it starts. No set-user-id program
/// that it starts gains anything any more.
pub fn deny_system_calls() -> Result<(), Errno> {
    nix::sys::prctl::set_no_new_privs()?;
    let program = program();
    let len = u16::try_from(program.len()).map_err(|_range| Errno::E2BIG)?;
    let filter = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions, which live until the call returns, and writes none.
    let set =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    Errno::result(set).map(drop)
}

/// The filter, in classic BPF (seccomp(2)).
fn program() -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let answer = |value| statement(libc::BPF_RET | libc::BPF_K, value);
    let jump = |test: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | test | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    };
    let refused = libc::SECCOMP_RET_ERRNO | Errno::EPERM as u32;
    let mut program = vec![load(ARCH), jump(libc::BPF_JEQ, AUDIT_ARCH, 1, 0), answer(refused), load(NUMBER)];
    if cfg!(target_arch = "x86_64") {
        program.extend([jump(libc::BPF_JGE, X32, 0, 1), answer(refused)]);
    }
    for number in DENIED {
        program.extend([jump(libc::BPF_JEQ, number as u32, 0, 1), answer(refused)]);
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}
