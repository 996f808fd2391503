//! Spans arrive at a collector that is not ours: a receiver made of what OpenTelemetry and gRPC publish.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::commands::record;
use crate::rig::Node;

/// Python with foreign readers in it.
pub(crate) fn python() -> Command {
    let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../foreign-readers/bin/python");
    assert!(python.exists(), "{} is missing: `cargo xtask test` makes it", python.display());
    Command::new(python)
}

struct Receiver {
    process: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    grpc: String,
    http: String,
}

impl Receiver {
    fn start() -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/trace/receiver.py");
        let mut process = python().arg(script).stdout(Stdio::piped()).spawn().expect("python starts");
        let mut lines = BufReader::new(process.stdout.take().expect("is piped")).lines();
        let ports = lines.next().expect("a line").expect("text");
        let (grpc, http) = ports.split_once(' ').expect("two ports");
        let address = |port: &str| format!("http://127.0.0.1:{port}");
        Self { grpc: address(grpc), http: address(http), process, lines }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn spans_arrive_over_grpc_and_over_http() {
    let node = Node::indexed("[stream]\nfill = false\n");
    record(&node);
    let mut receiver = Receiver::start();
    for (protocol, endpoint) in [("grpc", receiver.grpc.clone()), ("http", receiver.http.clone())] {
        let arguments =
            ["trace", "export", "--format", "otlp", "--endpoint", &endpoint, "--protocol", protocol];
        node.ok(&arguments);
        let said = receiver.lines.next().expect("a line").expect("text");
        let spans = "container start, first byte, index, mount, profile, pull, ready, resolve";
        assert!(said.starts_with(&format!("{protocol}: {spans}; sha256:")), "{said}");
    }
    assert!(node.complaint(&["trace", "export", "--format", "otlp"]).contains("--endpoint"));
    let dead = ["trace", "export", "--format", "otlp", "--endpoint", "http://127.0.0.1:1"];
    assert!(node.complaint(&dead).contains("cannot send to http://127.0.0.1:1"));
}
