//! `sluice events`: what happened to images, for people or as JSON.

use std::io::Write;

use std::sync::Arc;

use anyhow::{Result, bail};

use crate::api::{Event, EventsRequest};
use crate::client::Client;
use crate::config::Config;
use crate::journal::NodeEvent;

/// Prints what the daemon kept and, with `follow`, what comes.
pub(crate) async fn events(config: &Arc<Config>, follow: bool, json: bool) -> Result<()> {
    let Some(client) = Client::connect_running(config).await? else {
        bail!("no daemon runs on {}; `sluice daemon` starts one", config.socket().display());
    };
    let mut failed = None;
    let show = |event: &Event| {
        let line = match event {
            Event::Happened { what } if json => serde_json::to_string(what).map_err(anyhow::Error::from),
            Event::Happened { what } => Ok(text(what)),
            Event::Note { text } => {
                eprintln!("sluice: {text}");
                return;
            }
            _ => return,
        };
        let written = line.and_then(|line| {
            let mut stdout = std::io::stdout();
            Ok(writeln!(stdout, "{line}").and_then(|()| stdout.flush())?)
        });
        failed = failed.take().or(written.err());
    };
    client.follow::<()>("events", &EventsRequest { follow }, show).await?;
    failed.map_or(Ok(()), Err)
}

fn text(event: &NodeEvent) -> String {
    let NodeEvent { time_ms, r#type, reason, message, .. } = event;
    let (seconds, milliseconds) = (time_ms / 1000 % 86_400, time_ms % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!(
        "{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z  {type:<8} {:<18} {message}",
        format!("{reason:?}")
    )
}
