//! The log: lines for people, or one JSON object a line for collectors.
//!
//! An object has `time`, `level`, `module` and `msg`; what an event speaks of stands beside them under its own name: `error`, `image`,
//! `layer`, `path`, `offset`, `size` and the like. A field of one of the four names does not replace it.

use std::fmt;

use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::{Cli, Command};

/// How the log is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

impl LogFormat {
    /// As the command line says it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// The log goes to standard error: warnings by default, and what `SLUICE_LOG` or `--verbose` asks for.
pub(crate) fn start(cli: &Cli, format: LogFormat) {
    let daemon = matches!(cli.command, Command::Daemon { .. });
    let level = match (cli.global.verbose, daemon) {
        (0, false) => "warn",
        (0, true) | (1, _) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("SLUICE_LOG").unwrap_or_else(|_| {
        let ours = [
            "sluice",
            "sluice_stream",
            "sluice_store",
            "sluice_blockfs",
            "sluice_registry",
            "sluice_containerd",
        ];
        EnvFilter::new(ours.iter().fold("warn".to_owned(), |all, one| format!("{all},{one}={level}")))
    });
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    match format {
        LogFormat::Text => log.with_target(daemon).init(),
        LogFormat::Json => log.event_format(JsonLines).init(),
    }
}

struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        let mut line = Fields(Map::new());
        event.record(&mut line);
        let Fields(mut line) = line;
        let message = line.remove("message").unwrap_or_else(|| Value::from(""));
        let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        let level = meta.level().as_str().to_ascii_lowercase();
        for (name, value) in [
            ("time", time.into()),
            ("level", level.into()),
            ("module", meta.target().into()),
            ("msg", message),
        ] {
            line.insert(name.to_owned(), value);
        }
        writeln!(writer, "{}", Value::Object(line))
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_object_on_one_line() {
        let written = Written::default();
        let writer = written.clone();
        let log =
            tracing_subscriber::fmt().event_format(JsonLines).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(log, || {
            let error = io::Error::other("two\nlines");
            tracing::warn!(layer = "sha256:1", offset = 4096_u64, %error, path = ?"a\"b", msg = "other", "read failed");
        });
        let text = String::from_utf8(written.0.lock().expect("not poisoned").clone()).expect("text");
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: Value = serde_json::from_str(&text).expect("json");
        for (name, value) in [
            ("level", Value::from("warn")),
            ("msg", "read failed".into()),
            ("module", module_path!().into()),
            ("layer", "sha256:1".into()),
            ("offset", 4096.into()),
            ("error", "two\nlines".into()),
            ("path", "\"a\\\"b\"".into()),
        ] {
            assert_eq!(line[name], value, "{name}");
        }
        let time = line["time"].as_str().expect("a time");
        assert!(chrono::DateTime::parse_from_rfc3339(time).is_ok(), "{time}");
    }
}
