//! A disk that loses what was written, now and then: the fill brings it again and completes the layer, and no read fails nor
//! gets other bytes.
//!
//! Without a harness: the binary starts itself as the server of the disk.
#![allow(clippy::print_stdout, reason = "the verdict of a test without a harness")]

mod rig;
#[path = "../../store/tests/rig/served.rs"]
#[allow(dead_code, reason = "the store's tests use the rest of it")]
mod served;

use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rig::{LONG, Sample, Source, noise, tar_of};
use served::{ServedDisk, marked, serve_if_asked};
use sluice_store::Store;
use sluice_stream::Scheduler;

fn main() -> ExitCode {
    serve_if_asked();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    runtime.block_on(a_fill_outlasts_a_disk_that_loses_writes());
    println!("test a_fill_outlasts_a_disk_that_loses_writes ... ok");
    ExitCode::SUCCESS
}

/// For the rig's disk.
fn output(command: &mut Command) -> String {
    let output = command.output().expect("started");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim_end().to_owned()
}

fn run(command: &mut Command) {
    output(command);
}

async fn a_fill_outlasts_a_disk_that_loses_writes() {
    let disk = ServedDisk::new(64 << 20);
    let root = disk.path().join("store");
    let store = Store::open(&root, 1 << 20).expect("store");
    let files: Vec<_> = (0..40).map(|number| (format!("file{number}"), marked(number, 200_000))).collect();
    let sample = Sample::new(tar_of(&files), files);
    // 2 MB/s: the fill takes longer than its flush interval.
    let source = Source::with(&sample.layer, |source| source.rate = 2_000_000);
    let layer = sample.streamed(&store, source, &Scheduler::new(2), LONG);
    let fill = tokio::spawn({
        let layer = layer.clone();
        async move { layer.fill().await }
    });
    let done = AtomicBool::new(false);
    let spoiling = async {
        // Until a flush of the fill has failed: nobody else makes one before the kernel would.
        disk.fail("writes", "SLUICE-");
        let refused = async {
            while disk.refused() == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LONG, refused).await.expect("a flush");
        disk.heal();
        done.store(true, Ordering::Relaxed);
    };
    let reading = async {
        while !done.load(Ordering::Relaxed) {
            sample.check(&layer).await;
        }
        sample.check(&layer).await;
    };
    tokio::join!(spoiling, reading);
    fill.await.expect("joined").expect("filled");
    assert!(layer.layer().is_complete());
    drop(layer);
    sample.check_complete(store, &root);
    drop(disk);
}
