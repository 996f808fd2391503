//! Trace files: any bytes give records or an error.

use sluice_trace::TraceReader;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Ok(reader) = TraceReader::new(data) else { return };
    for record in reader.take(100_000) {
        if record.is_err() {
            return;
        }
    }
}
