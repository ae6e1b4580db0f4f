//! Bringing in what nobody has asked for yet: what a walk will touch next, and what a program wants to be there.

use std::sync::Arc;
use std::time::Instant;

use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::fill::Filling;
use crate::readahead::{LONGEST_WINDOW, WINDOW_SHARE, Window};
use crate::trace::Kind;
use crate::workers::{Lead, Task};

/// Runs of blocks smaller than this are announced to the store before they are read, bytes: it fetches them at
/// one go. Larger ones are worth a read of their own.
const FETCHED_BELOW: usize = 128 << 10;

/// Parts of a window that do not come at one go, one after the other, before the rest is not tried to any more: the
/// store has none ready, or there is no room.
const TRIED_IN_VAIN: u32 = 3;

/// Bytes that are pushed in one go.
const PUSHED: u64 = 4 << 20;

impl Engine {
    /// Asks for what the walk of `thread` will touch next, if its fault on `block` belongs to one.
    pub(crate) fn look_ahead(&'static self, body: &Arc<Body>, block: u32, thread: u32) {
        let longest = || longest_window(body, self.pool_of(body).figures().limit);
        let window = body.walked(thread, block, longest);
        if let Some(window) = window {
            self.submit_ahead(body, window);
        }
    }

    /// Has a window brought in.
    pub(crate) fn submit_ahead(&'static self, body: &Arc<Body>, window: Window) {
        // A run of small blocks is fetched at one go, and then taken apart.
        if window.count < 2 || (window.step.abs() == 1 && body.block < FETCHED_BELOW) {
            self.workers.submit(self, Task::Ahead(body.clone(), window));
            return;
        }
        // Two readers keep a store busy while the walker computes; more would only take its processor.
        for half in 0..2 {
            let part = Window {
                first: window.first + half * window.step,
                step: window.step * 2,
                count: (window.count + 1 - half as u32) / 2,
            };
            self.workers.submit(self, Task::Ahead(body.clone(), part));
        }
    }

    /// Brings in a window of what is absent from a block on, and goes on behind whatever else is to be done.
    pub(crate) fn push(&'static self, body: Arc<Body>, from: u32, lead: &mut Lead) {
        let count = (PUSHED / body.block as u64).max(1) as u32;
        let window = Window {
            first: i64::from(from),
            step: 1,
            count,
        };
        self.bring_in_ahead(&body, window, lead);
        let next = from.saturating_add(count);
        if next < body.all_blocks() && !body.lock().closed {
            self.workers.submit(self, Task::Push(body, next));
        }
    }

    pub(crate) fn bring_in_ahead(&'static self, body: &Arc<Body>, window: Window, lead: &mut Lead) {
        let blocks = window.blocks(body.all_blocks());
        if window.step.abs() != 1 || body.block >= FETCHED_BELOW || blocks.is_empty() {
            return self.bring_in_each(body, window, lead);
        }
        let offset = body.store_offset + body.start(blocks.start) as u64;
        let len = blocks.len() as u64 * body.block as u64;
        let fetched = body.store.0.will_read(offset, len);
        self.bring_in_neighbours(body, window, lead);
        if fetched {
            body.store.0.was_read(offset, len);
        }
    }

    /// Brings in a walk over neighbours, as many as may be at one go.
    fn bring_in_neighbours(&'static self, body: &Arc<Body>, window: Window, lead: &mut Lead) {
        let longest = self.convoy(body);
        let (mut from, mut in_vain) = (0, 0);
        while from < window.count {
            let part = Window {
                first: window.first + i64::from(from) * window.step,
                count: longest.clamp(1, window.count - from),
                ..window
            };
            from += part.count;
            let last = Window {
                first: part.last(),
                count: 1,
                ..part
            };
            let come = part.count > 1
                && in_vain < TRIED_IN_VAIN
                && (self.bring_in_convoy(body, part.blocks(body.all_blocks()), lead) || {
                    // The store has them on their way: when the last is there the others are.
                    self.bring_in_each(body, last, lead);
                    self.bring_in_convoy(body, part.blocks(body.all_blocks()), lead)
                });
            if come {
                in_vain = 0;
            } else {
                in_vain += 1;
                self.bring_in_each(body, part, lead);
            }
        }
    }

    fn bring_in_each(&'static self, body: &Arc<Body>, window: Window, lead: &mut Lead) {
        for index in 0..i64::from(window.count) {
            let Ok(block) = u32::try_from(window.first + index * window.step) else {
                return;
            };
            if block >= body.all_blocks() {
                return;
            }
            let claimed = {
                let mut table = body.lock();
                table.state(block) == State::Absent && table.claim(block, Purpose::Fill)
            };
            if claimed {
                self.trace(Kind::Ahead, body, block, 0);
                self.fill(Filling::ahead(body.clone(), block), lead);
            }
        }
    }

    /// Asks for a block on behalf of nobody who sleeps on it. The block must have been claimed for Fill.
    pub(crate) fn submit_fill(&'static self, body: &Arc<Body>, block: u32) {
        self.trace(Kind::Ahead, body, block, 0);
        let filling = Filling::new(body.clone(), block, 0, Instant::now());
        self.workers.submit(self, Task::Fill(filling));
    }
}

/// The longest window that a limit of so many bytes allows, in blocks.
pub(crate) fn longest_window(body: &Body, limit: u64) -> u32 {
    ((limit / WINDOW_SHARE).min(LONGEST_WINDOW) / body.block as u64) as u32
}
