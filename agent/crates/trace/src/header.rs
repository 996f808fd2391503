//! What a trace says of itself: at its beginning what was to be recorded, at its end what came of it.

use serde::{Deserialize, Serialize};

use crate::Levels;

/// The beginning of a trace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Digest of the image's manifest.
    pub image: String,
    /// Class of the entry point and its arguments, [`entry_class`].
    pub entry: String,
    /// Release of the kernel, as `uname -r` gives it.
    pub kernel: String,
    /// Machine architecture, as `uname -m` gives it.
    pub machine: String,
    /// When the start began: seconds since 1970.
    pub began_at: u64,
    /// When the start began, on the clock of the records, in nanoseconds.
    pub began_ns: u64,
    /// What was seen, and by what.
    pub levels: Levels,
    /// The image as it was asked for; empty: not known.
    #[serde(default)]
    pub reference: String,
    /// Layers, in the order in which they are applied; records speak of them by number.
    #[serde(default)]
    pub layers: Vec<TracedLayer>,
    /// What the container is called on its node; empty: not known.
    #[serde(default)]
    pub container: String,
    /// Version of the agent.
    #[serde(default)]
    pub agent: String,
}

/// A layer of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedLayer {
    /// Digest of the blob.
    pub digest: String,
    /// Bytes of its local file: the contents of its files, whole blocks.
    pub bytes: u64,
}

/// The end of a trace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footer {
    /// Records in the file.
    pub records: u64,
    /// Records that were lost because a buffer was full.
    pub lost_records: u64,
    /// Page-cache fills that were lost because a table was full.
    pub lost_fills: u64,
    /// Failed calls beyond the limit per second.
    pub lost_failures: u64,
}

/// Longest class.
const MAX_CLASS: usize = 1024;

/// What tells one use of an image from another: the program and its arguments, whatever numbers stand in them (ports,
/// process counts, dates).
pub fn entry_class<S: AsRef<str>>(arguments: &[S]) -> String {
    let mut class = String::new();
    for argument in arguments {
        if !class.is_empty() {
            class.push(' ');
        }
        let mut in_number = false;
        for one in argument.as_ref().chars() {
            let digit = one.is_ascii_digit();
            if !digit || !in_number {
                class.push(if digit { '#' } else { one });
            }
            in_number = digit;
        }
        if class.len() > MAX_CLASS {
            let end = (0..=MAX_CLASS).rev().find(|end| class.is_char_boundary(*end)).unwrap_or(0);
            class.truncate(end);
            break;
        }
    }
    class
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_do_not_make_classes() {
        assert_eq!(
            entry_class(&["python3", "app.py", "--port=8080", "2024-01-02"]),
            "python# app.py --port=# #-#-#"
        );
        assert_eq!(entry_class(&["a", "--port=80"]), entry_class(&["a", "--port=8443"]));
        assert_ne!(entry_class(&["a", "serve"]), entry_class(&["a", "migrate"]));
        assert_eq!(entry_class::<&str>(&[]), "");
        assert_eq!(entry_class(&["ä".repeat(2000)]).len(), MAX_CLASS);
    }
}
