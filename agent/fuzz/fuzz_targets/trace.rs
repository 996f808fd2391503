//! Trace files: any bytes give records or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_trace::TraceReader;

fuzz_target!(|data: &[u8]| {
    let Ok(reader) = TraceReader::new(data) else { return };
    for record in reader.take(100_000) {
        if record.is_err() {
            return;
        }
    }
});
