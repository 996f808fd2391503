//! The operators' book: every page is in the summary, and every link leads to a file.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs")
}

/// Targets of a page's links, without those to elsewhere.
fn links(text: &str) -> Vec<String> {
    let ends = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    let targets = ends.map(|(target, _)| target.split('#').next().unwrap_or_default().to_owned());
    targets.filter(|target| !target.is_empty() && !target.contains("://")).collect()
}

#[test]
fn every_page_is_in_the_summary_and_every_link_leads_somewhere() {
    let docs = docs();
    let summary = links(&std::fs::read_to_string(docs.join("SUMMARY.md")).unwrap());
    let top = docs.parent().unwrap();
    let mut pages: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "deploy/kubernetes/README.md"].map(|page| top.join(page)).into();
    for entry in docs.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".md") && name != "SUMMARY.md" {
            assert!(summary.contains(&name), "docs/SUMMARY.md does not name {name}");
            pages.push(path);
        }
    }
    pages.push(docs.join("SUMMARY.md"));
    for page in pages {
        for target in links(&std::fs::read_to_string(&page).unwrap()) {
            assert!(page.parent().unwrap().join(&target).exists(), "{} links to {target}", page.display());
        }
    }
    assert!(summary.len() >= 5, "{summary:?}");
}
