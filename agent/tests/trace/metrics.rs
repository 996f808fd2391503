//! Metrics as Prometheus' own tool reads them; the local address.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use crate::browser::{Browser, free_port};
use crate::commands::record;
use crate::rig::Node;

/// Status line and body.
fn get(port: u16, path: &str, host: &str) -> (String, String) {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the daemon listens");
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

fn value(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is missing:\n{text}")).parse().expect("a number")
}

#[test]
fn prometheus_reads_what_a_start_did() {
    let port = free_port();
    let node = Node::indexed(&format!("[stream]\nfill = false\n[local]\nlisten = \"127.0.0.1:{port}\"\n"));
    record(&node);
    let (status, text) = get(port, "/metrics", "localhost");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed");
    promtool.stdin.take().expect("is piped").write_all(text.as_bytes()).expect("written");
    let said = promtool.wait_with_output().expect("ended");
    assert!(
        said.status.success(),
        "{}{}",
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr)
    );
    for name in ["sluice_start_ready_seconds_count", "sluice_image_mount_seconds_count"] {
        assert!(value(&text, name) >= 1.0, "{text}");
    }
    assert!(value(&text, "sluice_fetched_bytes_total{lane=\"demand\"}") > 500_000.0, "{text}");
    assert!(value(&text, "sluice_fetch_requests_total{lane=\"demand\"}") >= 1.0, "{text}");
    assert!(value(&text, "sluice_image_pull_seconds_count{served=\"streamed\"}") >= 1.0, "{text}");
    assert!(!text.contains("sha256"), "a label names an image: {text}");
    // A page of another site that got this address by a name of its own.
    assert_eq!(get(port, "/v1/live", "evil.example:80").0, "HTTP/1.1 403 Forbidden");
}

#[test]
fn the_live_page_shows_the_node() {
    let port = free_port();
    let node = Node::indexed(&format!("[local]\nlisten = \"127.0.0.1:{port}\"\n"));
    record(&node);
    let mut browser = Browser::open(&format!("http://127.0.0.1:{port}/"), (1100, 700));
    browser.wait_for("document.querySelectorAll('#images tr').length === 1");
    let shown = browser.text("document.querySelector('#images tr').textContent");
    assert!(shown.starts_with(&node.image()), "{shown}");
    assert!(browser.text("document.getElementById('when').textContent").starts_with("daemon "));
    browser.screenshot("live");
    // It goes on by itself, and says so when the daemon is gone.
    node.ok(&["node", "drain"]);
    browser.wait_for("document.getElementById('when').textContent === 'the daemon does not answer'");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn only_loopback_is_listened_on() {
    let node = Node::new("[local]\nlisten = \"0.0.0.0:0\"\n");
    assert!(node.complaint(&["gc"]).contains("is not a loopback address"));
}
