//! Prints what can be seen on this machine, and by what.
#![allow(clippy::print_stdout, reason = "an example speaks to a terminal")]

use std::time::Instant;

use sluice_probes::{Device, Options, Probes};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let begin = Instant::now();
    let mut probes = Probes::load(&Options::default())?;
    println!("loaded in {:?}", begin.elapsed());
    for (capability, level) in &probes.levels().reached {
        println!("{capability:?}: {level}");
    }
    for (capability, reason) in &probes.levels().refused {
        println!("{capability:?} not by {reason}");
    }
    let begin = Instant::now();
    probes.watch(Device(0))?;
    println!("attached in {:?}", begin.elapsed());
    let begin = Instant::now();
    probes.unwatch(Device(0))?;
    println!("detached in {:?}", begin.elapsed());
    Ok(())
}
