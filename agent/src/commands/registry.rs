//! `sluice registry`: the embedded registry.

use anyhow::{Context, Result};
use sluice_registry_server::{Link, Server, ServerConfig};

use crate::cli::RegistryArgs;

/// Serves until interrupted.
pub(crate) async fn serve(args: RegistryArgs) -> Result<()> {
    let faults = match &args.faults {
        Some(text) => serde_json::from_str(text).context("--faults is not valid JSON")?,
        None => sluice_registry_server::Faults::default(),
    };
    let server = Server::start(ServerConfig {
        root: args.dir,
        listen: args.listen,
        link: Link { rate_bits_per_second: args.rate, round_trip: args.delay },
        faults,
        referrers_api: !args.no_referrers_api,
    })
    .await?;
    say!("listening on {}", server.address());
    super::interrupted()?.await;
    server.stop();
    Ok(())
}
