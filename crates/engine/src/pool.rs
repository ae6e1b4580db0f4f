//! Residency: what a limit pays for, and that everybody gets on.
//!
//! A pool is a limit with the queues of the blocks that it pays for. Who leaves next is the [`Policy`]'s answer,
//! which knows nothing of limits and threads; that whoever faults gets on when memory is short is this file's
//! matter. The lock is a leaf: nothing else is taken while it is held.
//!
//! When memory is short, faulting threads take turns ([`Turn`]): one instruction can need four blocks at
//! once, and a block that is taken away before its thread has moved on makes no progress for anybody.

mod in_handler;

pub(crate) use in_handler::Taken;

use std::collections::{BTreeMap, HashMap};

use crate::defects::{Defect, put_back};
use crate::futex::Lock;
use crate::policy::{Entry, Memo, Policy, Queue, Seat};

/// Blocks that one instruction may need at once: a copy whose both ends straddle two blocks.
pub const BLOCKS_TO_RUN: usize = 4;

/// Blocks that a thread should have to go on for a while: those that one instruction needs, and the next ones.
const BLOCKS_TO_WALK: usize = 2 * BLOCKS_TO_RUN;

/// How long a block just mapped is kept for its thread when memory is short, milliseconds. Long enough
/// for a woken thread to get a processor on a busy machine.
pub const GRACE_MS: u32 = 6;

/// A thread that was given no block for so long does not count as one that faults, milliseconds.
const ACTIVE_MS: u32 = 100;

/// Threads that are remembered before those that stopped are forgotten.
const MOST_ACTIVE: usize = 1024;

/// For how long resting blocks that could not leave are passed over, milliseconds. Then one fault looks at all of them.
const STUCK_MS: u32 = 100;

/// Neighbours that are unmapped together, bytes at most, and the part of the limit: one in so many. To unmap interrupts
/// every processor on which the program runs, 15 to 20 us for a page on a virtual machine, and a walk over small blocks
/// leaves as it came, in a row.
const TOGETHER: (u64, u64) = (128 << 10, 64);

/// How many of a queue are looked at for a neighbour: two walks, or two parts of one, come in between each other.
const NEAR: usize = 64;

/// The thread whose turn it is while memory is short.
#[derive(Debug, Clone)]
struct Turn {
    thread: u32,
    last: u32,
    seats: Vec<Seat>,
}

/// What to do to make room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// Unmap so many blocks from this one on; they then rest.
    Zap(Seat, u32),
    /// Release this resting block from memory.
    Release(Seat),
    /// Nothing can leave now: try again a little later.
    NotNow,
}

/// The queues of a pool.
#[derive(Debug, Default)]
pub struct PoolState {
    /// True if handlers of SIGBUS use the pool: then the queues always have room to spare.
    in_handlers: bool,
    /// Places in the queues that handlers count on.
    promised: usize,
    limit: u64,
    /// Bytes of blocks.
    used: u64,
    /// Bytes of what blocks need beside themselves: counted, but never refused.
    charged: u64,
    pinned: u64,
    /// Block sizes of the regions in the pool, with their numbers: the largest one says what is the
    /// smallest limit that can work.
    sizes: BTreeMap<u64, usize>,
    policy: Policy,
    turn: Option<Turn>,
    /// When each thread was last given a block, for those that were given one lately.
    threads: HashMap<u32, u32>,
    /// Who was given one last, and when: most often it is the same thread in the same millisecond.
    given_last: Option<(u32, u32)>,
    /// Faults that wait for memory.
    waiting: usize,
    /// When memory was refused last that the limit leaves: by a control group, or by the kernel.
    refused: Option<u32>,
    /// Resting blocks that could not leave one after the other, and when the first of them could not.
    stuck: (usize, u32),
}

/// A limit with its queues.
#[derive(Debug, Default)]
pub struct Pool {
    state: Lock<PoolState>,
}

impl PoolState {
    /// Bytes of as many of the largest blocks as one instruction may need.
    fn to_run(&self) -> u64 {
        let largest = self.sizes.last_key_value().map_or(0, |(size, _)| *size);
        if put_back(Defect::OneBlockIsEnough) {
            return largest;
        }
        BLOCKS_TO_RUN as u64 * largest
    }

    /// The limit that holds: what was asked, or what is needed to run at all. What is charged beside the
    /// blocks must not eat up the last four of them.
    fn effective(&self) -> u64 {
        self.limit.max(self.pinned + self.to_run() + self.charged)
    }

    /// Chooses who leaves, for a fault of `thread` at time `now` (milliseconds).
    ///
    /// `passed` resting blocks have been named in vain by now, for this fault: when those are all, blocks leave
    /// that are mapped, or else blocks that cannot be written back would keep the clean ones from leaving.
    pub fn choose(&mut self, thread: u32, now: u32, passed: usize) -> Victim {
        let stuck = passed >= self.policy.resting();
        let Some(queue) = self.policy.next(self.effective(), stuck) else {
            return Victim::NotNow;
        };
        let young = self
            .policy
            .front(queue)
            .is_some_and(|entry| now.wrapping_sub(entry.at) < GRACE_MS);
        if queue != Queue::Resting && young && self.short(now, 0, BLOCKS_TO_RUN) {
            return self.choose_by_turn(thread, now);
        }
        let Some(entry) = self.policy.take(queue) else {
            return Victim::NotNow;
        };
        match queue {
            Queue::Resting => Victim::Release(entry.seat),
            // Where the resting ones cannot leave each is released before the next is unmapped.
            Queue::Mapped(_) if passed > 0 => Victim::Zap(entry.seat, 1),
            Queue::Mapped(_) => self.with_neighbours(queue, entry, now),
        }
    }

    /// The neighbours of a block that leaves which would soon be next, too.
    fn with_neighbours(&mut self, queue: Queue, first: Entry, now: u32) -> Victim {
        let most = TOGETHER.0.min(self.effective() / TOGETHER.1);
        let (region, mut blocks) = (first.seat.region, first.seat.block..first.seat.block + 1);
        let mut bytes = u64::from(first.bytes);
        loop {
            let next = self.policy.take_near(queue, NEAR, |entry| {
                let block = entry.seat.block;
                // Backward walks are walks.
                entry.seat.region == region
                    && (block == blocks.end || block + 1 == blocks.start)
                    && bytes + u64::from(entry.bytes) <= most
                    && now.wrapping_sub(entry.at) >= GRACE_MS
            });
            let Some(next) = next else {
                let block = blocks.start;
                return Victim::Zap(Seat { region, block }, blocks.end - blocks.start);
            };
            bytes += u64::from(next.bytes);
            blocks.start = blocks.start.min(next.seat.block);
            blocks.end = blocks.end.max(next.seat.block + 1);
        }
    }

    /// True if the blocks in memory are too few for every thread that faults to have so many. `more` threads
    /// fault beside those that were given a block lately.
    fn short(&mut self, now: u32, more: usize, each: usize) -> bool {
        self.too_few(self.policy.mapped(), now, more, each)
    }

    fn too_few(&mut self, blocks: usize, now: u32, more: usize, each: usize) -> bool {
        if blocks <= each * (self.threads.len() + more + 1) {
            self.threads
                .retain(|_, last| now.wrapping_sub(*last) < ACTIVE_MS);
        }
        blocks <= each * (self.threads.len() + more + 1)
    }

    /// Memory is short: even the oldest block is young. Only the thread whose turn it is may take one,
    /// and never one that it was given in this turn.
    fn choose_by_turn(&mut self, thread: u32, now: u32) -> Victim {
        let over = match &self.turn {
            None => true,
            Some(turn) => {
                now.wrapping_sub(turn.last) >= GRACE_MS || turn.seats.len() >= BLOCKS_TO_RUN
            }
        };
        let mine = self.turn.as_ref().is_some_and(|turn| turn.thread == thread);
        if over && mine && self.waiting > 1 {
            // It has had its four blocks and asks for a fifth: it has moved on, others are next.
            self.turn = None;
            return Victim::NotNow;
        }
        if over {
            self.turn = Some(Turn {
                thread,
                last: now,
                seats: Vec::with_capacity(BLOCKS_TO_RUN),
            });
        } else if !mine {
            return Victim::NotNow;
        }
        let kept = self
            .turn
            .as_ref()
            .map(|turn| turn.seats.clone())
            .unwrap_or_default();
        self.policy
            .take_mapped(64, |seat| !kept.contains(&seat))
            .map_or(Victim::NotNow, |entry| Victim::Zap(entry.seat, 1))
    }

    fn entries(&self) -> usize {
        self.policy.mapped() + self.policy.resting()
    }

    /// As [`Pool::seat`].
    fn seat(
        &mut self,
        queue: Queue,
        seat: Seat,
        bytes: usize,
        now: u32,
        given: Option<u32>,
    ) -> Queues {
        self.policy.join(queue, seat, bytes as u32, now);
        self.keep_places();
        if let Some(thread) = given {
            if self.threads.len() >= MOST_ACTIVE {
                self.threads
                    .retain(|_, last| now.wrapping_sub(*last) < ACTIVE_MS);
            }
            self.note_given(thread, seat, now);
        }
        Queues {
            entries: self.entries(),
            limit: self.effective(),
        }
    }

    /// Notes that `thread` was given a block. Does not allocate if the thread is known.
    fn note_given(&mut self, thread: u32, seat: Seat, now: u32) {
        if self.given_last != Some((thread, now)) {
            self.threads.insert(thread, now);
            self.given_last = Some((thread, now));
        }
        if let Some(turn) = &mut self.turn
            && turn.thread == thread
        {
            turn.last = now;
            // Its four blocks are what is looked at; there is room for no more.
            if turn.seats.len() < turn.seats.capacity() {
                turn.seats.push(seat);
            }
        }
    }
}

/// The queues of a pool when a block has got a place in one.
#[derive(Debug, Clone, Copy)]
pub struct Queues {
    /// Entries in all of them.
    pub entries: usize,
    /// The limit that holds, bytes.
    pub limit: u64,
}

/// Figures of a pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolFigures {
    /// The limit that holds, bytes.
    pub limit: u64,
    /// Bytes in use.
    pub used: u64,
}

impl Pool {
    /// A pool with a limit in bytes.
    pub fn new(limit: u64) -> Pool {
        Pool {
            state: Lock::new(PoolState {
                limit,
                ..PoolState::default()
            }),
        }
    }

    /// Changes the limit; the old one is returned. Nothing leaves before room is asked for.
    pub fn set_limit(&self, limit: u64) -> u64 {
        std::mem::replace(&mut self.state.lock().limit, limit)
    }

    /// Notes the block size of a region that joins.
    pub fn admit(&self, block: u64) {
        *self.state.lock().sizes.entry(block).or_default() += 1;
    }

    /// Forgets the block size of a region that leaves.
    pub fn dismiss(&self, block: u64) {
        let mut state = self.state.lock();
        if let Some(regions) = state.sizes.get_mut(&block) {
            *regions -= 1;
            if *regions == 0 {
                state.sizes.remove(&block);
            }
        }
    }

    /// Limit and use.
    pub fn figures(&self) -> PoolFigures {
        let state = self.state.lock();
        PoolFigures {
            limit: state.effective(),
            used: state.used + state.charged,
        }
    }

    /// Takes `bytes` if the limit leaves them.
    pub fn reserve(&self, bytes: u64) -> bool {
        let mut state = self.state.lock();
        if state.used + state.charged + bytes > state.effective() {
            return false;
        }
        state.used += bytes;
        true
    }

    /// Takes `bytes` whatever the limit says: what is counted, but cannot be refused.
    pub fn charge(&self, bytes: u64) {
        self.state.lock().charged += bytes;
    }

    /// Gives back what was charged.
    pub fn discharge(&self, bytes: u64) {
        let mut state = self.state.lock();
        debug_assert!(state.charged >= bytes);
        state.charged = state.charged.saturating_sub(bytes);
    }

    /// Gives `bytes` back.
    pub fn give_back(&self, bytes: u64) {
        let mut state = self.state.lock();
        debug_assert!(state.used >= bytes);
        state.used = state.used.saturating_sub(bytes);
    }

    /// True if more is in use than the limit allows.
    pub fn over(&self) -> bool {
        let state = self.state.lock();
        state.used + state.charged > state.effective()
    }

    /// Notes that memory was refused that the limit leaves: for a moment the pool counts as full.
    pub fn refuse(&self, now: u32) {
        self.state.lock().refused = Some(now);
    }

    /// True if hardly anything is left of the limit, or what is left was refused a moment ago.
    pub fn is_full(&self, now: u32) -> bool {
        let state = self.state.lock();
        let (limit, used) = (state.effective(), state.used + state.charged);
        used > limit - limit / 8
            || state
                .refused
                .is_some_and(|last| now.wrapping_sub(last) < ACTIVE_MS)
    }

    /// True if the blocks in memory are too few for every thread that faults to go on for a while. `waiting` fault
    /// beside those that were given a block lately. `most` blocks are all that can be in memory, if that is known.
    pub fn has_few(&self, now: u32, waiting: usize, most: Option<usize>) -> bool {
        let mut state = self.state.lock();
        let blocks = most.unwrap_or(state.policy.mapped());
        state.too_few(blocks, now, waiting, BLOCKS_TO_WALK)
    }

    /// Who leaves next, for a fault of `thread`.
    pub fn choose(&self, thread: u32, now: u32, passed: usize) -> Victim {
        self.state.lock().choose(thread, now, passed)
    }

    /// How many resting blocks were found a moment ago that could not leave, since their store refuses them: who
    /// looks for room need not find out again, for there may be a hundred thousand.
    pub fn stuck(&self, now: u32) -> usize {
        let (count, since) = self.state.lock().stuck;
        if now.wrapping_sub(since) < STUCK_MS {
            count
        } else {
            0
        }
    }

    /// Notes that by now so many resting blocks could not leave, one after the other.
    pub fn found_stuck(&self, count: usize, now: u32) {
        let mut state = self.state.lock();
        let (before, since) = state.stuck;
        let goes_on = count > 0 && before > 0 && now.wrapping_sub(since) < STUCK_MS;
        state.stuck = (count, if goes_on { since } else { now });
    }

    /// A block is brought in and mapped, for `thread`: its new memo, in whose queue it has its place, and what
    /// [`Pool::seat`] returns.
    pub fn brought_in(
        &self,
        memo: Memo,
        seat: Seat,
        bytes: usize,
        now: u32,
        thread: u32,
    ) -> (Memo, Queues) {
        let mut state = self.state.lock();
        let memo = state.policy.brought_in(memo);
        let queue = Queue::Mapped(memo.rank());
        (memo, state.seat(queue, seat, bytes, now, Some(thread)))
    }

    /// A resting block is mapped again: its new memo.
    pub fn came_back(&self, memo: Memo) -> Memo {
        self.state.lock().policy.came_back(memo)
    }

    /// A block has left memory: its new memo.
    pub fn left(&self, memo: Memo) -> Memo {
        self.state.lock().policy.left(memo)
    }

    /// Puts a block that was just mapped or unmapped into a queue. `given`: the thread that was given it. Returns
    /// the entries in all queues, for stale ones are swept out when there are many more of them than blocks, and the
    /// limit that holds.
    pub fn seat(
        &self,
        queue: Queue,
        seat: Seat,
        bytes: usize,
        now: u32,
        given: Option<u32>,
    ) -> Queues {
        self.state.lock().seat(queue, seat, bytes, now, given)
    }

    /// Counts a fault that waits for memory.
    pub fn wait(&self, more: bool) {
        let mut state = self.state.lock();
        if more {
            state.waiting += 1;
        } else {
            state.waiting = state.waiting.saturating_sub(1);
        }
    }

    /// Tries to pin `bytes`: what is pinned must leave enough blocks to run.
    pub fn pin(&self, bytes: u64) -> Result<(), u64> {
        let mut state = self.state.lock();
        let room = state.limit.saturating_sub(state.to_run());
        if state.pinned + bytes > room {
            return Err(room.saturating_sub(state.pinned));
        }
        state.pinned += bytes;
        Ok(())
    }

    /// Ends a pin.
    pub fn unpin(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.pinned = state.pinned.saturating_sub(bytes);
    }

    /// Forgets every entry of a region that is closed.
    pub fn forget(&self, region: u32) {
        self.state
            .lock()
            .policy
            .forget(|seat| seat.region == region || put_back(Defect::CloseTakesNeighbours));
    }

    /// Entries in all queues.
    pub fn entries(&self) -> usize {
        self.state.lock().entries()
    }

    /// Keeps the entries that `keep` recognises.
    pub fn sweep(&self, mut keep: impl FnMut(Seat, Queue) -> bool) {
        // The check needs the regions' locks, which come before this one: take the queues out first.
        let taken = self.state.lock().policy.take_all();
        for (queue, entries) in taken {
            for entry in entries {
                if keep(entry.seat, queue) {
                    self.state.lock().policy.put_back(queue, entry);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Rank;

    fn seat(block: u32) -> Seat {
        Seat { region: 0, block }
    }

    fn pool(limit: u64) -> Pool {
        let pool = Pool::new(limit);
        pool.admit(1);
        pool
    }

    #[test]
    fn a_limit_below_four_blocks_is_raised_to_four() {
        let pool = pool(1);
        for _ in 0..BLOCKS_TO_RUN {
            assert!(pool.reserve(1));
        }
        assert!(!pool.reserve(1));
    }

    #[test]
    fn the_oldest_new_block_leaves_first_and_rests_before_it_is_released() {
        let pool = pool(10);
        for block in 0..10 {
            assert!(pool.reserve(1));
            pool.seat(Queue::Mapped(Rank::New), seat(block), 1, 0, None);
        }
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(0), 1));
        pool.seat(Queue::Resting, seat(0), 1, 100, None);
        assert_eq!(
            pool.choose(1, 100, 0),
            Victim::Zap(seat(1), 1),
            "one block may rest"
        );
        pool.seat(Queue::Resting, seat(1), 1, 100, None);
        assert_eq!(pool.choose(1, 100, 0), Victim::Release(seat(0)));
    }

    #[test]
    fn neighbours_that_came_in_a_row_leave_together_and_a_small_part_of_memory_at_most() {
        let pool = pool(64 * 4);
        for block in [10, 11, 40, 12, 13, 14, 15, 41, 30, 29, 28, 7] {
            pool.seat(Queue::Mapped(Rank::New), seat(block), 1, 0, None);
        }
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(10), 4));
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(40), 2));
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(14), 2));
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(28), 3));
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(7), 1));
        pool.seat(Queue::Mapped(Rank::New), seat(9), 1, 0, None);
        let other = Seat {
            region: 1,
            block: 10,
        };
        pool.seat(Queue::Mapped(Rank::New), other, 1, 0, None);
        pool.seat(Queue::Mapped(Rank::New), seat(10), 1, 98, None);
        pool.seat(Queue::Mapped(Rank::New), seat(8), 1, 0, None);
        assert_eq!(
            pool.choose(1, 100, 0),
            Victim::Zap(seat(8), 2),
            "10 is young"
        );
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(other, 1));
    }

    #[test]
    fn a_pool_is_full_near_its_limit_and_for_a_moment_after_less_was_refused() {
        let pool = pool(64);
        assert!(!pool.is_full(0), "nothing was ever refused");
        assert!(pool.reserve(32));
        assert!(!pool.is_full(1000));
        pool.refuse(1000);
        assert!(pool.is_full(1000) && pool.is_full(1000 + ACTIVE_MS - 1));
        assert!(!pool.is_full(1000 + ACTIVE_MS));
        assert!(pool.reserve(28));
        assert!(pool.is_full(5000));
    }

    #[test]
    fn few_blocks_are_less_than_eight_for_each_thread_that_faults() {
        let pool = pool(64);
        for block in 0..64 {
            let given = (1..=4).contains(&block).then_some(block);
            pool.seat(Queue::Mapped(Rank::New), seat(block), 1, 1000, given);
        }
        assert!(!pool.has_few(1000, 2, None), "64 for 6 and the next");
        assert!(pool.has_few(1000, 3, None), "64 for 7 and the next");
        assert!(
            pool.has_few(1000, 0, Some(40)),
            "not all of its limit is to be had"
        );
        assert!(!pool.has_few(1000 + ACTIVE_MS, 0, Some(40)), "who stopped");
    }

    #[test]
    fn when_all_blocks_are_young_only_one_thread_takes_and_keeps_what_it_was_given() {
        let pool = pool(4);
        for block in 0..4 {
            assert!(pool.reserve(1));
            pool.seat(Queue::Mapped(Rank::New), seat(block), 1, 100, None);
        }
        pool.wait(true);
        pool.wait(true);
        let mut kept = Vec::new();
        for new in 10..14 {
            let Victim::Zap(out, 1) = pool.choose(7, 101, 0) else {
                panic!("thread 7 has the turn")
            };
            assert!(!kept.contains(&out));
            pool.seat(Queue::Mapped(Rank::New), seat(new), 1, 101, Some(7));
            kept.push(seat(new));
            if new < 13 {
                assert_eq!(pool.choose(8, 101, 0), Victim::NotNow);
            }
        }
        assert_eq!(pool.choose(7, 101, 0), Victim::NotNow, "it has moved on");
        assert!(
            matches!(pool.choose(8, 101, 0), Victim::Zap(..)),
            "the next one's turn"
        );
    }

    #[test]
    fn what_could_not_leave_is_passed_over_by_everybody_for_a_while() {
        let pool = pool(8);
        for block in 0..4 {
            assert!(pool.reserve(1));
            pool.seat(Queue::Resting, seat(block), 1, 0, None);
            assert!(pool.reserve(1));
            pool.seat(Queue::Mapped(Rank::New), seat(10 + block), 1, 0, None);
        }
        for count in 1..=4 {
            let Victim::Release(seat) = pool.choose(1, 1000, pool.stuck(1000)) else {
                panic!("the resting ones are asked first")
            };
            pool.seat(Queue::Resting, seat, 1, 1000, None);
            pool.found_stuck(count, 1000 + count as u32);
        }
        let who = |now| pool.choose(2, now, pool.stuck(now));
        assert!(matches!(who(1050), Victim::Zap(..)));
        assert!(
            matches!(who(1001 + STUCK_MS), Victim::Release(_)),
            "it may leave by now"
        );
        pool.found_stuck(0, 1060);
        assert_eq!(pool.stuck(1061), 0, "somebody has left");
    }
}
