//! The drain: background copying of dirty blocks, round after round, to wherever they belong.
//!
//! One loop for all *targets*: the homes of regions (`homeward`), each Checkpointer, and whatever else takes what
//! was written before somebody asks for it. A target does one round at a time, on a thread that it may keep waiting,
//! and says when the next one should be. So a store that is slow, refuses or does not come back keeps nobody
//! else's bytes waiting.
//!
//! ```text
//!               due, or asked for                  the round is over
//!   waiting ------------------------> in a round ---------------------> waiting, until then
//!      ^                                  | asked for meanwhile
//!      +------- due at once --------------+
//! ```
//!
//! What a round copies, and how much, is the target's own matter: a region's are its dirty blocks, a Checkpointer's
//! what makes the next cut shorter. Both take their blocks from dirty maps of their own.
//!
//! Rounds are work for the background: their threads interrupt nobody when they are woken.
//!
//! Locks: the state of the loop is a leaf. No lock is held in a round.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::error::Error;
use crate::lock::{Condvar, Mutex, MutexGuard};
use crate::threads::{self, StoodBack};

/// When a target wants its next round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// After so long, or when it is asked for.
    In(Duration),
    /// When it is asked for.
    WhenAsked,
}

/// Where dirty blocks are copied in the background.
pub trait Target: Send + Sync {
    /// Copies something of what is dirty. There is one round of a target at a time. It must not panic: the process
    /// would end.
    fn round(&self) -> Next;
}

struct Place {
    number: u64,
    target: Arc<dyn Target>,
    due: Option<Instant>,
    in_a_round: bool,
}

#[derive(Default)]
struct State {
    places: Vec<Place>,
    last: u64,
}

impl State {
    fn place(&mut self, number: u64) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| place.number == number)
    }

    /// A target whose round is due, and its number; it is in a round from here on.
    fn take_due(&mut self, now: Instant) -> Option<(u64, Arc<dyn Target>)> {
        let due = |place: &&mut Place| !place.in_a_round && place.due.is_some_and(|due| due <= now);
        let place = self.places.iter_mut().find(due)?;
        place.in_a_round = true;
        place.due = None;
        Some((place.number, place.target.clone()))
    }

    /// When the next round is due, of those that are in none.
    fn next_due(&self) -> Option<Instant> {
        let waiting = self.places.iter().filter(|place| !place.in_a_round);
        waiting.filter_map(|place| place.due).min()
    }
}

/// The loop of an engine.
#[derive(Default)]
pub(crate) struct Drain {
    state: Mutex<State>,
    bell: Condvar,
}

impl Drain {
    pub(crate) fn start(&'static self, engine: &'static Engine) -> bool {
        threads::start("userfault-drain", 256 << 10, move || self.run(engine))
    }

    /// One more target; `first` is when its first round is due. Its number.
    pub(crate) fn add(&self, target: Arc<dyn Target>, first: Next) -> u64 {
        let mut state = self.state.lock();
        state.last += 1;
        let number = state.last;
        state.places.push(Place {
            number,
            target,
            due: due(first),
            in_a_round: false,
        });
        self.ring(state);
        number
    }

    /// No more rounds of a target begin.
    fn remove(&self, number: u64) {
        let mut state = self.state.lock();
        state.places.retain(|place| place.number != number);
    }

    /// Asks for a round now. If one is under way another one follows.
    pub(crate) fn ask(&self, number: u64) {
        let mut state = self.state.lock();
        let now = Instant::now();
        let Some(place) = state.place(number) else {
            return;
        };
        if place.due.is_some_and(|due| due <= now) {
            return;
        }
        place.due = Some(now);
        if !place.in_a_round {
            self.ring(state);
        }
    }

    fn ring(&self, state: MutexGuard<'_, State>) {
        drop(state);
        self.bell.notify_one();
    }

    fn run(&'static self, engine: &'static Engine) {
        let mut state = self.state.lock();
        loop {
            if let Some((number, target)) = state.take_due(Instant::now()) {
                drop(state);
                engine.errands.submit(
                    engine,
                    Box::new(move || {
                        let next = {
                            let _back = StoodBack::begin();
                            target.round()
                        };
                        drop(target);
                        self.ended(number, next);
                    }),
                );
                state = self.state.lock();
            } else if let Some(due) = state.next_due() {
                self.bell.wait_until(&mut state, due);
            } else {
                self.bell.wait(&mut state);
            }
        }
    }

    fn ended(&self, number: u64, next: Next) {
        let mut state = self.state.lock();
        // It may be gone by now.
        if let Some(place) = state.place(number) {
            place.in_a_round = false;
            // Asked for meanwhile: that was for now.
            place.due = place.due.or(due(next));
            self.ring(state);
        }
    }
}

fn due(next: Next) -> Option<Instant> {
    match next {
        Next::In(pause) => Some(Instant::now() + pause),
        Next::WhenAsked => None,
    }
}

/// A target of the drain, as long as this lives. A round that is under way at the end is not waited for.
pub struct Draining {
    engine: &'static Engine,
    number: u64,
}

/// Has the drain of this process copy for `target`, too; `first` is when it begins.
pub fn begin(target: Arc<dyn Target>, first: Next) -> Result<Draining, Error> {
    let engine = Engine::current()?;
    let number = engine.drain.add(target, first);
    Ok(Draining { engine, number })
}

impl Draining {
    /// Asks for a round now.
    pub fn ask(&self) {
        if self.is_ours() {
            self.engine.drain.ask(self.number);
        }
    }

    /// False in a forked child, where nothing of the parent's engine may be touched.
    fn is_ours(&self) -> bool {
        Engine::existing().is_some_and(|engine| std::ptr::eq(engine, self.engine))
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        if self.is_ours() {
            self.engine.drain.remove(self.number);
        }
    }
}
