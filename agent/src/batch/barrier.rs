//! Barriers: a task goes on when all tasks of the group were there.

use std::collections::BTreeSet;

use tokio::sync::watch;

/// What became of waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passing {
    /// All were there.
    All,
    /// This task failed for good before it was there.
    Never(usize),
}

/// The barriers of a job, known by the number of their runnable.
#[derive(Debug)]
pub(super) struct Barriers {
    tasks: usize,
    state: watch::Sender<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Barrier and task.
    reached: BTreeSet<(usize, usize)>,
    /// Tasks that are over, and whether they did well.
    over: BTreeSet<(usize, bool)>,
}

impl Barriers {
    pub(super) fn new(tasks: usize) -> Self {
        Self { tasks, state: watch::Sender::default() }
    }

    /// A task that did well was everywhere, one that failed comes nowhere any more.
    pub(super) fn over(&self, task: usize, well: bool) {
        self.state.send_modify(|state| {
            state.over.insert((task, well));
        });
    }

    /// Waits. A task that is tried once more was where it was before.
    pub(super) async fn pass(&self, barrier: usize, task: usize) -> Passing {
        self.state.send_modify(|state| {
            state.reached.insert((barrier, task));
        });
        let mut changes = self.state.subscribe();
        let decided = changes.wait_for(|state| state.passing(barrier, self.tasks).is_some()).await;
        match decided {
            Ok(state) => state.passing(barrier, self.tasks).unwrap_or(Passing::All),
            // The sender is part of this.
            Err(_closed) => Passing::All,
        }
    }
}

impl State {
    fn passing(&self, barrier: usize, tasks: usize) -> Option<Passing> {
        let there =
            |task: usize| self.reached.contains(&(barrier, task)) || self.over.contains(&(task, true));
        if (0..tasks).all(there) {
            return Some(Passing::All);
        }
        let lost = |task: &usize| self.over.contains(&(*task, false)) && !there(*task);
        (0..tasks).find(lost).map(Passing::Never)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_pass_when_the_last_is_there() {
        let barriers = Barriers::new(3);
        let (first, second, third) =
            tokio::join!(barriers.pass(0, 0), barriers.pass(0, 1), barriers.pass(0, 2));
        assert_eq!([first, second, third], [Passing::All; 3]);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_task_that_failed() {
        let barriers = Barriers::new(2);
        let failing = async { barriers.over(1, false) };
        assert_eq!(tokio::join!(barriers.pass(0, 0), failing).0, Passing::Never(1));
        // It failed after this one.
        let barriers = Barriers::new(2);
        let failing = async {
            barriers.state.send_modify(|state| {
                state.reached.insert((0, 1));
            });
            barriers.over(1, false);
        };
        assert_eq!(tokio::join!(barriers.pass(0, 0), failing).0, Passing::All);
    }
}
