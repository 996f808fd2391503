//! Loads programs and attaches them to hooks. A [`Link`] that is dropped detaches.

use aya::programs::fentry::FEntryLink;
use aya::programs::fexit::FExitLink;
use aya::programs::kprobe::KProbeLink;
use aya::programs::raw_trace_point::RawTracePointLink;
use aya::programs::tp_btf::BtfTracePointLink;
use aya::programs::trace_point::TracePointLink;
use aya::programs::{BtfTracePoint, FEntry, FExit, KProbe, Program, ProgramError, RawTracePoint, TracePoint};
use aya::{Btf, Ebpf};

use crate::hooks::Hook;

/// Why a program cannot be loaded or attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("the object has no program {0}")]
    NoProgram(&'static str),
    #[error("{0} is of another type")]
    OtherType(&'static str),
    #[error("{program}: {source}")]
    Refused {
        program: &'static str,
        #[source]
        source: Box<ProgramError>,
    },
    #[error("the kernel has none of {0:?}")]
    NoFunction(&'static [&'static str]),
}

/// An attached program.
#[expect(dead_code, reason = "held for what dropping them does")]
pub(crate) enum Link {
    Raw(RawTracePointLink),
    Typed(BtfTracePointLink),
    Trace(TracePointLink),
    Entry(FEntryLink),
    Exit(FExitLink),
    Kprobe(KProbeLink),
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Link")
    }
}

/// Loads the hook's program. Once is enough.
pub(crate) fn load(bpf: &mut Ebpf, types: Option<&Btf>, hook: Hook) -> Result<(), AttachError> {
    let program = hook.program();
    let refused = |source| AttachError::Refused { program, source: Box::new(source) };
    let missing = AttachError::NoProgram(program);
    let found = bpf.program_mut(program).ok_or(missing)?;
    match (found, hook) {
        (Program::RawTracePoint(one), _) => one.load().map_err(refused),
        (Program::TracePoint(one), _) => one.load().map_err(refused),
        (Program::KProbe(one), _) => one.load().map_err(refused),
        (Program::FEntry(one), Hook::Entry(_, names)) => {
            let types = types.ok_or(AttachError::NoFunction(names))?;
            let mut last = AttachError::NoFunction(names);
            for name in names {
                match one.load(name, types) {
                    Ok(()) => return Ok(()),
                    Err(error) => last = refused(error),
                }
            }
            Err(last)
        }
        (Program::BtfTracePoint(one), Hook::Typed(_, name)) => {
            let types = types.ok_or(AttachError::OtherType(program))?;
            one.load(name, types).map_err(refused)
        }
        (Program::FExit(one), Hook::Exit(_, name)) => {
            let types = types.ok_or(AttachError::OtherType(program))?;
            one.load(name, types).map_err(refused)
        }
        _ => Err(AttachError::OtherType(program)),
    }
}

/// Attaches the hook's program, which was attached before. On some kernels (5.10) a program at a function that was detached
/// cannot be attached again: it is loaded anew.
pub(crate) fn attach_again(
    bpf: &mut Ebpf,
    types: impl Fn() -> Option<Btf>,
    hook: Hook,
) -> Result<Vec<Link>, AttachError> {
    let first = attach(bpf, hook);
    let unloaded = match (&first, bpf.program_mut(hook.program())) {
        (Err(_), Some(Program::FEntry(one))) => one.unload().is_ok(),
        (Err(_), Some(Program::FExit(one))) => one.unload().is_ok(),
        _ => false,
    };
    if !unloaded {
        return first;
    }
    load(bpf, types().as_ref(), hook)?;
    attach(bpf, hook)
}

/// Attaches the hook's loaded program.
pub(crate) fn attach(bpf: &mut Ebpf, hook: Hook) -> Result<Vec<Link>, AttachError> {
    let program = hook.program();
    let found = bpf.program_mut(program).ok_or(AttachError::NoProgram(program))?;
    let links = match (found, hook) {
        (Program::RawTracePoint(one), Hook::Raw(_, name)) => vec![raw(one, name)],
        (Program::BtfTracePoint(one), _) => vec![typed(one)],
        (Program::FEntry(one), _) => vec![entry(one)],
        (Program::FExit(one), _) => vec![exit(one)],
        // System calls differ between architectures: those that are there.
        (Program::TracePoint(one), Hook::Syscalls(_, names)) => {
            let mut links: Vec<_> = names.iter().map(|name| trace(one, name)).collect();
            if links.iter().any(Result::is_ok) {
                links.retain(Result::is_ok);
            }
            links
        }
        // Functions were renamed: the first that is there.
        (Program::KProbe(one), Hook::Kprobe(_, names)) => {
            let mut last = Vec::new();
            for name in names {
                last = vec![probe(one, name)];
                if last.iter().all(Result::is_ok) {
                    break;
                }
            }
            last
        }
        (Program::KProbe(one), Hook::Kretprobe(_, names)) => {
            names.iter().map(|name| probe(one, name)).collect()
        }
        _ => return Err(AttachError::OtherType(program)),
    };
    let links: Result<Vec<Link>, ProgramError> = links.into_iter().collect();
    links.map_err(|source| AttachError::Refused { program, source: Box::new(source) })
}

fn raw(program: &mut RawTracePoint, name: &str) -> Result<Link, ProgramError> {
    let id = program.attach(name)?;
    program.take_link(id).map(Link::Raw)
}

fn typed(program: &mut BtfTracePoint) -> Result<Link, ProgramError> {
    let id = program.attach()?;
    program.take_link(id).map(Link::Typed)
}

fn trace(program: &mut TracePoint, name: &str) -> Result<Link, ProgramError> {
    let id = program.attach("syscalls", name)?;
    program.take_link(id).map(Link::Trace)
}

fn entry(program: &mut FEntry) -> Result<Link, ProgramError> {
    let id = program.attach()?;
    program.take_link(id).map(Link::Entry)
}

fn exit(program: &mut FExit) -> Result<Link, ProgramError> {
    let id = program.attach()?;
    program.take_link(id).map(Link::Exit)
}

fn probe(program: &mut KProbe, name: &str) -> Result<Link, ProgramError> {
    let id = program.attach(name, 0)?;
    program.take_link(id).map(Link::Kprobe)
}
