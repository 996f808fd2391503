//! The program of a test guest. As PID 1 it makes a system of what the host packed, runs the plan, and switches off; with
//! `case NAME` it is one of the plan's commands.
//!
//! It is linked statically, drives `sluice` from outside as users do, and knows nothing of the crates behind it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program whose output is read by its host")]

mod cases;
mod init;
mod node;
mod server;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["case", name] => cases::run(name, false),
        ["case", name, "--broken"] => cases::run(name, true),
        // In a container a case has this number, too.
        _ if std::process::id() == 1 => init::main(),
        _ => {
            eprintln!("usage: guest case NAME [--broken]");
            ExitCode::from(2)
        }
    }
}
