//! `sluice status`: what is on the node, once or watched, for people or as JSON.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::api::{ImageRequest, Status};
use crate::client::Client;
use crate::config::Config;

const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Prints the status of the node or of one image.
pub(crate) async fn status(
    config: &Arc<Config>,
    image: Option<String>,
    watch: bool,
    json: bool,
) -> Result<()> {
    let Some(client) = Client::connect_running(config).await? else {
        bail!("no daemon runs on {}; `sluice daemon` starts one", config.socket().display());
    };
    let request = ImageRequest { reference: image };
    loop {
        let status: Status = client.ask("status", &request).await?;
        if watch && !json {
            // Clear the screen and go home: the table is drawn anew each time.
            say!("\x1b[2J\x1b[H");
        }
        if json {
            say!("{}", serde_json::to_string(&status)?)
        } else {
            say!("{}", table(&status).trim_end())
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

fn table(status: &Status) -> String {
    let mut out = format!(
        "daemon {} pid {}, {} resident (peak {}), store {}{}\n",
        status.version,
        status.pid,
        size(status.resident_bytes),
        size(status.resident_peak_bytes),
        size(status.disk_bytes),
        if status.disk_full { ", DISK FULL: background fill pauses" } else { "" },
    );
    if let Some(blocks) = &status.blocks {
        out += &format!(
            "block files: {} ({}), server pid {}, {} resident\n",
            blocks.way,
            blocks.reason,
            blocks.pid,
            size(blocks.resident_bytes),
        );
    }
    let reads = status.reads;
    let all = (reads.from_disk + reads.from_registry).max(1);
    out += &format!(
        "reads through the agent: {} local ({}%), {} from the registry, {} waiting\n",
        reads.from_disk,
        reads.from_disk * 100 / all,
        reads.from_registry,
        reads.waiting,
    );
    out += &format!(
        "fetched: {} demand, {} prefetch, {} fill\n\n",
        size(reads.bytes_demand),
        size(reads.bytes_prefetch),
        size(reads.bytes_fill)
    );
    out += &format!("{:<48} {:<10} {:>5} {:>22}  LAYERS\n", "IMAGE", "STATE", "USERS", "LOCAL");
    for image in &status.images {
        let local = format!(
            "{} / {} {:>3}%",
            size(image.bytes_local),
            size(image.bytes_total),
            percent(image.bytes_local, image.bytes_total)
        );
        let complete = image.layers.iter().filter(|layer| layer.state == "complete").count();
        out += &format!(
            "{:<48} {:<10} {:>5} {:>22}  {}/{}\n",
            image.reference,
            image.state,
            image.users,
            local,
            complete,
            image.layers.len()
        );
    }
    out
}

fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100).checked_div(whole).unwrap_or(100)
}

/// Bytes for people: three significant digits, binary units.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 || value >= 100.0 { format!("{value:.0} {name}") } else { format!("{value:.1} {name}") }
}

#[cfg(test)]
mod tests {
    use super::{percent, size};

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (300 << 20, "300 MiB")] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(percent(0, 0), 100);
        assert_eq!(percent(1, 3), 33);
    }
}
