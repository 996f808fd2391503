//! The eBPF programs: what streamed file systems are asked for, seen by the kernel.
//!
//! They write the records of `sluice-events` and know neither paths nor images: those are resolved by the agent. All
//! are in one object; the agent loads those that the running kernel has hooks for, after it wrote the kernel's offsets over
//! [`maps::OFFSETS`]. Whatever concerns no watched file system costs a few reads and one look-up.
#![no_std]
#![no_main]

mod blocked;
mod failed;
mod files;
mod kernel;
mod maps;
mod pages;
mod record;
mod seen;

/// Reading kernel memory is reserved to programs under a licence that the kernel knows as compatible.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: no program can panic: indices are checked, and overflow checks are off. The verifier would refuse it.
    unsafe { core::hint::unreachable_unchecked() }
}
