//! When a container counts as started: a port that answers, a line of its output, a command that succeeds in it.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use regex::bytes::Regex;
use sluice_container::Bundle;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Child;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::cli::ReadyArgs;

/// How often a port is tried: nothing tells when it opens.
const PORT_INTERVAL: Duration = Duration::from_millis(20);
/// How often a command is tried.
const EXEC_INTERVAL: Duration = Duration::from_millis(100);

/// The container's output on its way through this process, if it is looked at.
#[derive(Debug, Default)]
pub(super) struct Output {
    copies: Vec<JoinHandle<std::io::Result<()>>>,
    seen: Arc<Notify>,
}

impl Output {
    /// Copies the output of `child`, whose ends must be piped, and looks for `pattern` in its lines.
    pub(super) fn watch(child: &mut Child, pattern: &str) -> Result<Self> {
        let pattern = Arc::new(Regex::new(pattern).context("--ready-log is no regular expression")?);
        let seen = Arc::new(Notify::new());
        let mut copies = Vec::new();
        if let Some(from) = child.stdout.take() {
            let (pattern, seen) = (Arc::clone(&pattern), Arc::clone(&seen));
            copies.push(tokio::spawn(async move { copy(from, std::io::stdout(), &pattern, &seen).await }));
        }
        if let Some(from) = child.stderr.take() {
            let (pattern, seen) = (Arc::clone(&pattern), Arc::clone(&seen));
            copies.push(tokio::spawn(async move { copy(from, std::io::stderr(), &pattern, &seen).await }));
        }
        Ok(Self { copies, seen })
    }

    /// Waits until all of it is written.
    pub(super) async fn end(self) -> Result<()> {
        for copy in self.copies {
            copy.await?.context("cannot pass the container's output on")?;
        }
        Ok(())
    }

    /// Ready when a line matched.
    pub(super) fn seen(&self) -> Arc<Notify> {
        Arc::clone(&self.seen)
    }
}

async fn copy(
    from: impl AsyncRead + Unpin,
    mut to: impl Write,
    pattern: &Regex,
    seen: &Notify,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).await? > 0 {
        if pattern.is_match(&line) {
            seen.notify_one();
        }
        // Whoever reads it may be slow.
        tokio::task::block_in_place(|| to.write_all(&line).and_then(|()| to.flush()))?;
        line.clear();
    }
    Ok(())
}

/// Waits until the container is ready in one of the ways that were asked for; for ever if none was.
pub(super) async fn signalled(args: &ReadyArgs, bundle: &Bundle, seen: Arc<Notify>) {
    tokio::select! {
        () = seen.notified() => {}
        () = port(args.ready_port) => {}
        () = exec(args.ready_exec.as_deref(), bundle) => {}
    }
}

async fn port(port: Option<u16>) {
    let Some(port) = port else { return std::future::pending().await };
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        tokio::time::sleep(PORT_INTERVAL).await;
    }
}

async fn exec(command: Option<&str>, bundle: &Bundle) {
    let Some(command) = command else { return std::future::pending().await };
    let words: Vec<&str> = command.split_whitespace().collect();
    loop {
        let mut tried = tokio::process::Command::from(bundle.exec(&words));
        tried.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        if tried.status().await.is_ok_and(|status| status.success()) {
            return;
        }
        tokio::time::sleep(EXEC_INTERVAL).await;
    }
}
