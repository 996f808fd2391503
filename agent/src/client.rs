//! The command line's side of the daemon's socket; starts a daemon when none runs.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use futures::StreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::Event;
use crate::cli::Global;
use crate::config::Config;
use crate::{daemon, keeper};

/// How often a daemon that went is followed by the next, for one question.
const ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(100);
/// Questions that may be asked again when the answer broke off: asked twice, they do what they do once.
const REPEATABLE: [&str; 4] = ["acquire", "pull", "release", "status"];

/// A way to the node's daemon, or to one inside this process with `--standalone`.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    config: Arc<Config>,
    /// How to start a daemon, should the one that was there end before it was asked.
    starter: Option<Global>,
    /// Ends with the client.
    standalone: Option<daemon::Running>,
}

impl Client {
    /// Connects; starts a daemon, or becomes one with `--standalone`.
    pub(crate) async fn connect(config: &Arc<Config>, global: &Global) -> Result<Self> {
        let standalone = if global.standalone {
            Some(daemon::start(Arc::clone(config)).await?)
        } else {
            if !alive(&config.socket()).await {
                keeper::start(config, global)?;
            }
            None
        };
        let starter = standalone.is_none().then(|| global.clone());
        Ok(Self { http: http_client(config)?, config: Arc::clone(config), starter, standalone })
    }

    /// Connects to a daemon that runs, or that is being started; or says that none is.
    pub(crate) async fn connect_running(config: &Arc<Config>) -> Result<Option<Self>> {
        if !comes(config).await {
            return Ok(None);
        }
        let http = http_client(config)?;
        Ok(Some(Self { http, config: Arc::clone(config), starter: None, standalone: None }))
    }

    /// One question, one answer.
    pub(crate) async fn ask<A: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<A> {
        self.follow(path, body, |_| {}).await
    }

    /// A long operation: `on_event` sees notes and progress, the result is returned. A daemon that goes before it answers is nothing
    /// to the caller: the next one is asked. One that goes while it works on what can be done again is asked again, too.
    pub(crate) async fn follow<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut on_event: impl FnMut(&Event),
    ) -> Result<A> {
        let mut attempts = 0;
        loop {
            let error = match self.follow_once(path, body, &mut on_event).await {
                Ok(answer) => return Ok(answer),
                Err(Broken::Unanswered(error)) if attempts < ATTEMPTS => error,
                Err(Broken::Midway(error)) if attempts < ATTEMPTS && REPEATABLE.contains(&path) => error,
                Err(Broken::Unanswered(error) | Broken::Midway(error) | Broken::Told(error)) => {
                    return Err(error);
                }
            };
            attempts += 1;
            // A process that ends still takes connections for a moment; a manager that holds the socket starts the next one.
            tokio::time::sleep(PAUSE).await;
            if comes(&self.config).await {
                continue;
            }
            let Some(global) = &self.starter else { return Err(error) };
            keeper::start(&self.config, global)?;
        }
    }

    async fn follow_once<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        on_event: &mut impl FnMut(&Event),
    ) -> Result<A, Broken> {
        let response = self.http.post(format!("http://sluice/v1/{path}")).json(body).send().await;
        let response = response
            .context("the daemon does not answer; see its log in the state directory")
            .map_err(Broken::Unanswered)?;
        let mut lines = LineBuffer::default();
        let mut body = response.bytes_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.context("the daemon ended while it worked; see its log in the state directory");
            lines.push(&piece.map_err(Broken::Midway)?);
            while let Some(line) = lines.next_line() {
                let event = serde_json::from_slice(&line).context("the daemon's answer is not understood");
                match event.map_err(Broken::Told)? {
                    Event::Done { result } => {
                        return serde_json::from_value(result)
                            .context("the daemon is of another version")
                            .map_err(Broken::Told);
                    }
                    Event::Failed { message } => return Err(Broken::Told(anyhow!(message))),
                    event => on_event(&event),
                }
            }
        }
        let early = "the daemon ended its answer early; see its log in the state directory";
        Err(Broken::Midway(anyhow!(early)))
    }

    /// Ends an in-process daemon in good order.
    pub(crate) async fn close(self) -> Result<()> {
        match self.standalone {
            Some(running) => running.stop(true).await,
            None => Ok(()),
        }
    }
}

/// Whether a daemon is there; one that is being started is waited for.
async fn comes(config: &Config) -> bool {
    let deadline = Instant::now() + keeper::LONGEST_START;
    loop {
        // In this order: whoever starts one lets go when it is there.
        let coming = keeper::is_at_work(config);
        if alive(&config.socket()).await {
            return true;
        }
        if !coming || Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn alive(socket: &Path) -> bool {
    tokio::net::UnixStream::connect(socket).await.is_ok()
}

/// How a question came to nothing.
enum Broken {
    /// Nobody answered.
    Unanswered(anyhow::Error),
    /// The answer broke off.
    Midway(anyhow::Error),
    /// The answer is that it failed.
    Told(anyhow::Error),
}

/// Splits a byte stream at line ends.
#[derive(Debug, Default)]
struct LineBuffer {
    bytes: Vec<u8>,
}

impl LineBuffer {
    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.bytes.iter().position(|byte| *byte == b'\n')?;
        let rest = self.bytes.split_off(end + 1);
        Some(std::mem::replace(&mut self.bytes, rest))
    }
}

fn http_client(config: &Config) -> Result<reqwest::Client> {
    reqwest::Client::builder()
        .unix_socket(config.socket())
        .no_proxy()
        .tls_certs_only([])
        .build()
        .context("cannot make a client")
}

#[cfg(test)]
mod tests {
    use super::LineBuffer;

    #[test]
    fn lines_come_whole_whatever_the_pieces() {
        let mut buffer = LineBuffer::default();
        buffer.push(b"{\"a\":1}\n{\"b");
        assert_eq!(buffer.next_line().as_deref(), Some(&b"{\"a\":1}\n"[..]));
        assert_eq!(buffer.next_line(), None);
        buffer.push(b"\":2}\n");
        assert_eq!(buffer.next_line().as_deref(), Some(&b"{\"b\":2}\n"[..]));
    }
}
