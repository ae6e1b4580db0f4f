//! What a handler of SIGBUS does to a pool: nothing here allocates (see `inline`).
//!
//! The queues grow in ordinary code alone. A handler first takes a promise that its block will find a place;
//! when the queues have too little room for all promises, it hands its fault over, and the thread that answers
//! it makes them grow.

use super::{BLOCKS_TO_RUN, Pool, PoolState};
use crate::policy::{Memo, Queue, Seat};

/// Places that are kept free for handlers.
const PLACES: usize = 256;

/// Threads that are kept places for.
const THREADS: usize = 64;

/// The share of a limit that is kept free, and its bound in bytes.
const HEADROOM: (u64, u64) = (64, 4 << 20);

/// What came of asking for room.
pub(crate) struct Taken {
    /// The room is taken.
    pub(crate) ok: bool,
    /// Little is left.
    pub(crate) low: bool,
    /// There is none, and some is being made.
    pub(crate) soon: bool,
    /// The limit that holds, bytes.
    pub(crate) limit: u64,
}

impl PoolState {
    /// Bytes that should be free. A pool of few blocks keeps them all.
    fn headroom(&self) -> u64 {
        let limit = self.effective();
        if limit < 4 * HEADROOM.0 * self.to_run() / BLOCKS_TO_RUN as u64 {
            return 0;
        }
        (limit / HEADROOM.0).min(HEADROOM.1)
    }

    fn free(&self) -> u64 {
        self.effective().saturating_sub(self.used + self.charged)
    }

    /// True if one more promise can be kept without growing.
    fn can_promise(&self, thread: u32) -> bool {
        self.policy.has_places(self.promised + 1)
            && (self.threads.contains_key(&thread) || self.threads.len() < self.threads.capacity())
    }

    /// Makes the queues grow before a handler finds them full.
    pub(super) fn keep_places(&mut self) {
        if !self.in_handlers {
            return;
        }
        self.policy.keep_places(self.promised + PLACES);
        if self.threads.capacity() - self.threads.len() < THREADS {
            self.threads.reserve(THREADS);
        }
    }
}

impl Pool {
    /// From here on handlers use this pool, too.
    pub(crate) fn prepare_for_handlers(&self) {
        let mut state = self.state.lock();
        state.in_handlers = true;
        state.keep_places();
    }

    /// Takes `bytes` if the limit leaves them, and with `seat_for` the promise of a place in the queues.
    pub(crate) fn reserve_in_handler(&self, bytes: u64, seat_for: Option<u32>) -> Taken {
        let mut state = self.state.lock_in_handler();
        let limit = state.effective();
        let fits = bytes == 0 || state.used + state.charged + bytes <= limit;
        let ok = fits && seat_for.is_none_or(|thread| state.can_promise(thread));
        if ok {
            state.used += bytes;
            state.promised += usize::from(seat_for.is_some());
        }
        let low = !fits || (bytes > 0 && state.free() < state.headroom() / 2);
        let soon = !fits && state.headroom() > 0;
        Taken {
            ok,
            low,
            soon,
            limit,
        }
    }

    /// Gives back what [`Pool::reserve_in_handler`] took.
    pub(crate) fn give_back_in_handler(&self, bytes: u64, promised: bool) {
        let mut state = self.state.lock_in_handler();
        state.used = state.used.saturating_sub(bytes);
        state.promised -= usize::from(promised);
    }

    /// As `charge` for more than 0 bytes, else as `discharge`.
    pub(crate) fn charge_in_handler(&self, bytes: i64) {
        let mut state = self.state.lock_in_handler();
        state.charged = state.charged.saturating_add_signed(bytes);
    }

    /// Puts a block that was just mapped into the place that was promised, by what the policy makes of its
    /// memo; its new one. `rested`: it was in memory.
    pub(crate) fn seat_in_handler(
        &self,
        memo: Memo,
        rested: bool,
        seat: Seat,
        bytes: usize,
        now: u32,
        thread: u32,
    ) -> Memo {
        let mut state = self.state.lock_in_handler();
        state.promised -= 1;
        let memo = if rested {
            state.policy.came_back(memo)
        } else {
            state.policy.brought_in(memo)
        };
        let queue = Queue::Mapped(memo.rank());
        state.policy.join(queue, seat, bytes as u32, now);
        state.note_given(thread, seat, now);
        memo
    }

    /// True if more should be free for handlers than is.
    pub(crate) fn wants_headroom(&self) -> bool {
        let state = self.state.lock();
        state.free() < state.headroom()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Rank;

    #[test]
    fn nothing_grows_while_handlers_seat_blocks() {
        let pool = Pool::new(1 << 30);
        pool.admit(4096);
        pool.prepare_for_handlers();
        let places = || {
            let state = pool.state.lock();
            let places = (0..)
                .find(|more| !state.policy.has_places(more + 1))
                .unwrap();
            (places + state.policy.mapped(), state.threads.capacity())
        };
        let before = places();
        let mut seated = 0;
        while pool.reserve_in_handler(4096, Some(seated % 300)).ok {
            let seat = Seat {
                region: 1,
                block: seated,
            };
            pool.seat_in_handler(Memo::default(), false, seat, 4096, 0, seated % 300);
            seated += 1;
            assert_eq!(places(), before);
        }
        assert!(seated as usize >= THREADS, "{seated}");
        let ordinary = Seat {
            region: 1,
            block: seated,
        };
        pool.seat(Queue::Mapped(Rank::New), ordinary, 4096, 0, None);
        assert!(
            pool.reserve_in_handler(4096, Some(1000)).ok,
            "ordinary code has made room"
        );
    }

    #[test]
    fn promises_are_counted_before_they_are_kept() {
        let pool = Pool::new(1 << 30);
        pool.admit(4096);
        pool.prepare_for_handlers();
        let room = {
            let state = pool.state.lock();
            (0..)
                .find(|more| !state.policy.has_places(more + 1))
                .unwrap()
        };
        for _ in 0..room {
            assert!(pool.reserve_in_handler(4096, Some(1)).ok);
        }
        assert!(!pool.reserve_in_handler(4096, Some(1)).ok);
        pool.give_back_in_handler(4096, true);
        assert!(pool.reserve_in_handler(4096, Some(1)).ok);
    }

    #[test]
    fn a_pool_that_fills_up_says_so_before_it_is_full_and_a_small_one_is_used_whole() {
        let pool = Pool::new(64 << 20);
        pool.admit(4096);
        pool.prepare_for_handlers();
        assert!(!pool.reserve_in_handler(62 << 20, None).low);
        assert!(pool.reserve_in_handler(2 << 20, None).low);
        let small = Pool::new(16 * 4096);
        small.admit(4096);
        for _ in 0..16 {
            assert!(!small.reserve_in_handler(4096, None).low);
        }
        let full = small.reserve_in_handler(4096, None);
        assert!(!full.ok && full.low);
    }
}
