//! `sluice trace list`, `show`, `export` on starts that were really recorded.

use std::fs;

use serde_json::Value;

use crate::rig::{Node, wait_until};

/// Records a start that reads some of `/data/large`; the trace's name.
pub(crate) fn record(node: &Node) -> String {
    let script = "dd if=/data/large bs=64k count=8 2>/dev/null | sha256sum; cat /data/changed";
    let output = node.run(&["trace", "record", &node.image(), "sh", "-c", script]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let path = said.trim().rsplit("trace: ").next().unwrap();
    std::path::Path::new(path).file_stem().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_start_tells_its_whole_way() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let name = record(&node);
    let list = node.ok(&["trace", "list"]);
    assert!(list.contains(&name) && list.contains("`sh -c dd if=/data/large"), "{list}");
    let shown: Value = serde_json::from_str(&node.ok(&["trace", "show", "--json"])).unwrap();
    assert_eq!(shown["name"], name.as_str());
    let phases = shown["phases_ns"].as_object().unwrap();
    for phase in ["pull", "resolve", "index", "mount", "profile"] {
        assert!(phases[phase].as_u64().unwrap() > 0, "{phase}: {shown}");
    }
    let number = |name: &str| shown[name].as_u64().unwrap_or_else(|| panic!("{name}: {shown}"));
    assert!(number("ready_ns") > number("first_byte_ns") && number("first_byte_ns") > 0);
    assert!(number("ready_ns") >= phases["pull"].as_u64().unwrap());
    assert!(number("blocked_ns") > 0 && number("round_trips") > 0 && number("touched_bytes") > 0);
    assert!(shown["reads"]["registry"]["count"].as_u64().unwrap() > 0);
    assert!(shown["fetches"]["demand"]["bytes"].as_u64().unwrap() > 500_000);
    let text = node.ok(&["trace", "show", &name]);
    assert!(text.contains("for /data/large") && text.contains("first byte"), "{text}");

    // The next node has a profile and a start pack: its trace tells what they brought.
    node.ok(&["profile", "push", "--pack", &node.image()]);
    node.become_another();
    record(&node);
    let shown: Value = serde_json::from_str(&node.ok(&["trace", "show", "--json"])).unwrap();
    assert!(shown["fetches"]["start pack"]["count"].as_u64().unwrap() > 0, "{shown}");
    assert!(shown["ahead_bytes"].as_u64().unwrap() > 0, "{shown}");
}

#[test]
fn traces_are_exported_and_others_are_refused() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let name = record(&node);
    let rows = node.ok(&["trace", "export", "--format", "jsonl"]);
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_read = |row: &&Value| row["path"] == "/data/large" && row["record"] == "read";
    let read = rows.iter().find(is_read).expect("a read of the file");
    assert!(read["layer_digest"].as_str().unwrap().starts_with("sha256:"));
    for (format, begins) in
        [("perfetto", &b"\n"[..]), ("chrome", b"{"), ("parquet", b"PAR1"), ("csv", b"start,image")]
    {
        let path = node.path(format);
        node.ok(&["trace", "export", &name, "--format", format, "-o", path.to_str().unwrap()]);
        assert!(fs::read(&path).unwrap().starts_with(begins), "{format}");
    }
    assert!(node.complaint(&["trace", "show", "nothing"]).contains("there is no trace `nothing`"));
    let foreign = node.path("config.toml");
    assert!(node.complaint(&["trace", "show", foreign.to_str().unwrap()]).contains("this is no trace"));
    wait_until("nothing is left to do", || node.status()["reads"]["waiting"] == 0);
}
