//! A report as JUnit's XML, which pipelines show: one test case per kind of thing that can become worse.

use crate::{Kind, Report};

/// The document.
pub fn junit(report: &Report, name: &str) -> String {
    let found = report.findings.len();
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites tests=\"{0}\" failures=\"{found}\">\n<testsuite name=\"{1}\" tests=\"{0}\" failures=\"{found}\">\n",
        Kind::ALL.len(),
        escaped(name)
    );
    for kind in Kind::ALL {
        let text = match report.findings.iter().find(|finding| finding.kind == kind) {
            None => format!("<testcase classname=\"sluice.regress\" name=\"{}\"/>\n", kind.name()),
            Some(finding) => format!(
                "<testcase classname=\"sluice.regress\" name=\"{}\"><failure message=\"{}\">{}</failure></testcase>\n",
                kind.name(),
                escaped(&finding.what),
                escaped(&finding.advice)
            ),
        };
        out.push_str(&text);
    }
    if !report.notes.is_empty() {
        out.push_str(&format!("<system-out>{}</system-out>\n", escaped(&report.notes.join("\n"))));
    }
    out.push_str("</testsuite>\n</testsuites>\n");
    out
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for one in text.chars() {
        match one {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML 1.0 has no other control characters.
            one if one.is_control() && one != '\n' && one != '\t' => out.push('\u{FFFD}'),
            one => out.push(one),
        }
    }
    out
}
