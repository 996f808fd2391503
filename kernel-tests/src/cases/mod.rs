//! What only a guest can hold: its kernel, its clock, its power. Each case is a function that says what is wrong.
//!
//! With `broken` a case breaks what it watches over, and must then fail: proof that it can.

mod large;
mod overlay;
mod power;
mod rename;
mod system;
mod trouble;

use std::process::ExitCode;

use anyhow::Result;

/// What a case is called, and what it does; with `true` it breaks what it watches over.
type Case = (&'static str, fn(bool) -> Result<()>);

/// All of them. The host's table has the same names.
const CASES: [Case; 19] = [
    ("overlay", overlay::overlay),
    ("overlay-control", overlay::control),
    ("rename-fault", rename::fault),
    // Not in the host's table: what the one before runs in a container.
    ("rename-inside", rename::inside),
    ("large-file", large::file),
    ("start", system::start),
    ("one-device", system::one_device),
    ("doctor", system::doctor),
    ("btf-missing", system::btf_missing),
    ("cgroup-v1", system::cgroup_v1),
    ("batch", system::batch),
    ("lockdown", system::lockdown),
    ("uring-off", system::uring_off),
    ("module-missing", system::module_missing),
    ("killed", trouble::killed),
    ("store-full", trouble::store_full),
    ("clock", trouble::clock),
    ("power-fill", power::fill),
    ("power-check", power::check),
];

pub(crate) fn run(name: &str, broken: bool) -> ExitCode {
    let Some((_, case)) = CASES.iter().find(|(known, _)| *known == name) else {
        eprintln!("there is no case {name}");
        return ExitCode::from(2);
    };
    if broken {
        crate::node::be_impatient();
    }
    match case(broken) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
