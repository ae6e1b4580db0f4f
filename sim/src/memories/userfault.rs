//! The engine's own policy: [`userfault_engine::policy::Policy`] itself, driven as the engine drives it.
//!
//! The order of the calls is that of `fill.rs`, `evict.rs` and `room.rs` of the engine. A block that comes back
//! from resting leaves its old entry in the queue there, as here; whoever takes it finds another state.

use userfault_engine::policy::{Memo, Policy, Queue, Seat};

use crate::{Memory, Touch};

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    Resident,
    Resting,
}

/// A memory under the engine's policy.
pub struct Userfault {
    policy: Policy,
    state: Vec<State>,
    memos: Vec<Memo>,
    used: usize,
    capacity: usize,
    rests: bool,
}

impl Userfault {
    /// A memory of `capacity` blocks for a region of `blocks`. Without `rests`, what is unmapped is gone, as in
    /// private memory.
    pub fn new(blocks: usize, capacity: usize, rests: bool) -> Userfault {
        Userfault {
            policy: Policy::default(),
            state: vec![State::Absent; blocks],
            memos: vec![Memo::default(); blocks],
            used: 0,
            capacity,
            rests,
        }
    }

    fn join(&mut self, queue: Queue, block: u32) {
        self.policy.join(queue, Seat { region: 0, block }, 1, 0);
    }

    fn gone(&mut self, block: usize) {
        self.memos[block] = self.policy.left(self.memos[block]);
        self.state[block] = State::Absent;
        self.used -= 1;
    }

    fn one_leaves(&mut self) {
        let queue = self
            .policy
            .next(self.capacity as u64, false)
            .expect("the memory is full");
        let seat = self.policy.take(queue).expect("the queue gives").seat;
        let block = seat.block as usize;
        match (queue, self.state[block]) {
            (Queue::Resting, State::Resting) => self.gone(block),
            (Queue::Mapped(_), State::Resident) if self.rests => {
                self.state[block] = State::Resting;
                self.join(Queue::Resting, seat.block);
            }
            (Queue::Mapped(_), State::Resident) => self.gone(block),
            // An entry that was left behind.
            _ => {}
        }
    }
}

impl Memory for Userfault {
    fn touch(&mut self, block: u32) -> Touch {
        let at = block as usize;
        let touch = match self.state[at] {
            State::Resident => return Touch::Hit,
            State::Resting => {
                self.memos[at] = self.policy.came_back(self.memos[at]);
                Touch::Minor
            }
            State::Absent => {
                while self.used >= self.capacity {
                    self.one_leaves();
                }
                self.used += 1;
                self.memos[at] = self.policy.brought_in(self.memos[at]);
                Touch::Miss
            }
        };
        self.state[at] = State::Resident;
        self.join(Queue::Mapped(self.memos[at].rank()), block);
        touch
    }
}
