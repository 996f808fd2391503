//! `sluice doctor`: what this node can do, and why not.

use std::process::ExitCode;

use anyhow::Result;

use crate::config::Config;
use crate::doctor::{Check, Diagnosis};

/// The exit code is 1 if nothing can be streamed here.
pub(crate) async fn doctor(config: std::sync::Arc<Config>, json: bool) -> Result<ExitCode> {
    let found = tokio::task::spawn_blocking(move || Diagnosis::make(&config)).await?;
    if json {
        say!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        say!("Linux {}\n", found.kernel);
        for check in found.checks.iter().chain(&found.links) {
            line(check)?;
        }
        say!("\nprobes");
        for seen in &found.probes {
            let capability = serde_json::to_value(seen.capability)?;
            let refused = seen.refused.as_deref().map(|reason| format!(" (not by {reason})"));
            say!(
                "  {:<36} {}{}",
                capability.as_str().unwrap_or_default(),
                seen.level.as_deref().unwrap_or("not seen"),
                refused.unwrap_or_default()
            );
        }
        say!(
            "\nstreaming is {}",
            if found.streaming { "possible" } else { "impossible: images are pulled the ordinary way" }
        );
    }
    Ok(if found.streaming { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(check: &Check) -> Result<()> {
    let sign = match (check.ok, check.needed) {
        (true, _) => "ok",
        (false, true) => "MISSING",
        (false, false) => "no",
    };
    say!("{:<38} {sign:<8} {}", check.name, check.reason);
    Ok(())
}
