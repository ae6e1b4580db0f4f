//! Time: fills that wait, and reads that never come back.
//!
//! Every open fault has a deadline. A read that has not come back when the region's `retry_for` ends is
//! given up here, by a thread that never waits for a store: the block is poisoned, its toucher gets
//! SIGBUS, and the memory of the read is not used again until the read has come back.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::lock::{Condvar, Mutex};

use crate::block::State;
use crate::body::Body;
use crate::engine::Engine;
use crate::fill::Filling;
use crate::poison;
use crate::threads;
use crate::workers::Task;

/// How often watched reads are looked at.
const TICK: Duration = Duration::from_millis(20);

/// How often the sleepers on owned blocks are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A read that may hang.
pub(crate) struct Watched {
    body: Arc<Body>,
    block: u32,
    ticket: u64,
    deadline: Instant,
    /// No thread waits for it.
    in_flight: bool,
}

/// The place for one read: that a thread is in, or that is in flight.
pub(crate) type Slot = Arc<Mutex<Option<Watched>>>;

thread_local! {
    static SLOT: RefCell<Option<(u32, Slot)>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Waiting {
    deferred: Vec<(Instant, Filling)>,
    slots: Vec<Slot>,
    /// Blocks that somebody sleeps on while an owner without a deadline has them.
    owned: Vec<(Arc<Body>, u32)>,
    asleep: bool,
}

/// The clock of the engine.
#[derive(Default)]
pub(crate) struct Clock {
    waiting: Mutex<Waiting>,
    ring: Condvar,
}

/// Ends the watch over a read.
pub(crate) struct Watch {
    slot: Slot,
    block: u32,
    ticket: u64,
    in_flight: bool,
}

impl Watch {
    /// True if the read came back in time: the block is still ours.
    pub(crate) fn end(self, body: &Body) -> bool {
        *self.slot.lock() = None;
        let mut table = body.lock();
        if table.reads.get(&self.block) == Some(&self.ticket) {
            table.reads.remove(&self.block);
            table.fills.flying -= usize::from(self.in_flight);
            return true;
        }
        false
    }
}

impl Clock {
    pub(crate) fn start(&self, engine: &'static Engine) -> bool {
        threads::start("userfault-clock", 128 << 10, move || {
            engine.clock.run(engine);
        })
    }

    /// Tries a fill again after `pause`.
    pub(crate) fn defer(&self, filling: Filling, pause: Duration) {
        let mut waiting = self.waiting.lock();
        waiting.deferred.push((Instant::now() + pause, filling));
        drop(waiting);
        self.ring.notify_one();
    }

    /// Watches the sleepers on a block that has an owner.
    pub(crate) fn watch_sleepers(&self, body: &Arc<Body>, block: u32) {
        let mut waiting = self.waiting.lock();
        waiting.owned.push((body.clone(), block));
        if waiting.asleep {
            self.ring.notify_one();
        }
    }

    /// Watches the read that this thread begins now.
    pub(crate) fn watch(
        &self,
        engine: &Engine,
        body: &Arc<Body>,
        block: u32,
        deadline: Instant,
    ) -> Watch {
        let generation = crate::fork::generation();
        let slot = SLOT.with_borrow_mut(|mine| match mine {
            Some((of, slot)) if *of == generation => slot.clone(),
            _ => {
                let slot = self.slot();
                *mine = Some((generation, slot.clone()));
                slot
            }
        });
        self.watch_in(&slot, engine, (body, block), deadline, false)
    }

    /// A place for reads, one after the other.
    pub(crate) fn slot(&self) -> Slot {
        let slot = Slot::default();
        self.waiting.lock().slots.push(slot.clone());
        slot
    }

    /// Watches a read that begins now, in a place of its own.
    pub(crate) fn watch_in(
        &self,
        slot: &Slot,
        engine: &Engine,
        (body, block): (&Arc<Body>, u32),
        deadline: Instant,
        in_flight: bool,
    ) -> Watch {
        let ticket = engine.tickets.fetch_add(1, Ordering::Relaxed);
        {
            let mut table = body.lock();
            table.reads.insert(block, ticket);
            table.fills.flying += usize::from(in_flight);
        }
        *slot.lock() = Some(Watched {
            body: body.clone(),
            block,
            ticket,
            deadline,
            in_flight,
        });
        if self.waiting.lock().asleep {
            self.ring.notify_one();
        }
        Watch {
            slot: slot.clone(),
            block,
            ticket,
            in_flight,
        }
    }

    fn run(&self, engine: &'static Engine) {
        let mut waiting = self.waiting.lock();
        let mut look = Instant::now();
        loop {
            let now = Instant::now();
            let mut due = Vec::new();
            let mut next = now + Duration::from_secs(3600);
            let mut index = 0;
            while index < waiting.deferred.len() {
                if waiting.deferred[index].0 <= now {
                    // In order of arrival: whoever waits longest is tried first.
                    due.push(waiting.deferred.remove(index).1);
                } else {
                    next = next.min(waiting.deferred[index].0);
                    index += 1;
                }
            }
            let mut late = Vec::new();
            let mut watching = false;
            // A slot that only this list knows belongs to a thread that has ended.
            waiting.slots.retain(|slot| Arc::strong_count(slot) > 1);
            for slot in &waiting.slots {
                let mut slot = slot.lock();
                watching |= slot.is_some();
                if slot.as_ref().is_some_and(|watched| watched.deadline <= now) {
                    late.extend(slot.take());
                }
            }
            if watching {
                next = next.min(now + TICK);
            }
            if !waiting.owned.is_empty() {
                if now >= look {
                    let owned = std::mem::take(&mut waiting.owned);
                    // The tables' locks come before this one.
                    drop(waiting);
                    let kept: Vec<_> = owned
                        .into_iter()
                        .filter(|(body, block)| sleepers_wait(engine, body, *block))
                        .collect();
                    waiting = self.waiting.lock();
                    waiting.owned.extend(kept);
                    look = Instant::now() + LOOK;
                }
                next = next.min(look);
            }
            if !due.is_empty() || !late.is_empty() {
                drop(waiting);
                for filling in due {
                    engine.workers.submit(engine, Task::Fill(filling));
                }
                for watched in late {
                    give_up(engine, &watched);
                }
                waiting = self.waiting.lock();
                continue;
            }
            waiting.asleep = !watching;
            self.ring.wait_until(&mut waiting, next);
            waiting.asleep = false;
            if watching {
                // Reads are given to the kernel once they are watched. The queues' locks are leaves, as this one is.
                drop(waiting);
                engine.workers.relieve(engine);
                engine.touches.relieve(engine);
                waiting = self.waiting.lock();
            }
        }
    }
}

/// True as long as somebody sleeps on an owned block. Once that has taken too long, the store does not come
/// back from a write: the sleepers get SIGBUS, and poison lies over the block until it does. The block
/// stays its owner's, with all its bytes.
fn sleepers_wait(engine: &Engine, body: &Body, block: u32) -> bool {
    let mut table = body.lock();
    match table.waiting(block) {
        None => return false,
        Some(waited) if waited < body.retry_for => return true,
        Some(_) => {}
    }
    table.give_up_sleepers(block);
    // A handler of SIGBUS reads by itself; every other read has a deadline of its own.
    let what = if table.state(block) == State::Filling {
        "read"
    } else {
        "write"
    };
    let cause = format!(
        "the {what} under way has not come back after {:?}",
        body.retry_for
    );
    poison::tell_sleepers(body, &mut table, block, &cause);
    if body.writable() && matches!(table.state(block), State::Cleaning | State::Writing) {
        // What is mapped of it loses its protection below, and with it the evidence.
        table.mark_dirty(body.pages(block));
    }
    let _ = engine.poison(body, &mut table, block);
    drop(table);
    engine.wake(body, block);
    false
}

/// Takes a block away from a read that does not come back.
fn give_up(engine: &'static Engine, watched: &Watched) {
    let (body, block) = (&watched.body, watched.block);
    {
        let mut table = body.lock();
        if table.reads.get(&block) != Some(&watched.ticket) {
            return;
        }
        table.reads.remove(&block);
        table.hung.insert(block, watched.ticket);
        // Before the read can come back and be taken off again.
        engine.note_hung(true);
        table.turn_into(block, State::Poisoning);
        // The thread is lost, its place is not. What was in flight took none.
        table.fills.flying -= usize::from(watched.in_flight);
        engine.fill_ended(body, &mut table);
    }
    let waited = body.retry_for;
    let cause = io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the read has not come back after {waited:?}"),
    );
    poison::give_up(engine, body, block, &cause);
}
