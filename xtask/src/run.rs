//! Other programs: run, checked, with what they said when they fail.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The project's top directory.
pub(crate) fn top() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// Where builds and caches go.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| top().join("target"), PathBuf::from)
}

/// cargo, as a person starts it at the project's top. What the cargo that runs this program says of it stays here: build scripts
/// that look at such variables would run anew whenever they come and go, and all that depends on them be built again.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(name);
        }
    }
    cargo.current_dir(top());
    cargo
}

/// Runs a command with its output shown.
pub(crate) fn show(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", name(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", name(command));
    }
    Ok(())
}

/// Runs a command and gives its standard output; what it said is shown only when it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}\n{}{}",
            name(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a shell script; its variables come as `$1`, `$2`, …
pub(crate) fn script(text: &str, arguments: &[&Path]) -> Result<String> {
    output(Command::new("sh").arg("-euc").arg(text).arg("sh").args(arguments))
}

fn name(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.take(4).map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
