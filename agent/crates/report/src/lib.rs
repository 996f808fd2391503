//! A page that shows a container's start: what waited for what, how long, from where; which parts of the layers were touched; how the
//! link was used; what fetching ahead was worth. Two starts are shown beside each other.
//!
//! [`Start::read`] reduces a trace to what a screen can show; [`page`] puts it into one HTML file that needs no network and
//! brings no code but its own (`page.html`, `page.css`, `page.js`). Whatever stands in a trace reaches the page as JSON and is shown as
//! text only.
#![warn(clippy::indexing_slicing)]

mod start;

pub use start::Start;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page for one or two starts.
pub fn page(starts: &[Start]) -> Result<String, serde_json::Error> {
    // Nothing in JSON can end the element that it stands in.
    let data = serde_json::to_string(starts)?.replace('<', "\\u003c");
    Ok(PAGE.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT).replace("/*DATA*/", &data))
}

#[cfg(test)]
mod tests {
    use sluice_trace::{Footer, Header, Origin, Process, Record, TraceReader, TraceWriter, What};

    use super::*;

    #[test]
    fn what_stands_in_a_trace_cannot_become_code() {
        let header =
            Header { reference: "</script><script>alert(1)</script>".to_owned(), ..Header::default() };
        let mut writer = TraceWriter::new(Vec::new(), &header).expect("written");
        let path = b"<img src=x onerror=alert(1)>".to_vec();
        let served = What::Served { layer: 0, offset: 0, len: 4096, service_ns: 5, from: Origin::Registry };
        for what in [What::File { inode: 0, layer: 0, offset: 0, size: 1, path }, served, What::Ready] {
            writer.push(&Record { time_ns: 1, process: Process::default(), what }).expect("written");
        }
        let trace = writer.finish(Footer::default()).expect("written");
        let start = Start::read(TraceReader::new(trace.as_slice()).expect("read")).expect("read");
        let page = page(&[start]).expect("a page");
        assert!(!page.contains("<script>alert") && !page.contains("<img"), "{page}");
        assert!(page.contains("\\u003cimg src=x"));
        assert!(
            !page.contains("http://")
                || page.matches("http://").count() == page.matches("http://www.w3.org/").count()
        );
    }
}
