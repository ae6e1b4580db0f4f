//! The work of a cut, shared out between its caller and the saver.
//!
//! First the questions, which pages of a range have been written; then copying what the answers named. Each
//! of the two takes the next task whenever it has done one. Tasks are small, so that the caller never waits
//! long for a thread that the machine does not run.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use userfault_engine::lock::{Condvar, Mutex, MutexGuard};

use crate::copier::Piece;
use crate::error::Error;

/// What one thread does at a time.
pub enum Task {
    /// Ask which of these pages of an array's ledger have been written.
    Ask(usize, Range<usize>),
    /// Copy these blocks.
    Copy(Piece),
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    /// Questions that somebody is asking: more to copy may come of them.
    asking: usize,
    /// The saver is at work on a task.
    helping: bool,
    /// Threads that sleep on `changed`: waking nobody is a system call, too.
    sleeping: usize,
    /// The saver does not help any more.
    done: bool,
    error: Option<Error>,
}

/// The work of a cut.
#[derive(Default)]
pub struct Shares {
    state: Mutex<State>,
    /// An answer is there, or the saver has left.
    changed: Condvar,
    bytes: AtomicUsize,
}

impl Shares {
    /// Says what is to be done; of the copies it is known how many bytes they are.
    pub fn share_out(&self, tasks: VecDeque<Task>, bytes: usize) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.state.lock().tasks = tasks;
    }

    /// Bytes that the cut copies, as far as the questions have been answered.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The next task; `None` if there is none and none can come, or for the saver if it is not wanted.
    pub fn next(&self, saver: bool) -> Option<Task> {
        let mut state = self.state.lock();
        loop {
            if saver && state.done {
                return None;
            }
            if let Some(task) = state.tasks.pop_front() {
                state.asking += usize::from(matches!(task, Task::Ask(..)));
                return Some(task);
            }
            if state.asking == 0 {
                return None;
            }
            self.sleep(&mut state);
        }
    }

    fn sleep(&self, state: &mut MutexGuard<'_, State>) {
        state.sleeping += 1;
        self.changed.wait(state);
        state.sleeping -= 1;
    }

    fn wake(&self, state: &State) {
        if state.sleeping > 0 {
            self.changed.notify_all();
        }
    }

    /// A question has been answered: this is to be copied.
    pub fn answered(&self, pieces: Vec<Piece>, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.asking -= 1;
        state.tasks.extend(pieces.into_iter().map(Task::Copy));
        if state.asking == 0 || !state.tasks.is_empty() {
            self.wake(&state);
        }
    }

    /// Nobody needs the rest. `asking`: a question has no answer.
    pub fn give_up(&self, asking: bool) {
        let mut state = self.state.lock();
        state.tasks.clear();
        state.asking -= usize::from(asking);
        self.wake(&state);
    }

    /// The saver has other things to do than to help.
    pub fn no_help(&self) {
        self.state.lock().done = true;
    }

    /// The saver begins to help; false if there is nothing to help with.
    pub fn begin_help(&self) -> bool {
        let mut state = self.state.lock();
        let nothing = state.tasks.is_empty() && state.asking == 0;
        state.helping = !(state.done || nothing);
        state.helping
    }

    /// The saver has left.
    pub fn end_help(&self, result: Result<(), Error>) {
        let mut state = self.state.lock();
        state.helping = false;
        state.error = result.err();
        self.wake(&state);
    }

    /// Waits until the saver has done with its task, and says how that went.
    pub fn wait_for_help(&self) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.done = true;
        while state.helping {
            self.sleep(&mut state);
        }
        state.error.take().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copies_that_a_question_leads_to_come_before_the_end() {
        let shares = Shares::default();
        shares.share_out(VecDeque::from([Task::Ask(0, 0..8)]), 0);
        assert!(matches!(shares.next(false), Some(Task::Ask(0, pages)) if pages == (0..8)));
        std::thread::scope(|scope| {
            // Nothing is there now, but the answer may bring something.
            let other = scope.spawn(|| shares.next(true));
            shares.answered(vec![(0, vec![1..2, 4..5])], 4096);
            assert!(matches!(other.join().unwrap(), Some(Task::Copy((0, _)))));
        });
        assert!(shares.next(false).is_none());
        assert_eq!(shares.bytes(), 4096);
    }

    #[test]
    fn a_saver_that_is_not_wanted_leaves_the_rest_to_the_caller() {
        let shares = Shares::default();
        shares.share_out(VecDeque::from([Task::Copy((0, vec![1..2, 4..5]))]), 4096);
        assert!(shares.begin_help());
        shares.no_help();
        assert!(shares.next(true).is_none());
        shares.end_help(Ok(()));
        assert!(shares.next(false).is_some());
        shares.wait_for_help().unwrap();
        assert!(!shares.begin_help());
    }
}
