//! Reads that wait for the agent, across agents: what one was asked and did not answer, the next one is asked again.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::protocol::{Head, Kind};

const EIO: i32 = 5;
const EINTR: i32 = 4;
const ESTALE: i32 = 116;

/// What the agent says to a read.
#[derive(Debug)]
pub(crate) enum Supply {
    /// The bytes are in the local file.
    InFile(Arc<File>),
    /// These are the bytes.
    Bytes(Vec<u8>),
    /// It fails with this errno.
    Failed(i32),
}

/// A read that waits.
pub(crate) struct Waiting {
    /// The kernel's number of the request; 0 if unknown.
    pub(crate) unique: u64,
    pub(crate) inode: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    /// The local file does not give these bytes: the agent is to bring them another way.
    pub(crate) unreadable: bool,
    /// Called once, in the thread that brings the answer.
    pub(crate) answer: Box<dyn FnOnce(Supply) + Send>,
}

/// What goes to the agent.
pub(crate) type Outgoing = (Head, Vec<u8>);

#[derive(Default)]
struct State {
    next: u64,
    waiting: HashMap<u64, Waiting>,
    /// Local files that have all of theirs, by inode.
    whole: HashMap<u64, Arc<File>>,
    agent: Option<Agent>,
    /// Agents so far.
    agents: u64,
    /// No agent came in time: nobody waits for one any more.
    abandoned: bool,
    ended: bool,
}

struct Agent {
    number: u64,
    outgoing: Sender<Outgoing>,
    added: HashSet<u64>,
}

/// See the module text.
#[derive(Default)]
pub(crate) struct Misses {
    state: Mutex<State>,
    changed: Condvar,
}

impl Misses {
    /// A read that is not local. Does not wait.
    pub(crate) fn ask(&self, waiting: Waiting) {
        let mut state = self.lock();
        if let Some(file) = state.whole.get(&waiting.inode).filter(|_| !waiting.unreadable).cloned() {
            drop(state);
            return (waiting.answer)(Supply::InFile(file));
        }
        if state.abandoned {
            drop(state);
            return (waiting.answer)(Supply::Failed(EIO));
        }
        state.next += 1;
        let id = state.next;
        if let Some(agent) = state.agent.as_ref().filter(|agent| agent.added.contains(&waiting.inode)) {
            agent.ask(id, &waiting);
        }
        state.waiting.insert(id, waiting);
    }

    /// The kernel gives up on a read. Only requests that are waited for one by one are interrupted; reads of loop devices, direct
    /// ones and read-ahead are not (Linux 6.18): those wait for their answer, or for [`Self::watch`] to end it.
    pub(crate) fn interrupt(&self, unique: u64) {
        let mut state = self.lock();
        let id = state.waiting.iter().find(|(_, waiting)| waiting.unique == unique).map(|(id, _)| *id);
        let waiting = id.and_then(|id| state.waiting.remove(&id));
        drop(state);
        if let Some(waiting) = waiting {
            (waiting.answer)(Supply::Failed(EINTR));
        }
    }

    /// What the agent answered. Read `id` may be gone: interrupted, or answered by a former agent.
    pub(crate) fn answer(&self, id: u64, supply: impl FnOnce(&Waiting) -> Supply) {
        let waiting = self.lock().waiting.remove(&id);
        if let Some(waiting) = waiting {
            let supply = match supply(&waiting) {
                Supply::Bytes(bytes) if bytes.len() != waiting.len as usize => {
                    tracing::error!(got = bytes.len(), wanted = waiting.len, "the agent gave another length");
                    Supply::Failed(EIO)
                }
                Supply::Failed(errno) if errno <= 0 => Supply::Failed(EIO),
                supply => supply,
            };
            (waiting.answer)(supply);
        }
    }

    /// All of a file is in its local file: no read of it needs the agent, be it alive or not.
    pub(crate) fn is_whole(&self, inode: u64, file: &Arc<File>) {
        let mut state = self.lock();
        state.whole.insert(inode, Arc::clone(file));
        let local = |_: &u64, waiting: &mut Waiting| waiting.inode == inode && !waiting.unreadable;
        let local = state.waiting.extract_if(local).collect::<Vec<_>>();
        drop(state);
        local.into_iter().for_each(|(_, waiting)| (waiting.answer)(Supply::InFile(Arc::clone(file))));
    }

    /// A new agent takes the place of any other; gives its number.
    pub(crate) fn agent_came(&self, outgoing: Sender<Outgoing>) -> u64 {
        let mut state = self.lock();
        state.agents += 1;
        let number = state.agents;
        state.agent = Some(Agent { number, outgoing, added: HashSet::new() });
        state.abandoned = false;
        self.changed.notify_all();
        number
    }

    /// The agent's connection is closed.
    pub(crate) fn agent_gone(&self, number: u64) {
        let mut state = self.lock();
        if state.agent.as_ref().is_some_and(|agent| agent.number == number) {
            state.agent = None;
            tracing::info!(
                waiting = state.waiting.len(),
                "the agent is gone; reads of what is not local wait"
            );
            self.changed.notify_all();
        }
    }

    /// The agent has a source for this file: it is asked what waits.
    pub(crate) fn file_added(&self, number: u64, inode: u64) {
        let mut state = self.lock();
        state.whole.remove(&inode);
        let State { agent, waiting, .. } = &mut *state;
        if let Some(agent) = agent.as_mut().filter(|agent| agent.number == number) {
            agent.added.insert(inode);
            for (id, waiting) in waiting.iter().filter(|(_, waiting)| waiting.inode == inode) {
                agent.ask(*id, waiting);
            }
        }
    }

    /// The file is no more: reads of it that no agent was asked fail as those that come do. What the present one was asked it answers.
    pub(crate) fn file_removed(&self, inode: u64) {
        let mut state = self.lock();
        state.whole.remove(&inode);
        if state.agent.as_ref().is_some_and(|agent| agent.added.contains(&inode)) {
            return;
        }
        let waiting = state.waiting.extract_if(|_, waiting| waiting.inode == inode).collect::<Vec<_>>();
        drop(state);
        waiting.into_iter().for_each(|(_, waiting)| (waiting.answer)(Supply::Failed(ESTALE)));
    }

    /// No agent will come: what waits fails, and what is asked from now on.
    pub(crate) fn abandon(&self) {
        self.changed.notify_all();
        give_up(self.lock());
    }

    /// The file system is gone.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.agent = None;
        self.changed.notify_all();
    }

    /// Fails what waits when no agent comes for as long as `patience`. Returns at the end.
    pub(crate) fn watch(&self, patience: Duration) {
        let mut state = self.lock();
        loop {
            let present = |state: &mut State| !state.ended && (state.agent.is_some() || state.abandoned);
            state = self.changed.wait_while(state, present).unwrap_or_else(PoisonError::into_inner);
            let absent = |state: &mut State| !state.ended && !state.abandoned && state.agent.is_none();
            let waited = self.changed.wait_timeout_while(state, patience, absent);
            let (waited, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = waited;
            if state.ended {
                return;
            }
            if timeout.timed_out() {
                tracing::error!(
                    reads = state.waiting.len(),
                    ?patience,
                    "no agent came: what is not local fails with EIO"
                );
                give_up(state);
                state = self.lock();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn give_up(mut state: MutexGuard<'_, State>) {
    state.abandoned = true;
    let given_up = std::mem::take(&mut state.waiting);
    drop(state);
    given_up.into_values().for_each(|waiting| (waiting.answer)(Supply::Failed(EIO)));
}

impl Agent {
    fn ask(&self, id: u64, waiting: &Waiting) {
        let head = Head { a: waiting.inode, b: waiting.offset, ..Head::new(Kind::Read, id) };
        let mut bytes = Vec::from(u64::from(waiting.len).to_le_bytes());
        if waiting.unreadable {
            bytes.extend(1_u64.to_le_bytes());
        }
        // A closed channel is an agent that is going: the next one is asked.
        if self.outgoing.send((head, bytes)).is_err() {
            tracing::debug!(id, "the agent is going");
        }
    }
}

impl std::fmt::Debug for Misses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Misses").field("waiting", &self.lock().waiting.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn read(inode: u64, answers: &Sender<i32>) -> Waiting {
        let answers = answers.clone();
        let answer = Box::new(move |supply| {
            let said = if let Supply::Failed(errno) = supply { errno } else { 0 };
            answers.send(said).expect("the test waits");
        });
        Waiting { unique: 100 + inode, inode, offset: 0, len: 4, unreadable: false, answer }
    }

    #[test]
    fn the_next_agent_is_asked_what_the_last_one_did_not_answer() {
        let (misses, (answers, answered)) = (Misses::default(), channel());
        misses.ask(read(7, &answers));
        let (first, asked) = channel();
        let number = misses.agent_came(first);
        assert!(asked.try_recv().is_err(), "it has no source for the file yet");
        misses.file_added(number, 7);
        assert_eq!(asked.try_recv().expect("asked").0.id, 1);
        let (second, asked) = channel();
        let number = misses.agent_came(second);
        misses.agent_gone(number - 1);
        misses.file_added(number, 7);
        assert_eq!(asked.try_recv().expect("asked again").0.id, 1);
        misses.answer(1, |_| Supply::Bytes(vec![0; 4]));
        misses.answer(1, |_| Supply::Failed(5));
        misses.ask(read(7, &answers));
        misses.answer(2, |_| Supply::Bytes(vec![0; 3]));
        misses.ask(read(7, &answers));
        misses.interrupt(107);
        misses.ask(read(8, &answers));
        misses.file_removed(8);
        drop(answers);
        assert_eq!(answered.iter().collect::<Vec<_>>(), [0, EIO, EINTR, ESTALE]);
    }

    #[test]
    fn patience_ends_and_begins_again() {
        let (misses, (answers, answered)) = (Misses::default(), channel());
        misses.ask(read(7, &answers));
        std::thread::scope(|scope| {
            scope.spawn(|| misses.watch(Duration::from_millis(50)));
            assert_eq!(answered.recv().expect("an answer"), EIO);
            misses.ask(read(7, &answers));
            assert_eq!(answered.recv().expect("at once"), EIO);
            let (agent, _asked) = channel();
            let number = misses.agent_came(agent);
            misses.ask(read(7, &answers));
            std::thread::sleep(Duration::from_millis(100));
            assert!(answered.try_recv().is_err(), "an agent is there");
            misses.agent_gone(number);
            assert_eq!(answered.recv().expect("an answer"), EIO);
            misses.end();
        });
    }
}
