//! What guests run on: QEMU with KVM where that boots a kernel, and without elsewhere; a version of it that emulates rightly, and
//! the processor that it shows.
//!
//! QEMU 7.2 (Debian 12's own) leaves the flags register spoilt where an interrupt follows `cmpxchg16b`: Linux 6.12 dies of a double fault
//! within seconds to minutes, whatever the model of the processor. QEMU 10.0, of that Debian's backports, ran the same load for a
//! quarter of an hour. Where it cannot be had, guests get a processor without that instruction.

use std::process::Command;

use anyhow::{Context, Result};

use crate::packages;
use crate::run::output;

const QEMU: (&str, &str) = ("qemu-system-x86", "boots the kernels that users run");
/// The oldest major version that is known to emulate rightly.
const RIGHT: u32 = 10;

/// Arguments of QEMU, and what else follows from how guests are run.
#[derive(Debug, Clone)]
pub(super) struct Emulator {
    /// `kvm` or `tcg`.
    pub(super) accelerator: &'static str,
    /// The processor without hardware help.
    cpu: &'static str,
}

impl Emulator {
    /// Installs QEMU if it is missing, and a right one if that can be had.
    pub(super) fn install() -> Result<Self> {
        if installed().is_none_or(|version| version < RIGHT) {
            // It is for guests without hardware help only; but those are what every machine has.
            if let Err(error) = packages::install_at_least(&QEMU, RIGHT) {
                println!("no QEMU {RIGHT} or newer to be had: {error:#}");
                packages::install(&[QEMU])?;
            }
        }
        let version = installed().context("QEMU does not say its version")?;
        let cpu = if version < RIGHT { "max,-cx16" } else { "max" };
        Ok(Self { accelerator: "tcg", cpu })
    }

    #[cfg(test)]
    pub(super) fn tcg() -> Self {
        Self { accelerator: "tcg", cpu: "max" }
    }

    pub(super) fn with_kvm(&self) -> Self {
        Self { accelerator: "kvm", ..self.clone() }
    }

    pub(super) fn cpu(&self) -> &'static str {
        if self.accelerator == "kvm" { "host" } else { self.cpu }
    }

    /// For the kernel's command line. Without KVM a busy host makes Linux take the TSC for many times slower than it is, and time
    /// run ahead. The ACPI timer's rate is known, not measured.
    pub(super) fn clock(&self) -> &'static str {
        if self.accelerator == "kvm" { "" } else { "tsc=unstable clocksource=acpi_pm" }
    }

    /// Whether these words of a dying kernel tell that its processor was emulated wrongly, and nothing of the kernel.
    pub(super) fn is_to_blame(&self, console_line: &str) -> bool {
        self.accelerator == "tcg" && has_impossible_flags(console_line)
    }
}

fn installed() -> Option<u32> {
    let said = output(Command::new("qemu-system-x86_64").arg("--version")).ok()?;
    major(said.strip_prefix("QEMU emulator version ")?)
}

/// The first number of a version.
fn major(version: &str) -> Option<u32> {
    version.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// Whether a line of a register dump has flags that no processor can have: bit 1 is always set; bits 3, 5, 15 and all above 21 never
/// are (Intel's manual, volume 1, section 3.4.3).
fn has_impossible_flags(line: &str) -> bool {
    const ALWAYS: u64 = 1 << 1;
    const NEVER: u64 = 1 << 3 | 1 << 5 | 1 << 15 | !0 << 22;
    let Some((_, rest)) = line.split_once("EFLAGS: ") else { return false };
    let word = rest.split(|letter: char| !letter.is_ascii_hexdigit()).next().unwrap_or_default();
    u64::from_str_radix(word, 16).is_ok_and(|flags| flags & ALWAYS == 0 || flags & NEVER != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spoilt_flags_are_known_from_those_of_a_kernels_own_fault() {
        let line = |flags: &str| format!("[    1.220299] RSP: 0018:ffa0000000013a20 EFLAGS: {flags}");
        for spoilt in ["3e9f6b4a", "04208022", "053e6006", "00010240"] {
            assert!(has_impossible_flags(&line(spoilt)), "{spoilt}");
        }
        for right in ["00010246", "00000202", "00250293"] {
            assert!(!has_impossible_flags(&line(right)), "{right}");
        }
        assert!(!has_impossible_flags("[    1.2] RIP: 0010:__kmalloc_noprof+0x130/0x400"));
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(major("10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)"), Some(10));
        assert_eq!(major("7.2.22 (Debian)"), Some(7));
        assert_eq!(major("unknown"), None);
    }
}
