//! Guarded memory: a block is saved before its first write after a cut.
//!
//! Unsafe: copies out of memory that threads may be writing.
//!
//! ```text
//!            cut: protect all                       first write
//!   open  ------------------->  protected, pending -------------> saved aside, open, dirty for all
//!     ^                              | background save
//!     |  first write                 v
//!     +------------------------- protected, saved
//! ```
//!
//! A block is open (unprotected) only if it counts as dirty for every consumer. So a cut takes the dirty
//! blocks of its consumer, protects everything in one call, and those blocks are *pending*: whoever comes
//! first, the background or a write, copies them. Saved blocks stay protected, so that the next write is
//! noticed. A block is *busy* while somebody copies it outside the lock.
//!
//! Whoever makes a cut stands still until it is over. A thread that writes meanwhile faults within microseconds, and
//! the thread that answers it is often woken on the processor of the one that cuts, for the writer's own is still
//! busy at that moment: it would copy 2 MiB there first, and the cut would last for milliseconds. So it is kept off
//! that processor (`elsewhere`), and first writes are *held* until the cut is over.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::lock::{Condvar, Mutex};
use userfault_uffd::abi::UFFDIO_WRITEPROTECT_MODE_WP;

use crate::dirty::DirtyMap;
use crate::elsewhere::Elsewhere;
use crate::engine::Engine;
use crate::error::Error;
use crate::memory::HUGE;
use crate::workers::Lead;

/// Where a block's old bytes go when a write does not wait for the background.
pub trait Aside: Send + Sync {
    /// Takes `len` bytes at `offset` of the guarded memory; `copy(offset, into)` copies a part of them.
    /// May wait for room. If it takes nothing, the cut must have been given up.
    fn take(&self, offset: usize, len: usize, copy: &dyn Fn(usize, &mut [u8]));
}

/// How saving the next pending block went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// This block (its number) was handed out.
    Block(usize),
    /// All that is pending is being saved by its writers, who may wait for room: make some, and ask again.
    Busy,
    /// Nothing is pending any more.
    All,
}

struct Consumer {
    id: u64,
    dirty: DirtyMap,
}

struct Cut {
    id: u64,
    consumer: u64,
    pending: DirtyMap,
    aside: Arc<dyn Aside>,
}

struct State {
    protected: DirtyMap,
    busy: DirtyMap,
    /// Busy blocks that somebody wants to write.
    waited: DirtyMap,
    consumers: Vec<Consumer>,
    cuts: Vec<Cut>,
    /// Cuts whose callers are not done yet: first writes are answered after them.
    held: usize,
}

/// First writes to a guard wait, unanswered, as long as this lives: for microseconds, while a cut comes to its end.
/// Whoever has one does not write to guarded memory.
pub struct Held<'a> {
    guard: &'a Guard,
    elsewhere: Option<Elsewhere>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // First, for a thread that goes on may start another, which may run where that one may.
        self.elsewhere = None;
        self.guard.state.lock().held -= 1;
        self.guard.changed.notify_all();
    }
}

/// A cut that has begun.
pub struct Begun<'a> {
    /// Its number.
    pub id: u64,
    /// The blocks that are pending.
    pub pending: Vec<Range<usize>>,
    /// To be dropped when whoever cuts goes on.
    pub held: Held<'a>,
}

/// The guard of a range of huge pages.
pub struct Guard {
    start: usize,
    len: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guard({:#x}, {} bytes)", self.start, self.len)
    }
}

static IDS: AtomicU64 = AtomicU64::new(1);

impl Guard {
    pub(super) fn new(start: usize, len: usize) -> Guard {
        let blocks = len / HUGE;
        Guard {
            start,
            len,
            state: Mutex::new(State {
                protected: DirtyMap::new(blocks),
                busy: DirtyMap::new(blocks),
                waited: DirtyMap::new(blocks),
                consumers: Vec::new(),
                cuts: Vec::new(),
                held: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn blocks(&self) -> usize {
        self.len / HUGE
    }

    /// Bytes of a block.
    pub fn block(&self) -> usize {
        HUGE
    }

    /// A new consumer, to whom everything is dirty. Returns its number.
    pub fn subscribe(&self) -> u64 {
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        let mut dirty = DirtyMap::new(self.blocks());
        dirty.insert(0..self.blocks());
        self.state.lock().consumers.push(Consumer { id, dirty });
        id
    }

    /// Forgets a consumer and its cut. Without consumers nothing is protected.
    pub fn unsubscribe(&self, id: u64) {
        let mut state = self.state.lock();
        state.consumers.retain(|consumer| consumer.id != id);
        state.cuts.retain(|cut| cut.consumer != id);
        if state.consumers.is_empty() {
            let protected = state.protected.runs(0..self.blocks());
            for run in protected {
                self.protect(run.start, run.len(), false);
            }
            state.protected.remove(0..self.blocks());
        }
        self.changed.notify_all();
    }

    /// Protects (or opens, and wakes) some blocks.
    fn protect(&self, block: usize, count: usize, on: bool) {
        let Some(uffd) = Engine::existing().and_then(|engine| engine.tracked.guard()) else {
            return;
        };
        let mode = if on { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        // It fails only if the program unmapped the memory, and then nobody writes to it.
        let _ = uffd.writeprotect(self.start + block * HUGE, count * HUGE, mode);
    }

    /// Begins a cut for a consumer: from its return on, the blocks that were dirty are pending, and none
    /// of them changes before it is saved. Fails if the memory is gone. A consumer has one cut at a time.
    pub fn cut(&self, consumer: u64, aside: Arc<dyn Aside>) -> Result<Begun<'_>, Error> {
        if !super::mapped(self.start, self.len) {
            return Err(Error::Invalid(format!(
                "the {} bytes of tracked memory at {:#x} were unmapped by the program",
                self.len, self.start
            )));
        }
        let mut held = Held {
            guard: self,
            elsewhere: None,
        };
        let mut state = self.state.lock();
        state.held += 1;
        // A block that is being copied for another cut is about to be opened.
        while state.busy.count() > 0 {
            self.changed.wait(&mut state);
        }
        debug_assert!(state.cuts.iter().all(|cut| cut.consumer != consumer));
        let mut pending = DirtyMap::new(self.blocks());
        if let Some(consumer) = state.consumers.iter_mut().find(|each| each.id == consumer) {
            std::mem::swap(&mut pending, &mut consumer.dirty);
        }
        held.elsewhere = Engine::existing()
            .and_then(|engine| engine.guards.leader())
            .and_then(Elsewhere::keep);
        self.protect(0, self.blocks(), true);
        state.protected.insert(0..self.blocks());
        let runs = pending.runs(0..self.blocks());
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        state.cuts.push(Cut {
            id,
            consumer,
            pending,
            aside,
        });
        drop(state);
        Ok(Begun {
            id,
            pending: runs,
            held,
        })
    }

    /// Saves the first pending block of a cut from `from` on: `save(offset, len, copy)` is called without a lock;
    /// writers of the block wait until it returns.
    pub fn save_next(
        &self,
        id: u64,
        from: usize,
        save: impl FnOnce(usize, usize, &dyn Fn(usize, &mut [u8])),
    ) -> Saved {
        let mut state = self.state.lock();
        let Some(cut) = state.cuts.iter().find(|cut| cut.id == id) else {
            return Saved::All;
        };
        let free = |blocks: Range<usize>| {
            cut.pending
                .runs(blocks)
                .into_iter()
                .flatten()
                .find(|block| !state.busy.contains(*block))
        };
        let Some(block) = free(from..self.blocks()).or_else(|| free(0..from.min(self.blocks())))
        else {
            return if cut.pending.count() > 0 {
                Saved::Busy
            } else {
                Saved::All
            };
        };
        state.busy.insert(block..block + 1);
        drop(state);
        save(block * HUGE, HUGE, &|offset, into| self.copy(offset, into));
        let mut state = self.state.lock();
        if let Some(cut) = state.cuts.iter_mut().find(|cut| cut.id == id) {
            cut.pending.remove(block..block + 1);
        }
        self.release(&mut state, block);
        Saved::Block(block)
    }

    /// Ends a copy. A writer that waited meanwhile is answered now, unless another cut wants the block.
    fn release(&self, state: &mut State, block: usize) {
        state.busy.remove(block..block + 1);
        let waited = state.waited.contains(block);
        state.waited.remove(block..block + 1);
        if waited {
            if state.cuts.iter().any(|cut| cut.pending.contains(block)) {
                // It asks again, and is then answered as a first write.
                self.wake(block);
            } else {
                self.open(state, block);
            }
        }
        self.changed.notify_all();
    }

    fn wake(&self, block: usize) {
        if let Some(uffd) = Engine::existing().and_then(|engine| engine.tracked.guard()) {
            let _ = uffd.wake(self.start + block * HUGE, HUGE);
        }
    }

    /// Lets writes through; the block is dirty for everybody from here on.
    fn open(&self, state: &mut State, block: usize) {
        for consumer in &mut state.consumers {
            consumer.dirty.insert(block..block + 1);
        }
        state.protected.remove(block..block + 1);
        self.protect(block, 1, false);
    }

    /// Answers a write to a protected block at `address`.
    pub(crate) fn first_write(&self, address: usize, lead: &mut Lead) {
        let block = (address - self.start) / HUGE;
        let mut state = self.state.lock();
        // The lead is kept: another thread would be woken in the way of the cut only to wait as well.
        while state.held > 0 {
            self.changed.wait(&mut state);
        }
        if !state.protected.contains(block) {
            // Opened since the message was sent.
            self.wake(block);
            return;
        }
        if state.busy.contains(block) {
            state.waited.insert(block..block + 1);
            return;
        }
        let wanting: Vec<(u64, Arc<dyn Aside>)> = state
            .cuts
            .iter()
            .filter(|cut| cut.pending.contains(block))
            .map(|cut| (cut.id, cut.aside.clone()))
            .collect();
        if !wanting.is_empty() {
            state.busy.insert(block..block + 1);
            drop(state);
            // Room for the old bytes may have to be waited for.
            lead.give_up();
            for (_, aside) in &wanting {
                aside.take(block * HUGE, HUGE, &|offset, into| self.copy(offset, into));
            }
            state = self.state.lock();
            for (id, _) in &wanting {
                if let Some(cut) = state.cuts.iter_mut().find(|cut| cut.id == *id) {
                    cut.pending.remove(block..block + 1);
                }
            }
            state.busy.remove(block..block + 1);
            state.waited.remove(block..block + 1);
        }
        self.open(&mut state, block);
        self.changed.notify_all();
    }

    /// Ends a cut. What was not saved is dirty again, and writes to it pass without being saved.
    pub fn end(&self, id: u64) {
        let mut state = self.state.lock();
        let Some(at) = state.cuts.iter().position(|cut| cut.id == id) else {
            return;
        };
        let cut = state.cuts.swap_remove(at);
        if let Some(consumer) = state
            .consumers
            .iter_mut()
            .find(|each| each.id == cut.consumer)
        {
            for run in cut.pending.runs(0..self.blocks()) {
                consumer.dirty.insert(run);
            }
        }
        self.changed.notify_all();
    }

    /// Makes blocks dirty for a consumer again: what was saved of them is lost.
    pub fn put_back(&self, id: u64, blocks: Range<usize>) {
        let mut state = self.state.lock();
        if let Some(consumer) = state.consumers.iter_mut().find(|each| each.id == id) {
            consumer.dirty.insert(blocks);
        }
    }

    /// Copies bytes of a protected block out.
    fn copy(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= self.len);
        // SAFETY: in bounds of memory that its owner keeps mapped. The block is protected and busy, so
        // nobody writes to it before the copy is done; reading does not disturb the program.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (self.start + offset) as *const u8,
                into.as_mut_ptr(),
                into.len(),
            )
        }
    }
}
