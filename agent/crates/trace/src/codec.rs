//! Records as bytes.
//!
//! Numbers are of variable length ([`crate::varint`]). A record is: its kind (one byte), the time since the record before in
//! the same block (nanoseconds, signed: records of several processors are not in strict order; the first since 0), the
//! number of its process (0: nobody; else in the order of definitions, from 1), its own fields in the order of
//! [`What`]. A definition of a process is a record of kind 0 with its fields alone; it holds in all later blocks.

use sluice_events::Call;

use crate::record::{AccessKind, FailedCall, FetchLane, Origin, Phase, Process, Record, What};
use crate::varint::{Input, Malformed, put, put_bytes, put_signed};
use std::collections::HashMap;

const DEFINE: u8 = 0;
const OPEN: u8 = 1;
const EXEC: u8 = 2;
const ACCESS: u8 = 3;
const BLOCKED: u8 = 4;
const FAILED: u8 = 5;
const SERVED: u8 = 6;
const READY: u8 = 7;
// From version 2 of the format on.
const SERVED_FROM: u8 = 8;
const PHASE: u8 = 9;
const FETCH: u8 = 10;
const BROUGHT: u8 = 11;
const FILE: u8 = 12;

/// Longest path that is kept.
const MAX_PATH: usize = 4096;
/// Longest name of a thread.
const MAX_COMM: usize = 64;
/// Most processes of one trace.
const MAX_PROCESSES: usize = 1 << 20;

#[derive(Debug, Default)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
    last_ns: u64,
    processes: HashMap<Process, u64>,
}

impl Encoder {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The block so far; the next one begins.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.last_ns = 0;
        std::mem::take(&mut self.bytes)
    }

    pub(crate) fn push(&mut self, record: &Record) {
        let process = self.process(&record.process);
        let kind = match &record.what {
            What::Open { .. } => OPEN,
            What::Exec { .. } => EXEC,
            What::Access { .. } => ACCESS,
            What::Blocked { .. } => BLOCKED,
            What::Failed(_) => FAILED,
            What::Served { .. } => SERVED_FROM,
            What::Ready => READY,
            What::Phase { .. } => PHASE,
            What::Fetch { .. } => FETCH,
            What::Brought { .. } => BROUGHT,
            What::File { .. } => FILE,
        };
        let out = &mut self.bytes;
        out.push(kind);
        put_signed(out, record.time_ns.wrapping_sub(self.last_ns) as i64);
        self.last_ns = record.time_ns;
        put(out, process);
        match &record.what {
            What::Open { inode } => put(out, *inode),
            What::Exec { inode, path } => {
                put(out, *inode);
                put_bytes(out, cut(path));
            }
            What::Access { kind, inode, offset, len } => {
                out.push(*kind as u8);
                [*inode, *offset, *len].into_iter().for_each(|number| put(out, number));
            }
            What::Blocked { inode, offset, blocked_ns } => {
                [*inode, *offset, *blocked_ns].into_iter().for_each(|number| put(out, number));
            }
            What::Failed(call) => failed(out, call),
            What::Served { layer, offset, len, service_ns, from } => {
                out.push(*from as u8);
                [u64::from(*layer), *offset, *len, *service_ns]
                    .into_iter()
                    .for_each(|number| put(out, number));
            }
            What::Ready => {}
            What::Phase { phase, took_ns } => {
                out.push(*phase as u8);
                put(out, *took_ns);
            }
            What::Fetch { lane, layer, offset, len, first_byte_ns, took_ns, whole } => {
                out.extend([*lane as u8, u8::from(*whole)]);
                let layer = layer.map_or(0, |layer| u64::from(layer) + 1);
                [layer, *offset, *len, *first_byte_ns, *took_ns]
                    .into_iter()
                    .for_each(|number| put(out, number));
            }
            What::Brought { lane, layer, offset, len } => {
                out.push(*lane as u8);
                [u64::from(*layer), *offset, *len].into_iter().for_each(|number| put(out, number));
            }
            What::File { inode, layer, offset, size, path } => {
                [*inode, u64::from(*layer), *offset, *size].into_iter().for_each(|number| put(out, number));
                put_bytes(out, cut(path));
            }
        }
    }

    /// The number of a process, which is defined if it is new.
    fn process(&mut self, process: &Process) -> u64 {
        if *process == Process::default() {
            return 0;
        }
        if let Some(number) = self.processes.get(process) {
            return *number;
        }
        let number = self.processes.len() as u64 + 1;
        // Far more than any start has; who did the rest is left out.
        if self.processes.len() >= MAX_PROCESSES {
            return 0;
        }
        self.processes.insert(process.clone(), number);
        self.bytes.push(DEFINE);
        let Process { tgid, pid, mnt_ns, cgroup, comm } = process;
        [u64::from(*tgid), u64::from(*pid), u64::from(*mnt_ns), *cgroup]
            .into_iter()
            .for_each(|number| put(&mut self.bytes, number));
        let end = (0..=comm.len().min(MAX_COMM)).rev().find(|end| comm.is_char_boundary(*end)).unwrap_or(0);
        put_bytes(&mut self.bytes, comm.get(..end).unwrap_or_default().as_bytes());
        number
    }
}

fn cut(path: &[u8]) -> &[u8] {
    path.get(..MAX_PATH).unwrap_or(path)
}

fn failed(out: &mut Vec<u8>, call: &FailedCall) {
    let flags =
        u8::from(call.whole_path) | u8::from(call.inode.is_some()) << 1 | u8::from(call.mode.is_some()) << 2;
    out.push(flags);
    [call.call as u64, call.errno.into(), call.flags.into(), call.dev.into(), call.magic]
        .into_iter()
        .for_each(|number| put(out, number));
    call.inode.into_iter().chain(call.mode.map(u64::from)).for_each(|number| put(out, number));
    put_bytes(out, cut(&call.path));
    put_bytes(out, cut(&call.new_path));
}

#[derive(Debug, Default)]
pub(crate) struct Decoder {
    bytes: Vec<u8>,
    at: usize,
    last_ns: u64,
    processes: Vec<Process>,
}

impl Decoder {
    /// Goes on with the next block.
    pub(crate) fn block(&mut self, bytes: Vec<u8>) {
        (self.bytes, self.at, self.last_ns) = (bytes, 0, 0);
    }

    /// The block's next record.
    pub(crate) fn next(&mut self) -> Result<Option<Record>, Malformed> {
        loop {
            let mut input = Input(self.bytes.get(self.at..).unwrap_or_default());
            if input.is_empty() {
                return Ok(None);
            }
            let kind = input.byte()?;
            let record = if kind == DEFINE {
                if self.processes.len() >= MAX_PROCESSES {
                    return Err(Malformed);
                }
                self.processes.push(process(&mut input)?);
                None
            } else {
                let time_ns = self.last_ns.wrapping_add(input.signed()? as u64);
                self.last_ns = time_ns;
                let process = match input.number()? {
                    0 => Process::default(),
                    number => {
                        let index = usize::try_from(number - 1).map_err(|_range| Malformed)?;
                        self.processes.get(index).ok_or(Malformed)?.clone()
                    }
                };
                Some(Record { time_ns, process, what: what(kind, &mut input)? })
            };
            self.at = self.bytes.len() - input.0.len();
            if record.is_some() {
                return Ok(record);
            }
        }
    }
}

fn process(input: &mut Input<'_>) -> Result<Process, Malformed> {
    Ok(Process {
        tgid: input.u32()?,
        pid: input.u32()?,
        mnt_ns: input.u32()?,
        cgroup: input.number()?,
        comm: String::from_utf8(input.bytes(MAX_COMM)?.to_vec()).map_err(|_not_text| Malformed)?,
    })
}

fn what(kind: u8, input: &mut Input<'_>) -> Result<What, Malformed> {
    Ok(match kind {
        OPEN => What::Open { inode: input.number()? },
        EXEC => What::Exec { inode: input.number()?, path: input.bytes(MAX_PATH)?.to_vec() },
        ACCESS => What::Access {
            kind: AccessKind::from_number(input.byte()?).ok_or(Malformed)?,
            inode: input.number()?,
            offset: input.number()?,
            len: input.number()?,
        },
        BLOCKED => {
            What::Blocked { inode: input.number()?, offset: input.number()?, blocked_ns: input.number()? }
        }
        FAILED => What::Failed(failed_call(input)?),
        SERVED => served(Origin::Unknown, input)?,
        SERVED_FROM => served(known(Origin::from_number, input)?, input)?,
        READY => What::Ready,
        PHASE => What::Phase { phase: known(Phase::from_number, input)?, took_ns: input.number()? },
        FETCH => What::Fetch {
            lane: known(FetchLane::from_number, input)?,
            whole: input.byte()? != 0,
            layer: match input.at_most(1 << 32)? {
                0 => None,
                number => Some((number - 1) as u32),
            },
            offset: input.number()?,
            len: input.number()?,
            first_byte_ns: input.number()?,
            took_ns: input.number()?,
        },
        BROUGHT => What::Brought {
            lane: known(FetchLane::from_number, input)?,
            layer: input.u32()?,
            offset: input.number()?,
            len: input.number()?,
        },
        FILE => What::File {
            inode: input.number()?,
            layer: input.u32()?,
            offset: input.number()?,
            size: input.number()?,
            path: input.bytes(MAX_PATH)?.to_vec(),
        },
        _ => return Err(Malformed),
    })
}

fn known<T>(from_number: impl Fn(u8) -> Option<T>, input: &mut Input<'_>) -> Result<T, Malformed> {
    from_number(input.byte()?).ok_or(Malformed)
}

fn served(from: Origin, input: &mut Input<'_>) -> Result<What, Malformed> {
    Ok(What::Served {
        layer: input.u32()?,
        offset: input.number()?,
        len: input.number()?,
        service_ns: input.number()?,
        from,
    })
}

fn failed_call(input: &mut Input<'_>) -> Result<FailedCall, Malformed> {
    let flags = input.byte()?;
    let call = u16::try_from(input.number()?).ok().and_then(Call::from_number).ok_or(Malformed)?;
    let (errno, call_flags, dev, magic) = (input.u32()?, input.u32()?, input.u32()?, input.number()?);
    let inode = if flags & 2 != 0 { Some(input.number()?) } else { None };
    let mode = if flags & 4 != 0 { Some(input.at_most(0xFFFF)? as u16) } else { None };
    let path = input.bytes(MAX_PATH)?.to_vec();
    let new_path = input.bytes(MAX_PATH)?.to_vec();
    let whole_path = flags & 1 != 0;
    Ok(FailedCall { call, errno, flags: call_flags, path, whole_path, new_path, dev, magic, inode, mode })
}
