//! x
#![allow(clippy::all, clippy::print_stdout, clippy::unwrap_used, missing_docs)]
use sluice_probes::{Device, Options, Probes};
use sluice_trace::Capability;
use std::io::BufRead;
use std::time::Duration;
fn main() {
    let dir = std::env::args().nth(1).unwrap();
    let device = Device::from_stat(std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(dir).unwrap()));
    let all: Vec<Capability> = Capability::ALL.into_iter().filter(|c| *c != Capability::FailedCall).collect();
    let of = |capabilities: Vec<Capability>| {
        Probes::load(&Options { capabilities, linger: Duration::ZERO, ..Options::default() }).unwrap()
    };
    let _failed = of(vec![Capability::FailedCall]);
    let mut sets: Vec<Option<Probes>> = vec![None, Some(of(all.clone()))];
    for c in &all {
        sets.push(Some(of(vec![*c])));
    }
    // loaded and attached, watching another device
    sets.push(Some(of(all.clone())));
    eprintln!("sets none all {all:?} other");
    let last = sets.len() - 1;
    println!("{}", sets.len());
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let mut words = line.split_whitespace();
        let n: usize = words.next().unwrap().parse().unwrap();
        let on = words.next().unwrap() == "on";
        if let Some(p) = &mut sets[n] {
            let d = if n == last { Device(12345) } else { device };
            if on {
                p.watch(d).unwrap();
            } else {
                p.drain(|_| {}).unwrap();
                p.unwatch(d).unwrap();
                std::thread::sleep(Duration::from_millis(1));
                p.drain(|_| {}).unwrap();
                std::thread::sleep(Duration::from_millis(300));
            }
        }
        println!("ok");
    }
}
