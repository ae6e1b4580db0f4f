//! Residency: who is in memory, under which limit, and who leaves next.
//!
//! A pool is a limit with three queues. New blocks are on *probation*; a block that came back from
//! resting, or soon after its eviction, is in *main*; a block that was unmapped *rests* for a while and
//! is then released. The choice of the next victim is [`PoolState::choose`], a pure function of the
//! queues: it sees no clock and no region.
//!
//! Queue entries are hints. A block that left in another way leaves its entry behind, and whoever takes
//! an entry checks the block's state. The lock is a leaf: nothing else is taken while it is held.
//!
//! When memory is short, faulting threads take turns ([`Turn`]): one instruction can need four blocks at
//! once, and a block that is taken away before its thread has moved on makes no progress for anybody.

use std::collections::{BTreeMap, HashMap, VecDeque};

use parking_lot::Mutex;

use crate::defects::{Defect, put_back};

/// Blocks that one instruction may need at once: a copy whose both ends straddle two blocks.
pub const BLOCKS_TO_RUN: usize = 4;

/// How long a block just mapped is kept for its thread when memory is short, milliseconds. Long enough
/// for a woken thread to get a processor on a busy machine.
pub const GRACE_MS: u32 = 6;

/// A thread that was given no block for so long does not count as one that faults, milliseconds.
const ACTIVE_MS: u32 = 100;

/// Threads that are remembered before those that stopped are forgotten.
const MOST_ACTIVE: usize = 1024;

/// The share of the limit that may rest, and that is kept for blocks on probation: a tenth each
/// (`docs/explanation/architecture.md`, decision 5).
const SHARE: u64 = 10;

/// A block of a region, as the queues name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seat {
    /// The region's number.
    pub region: u32,
    /// The block's number in it.
    pub block: u32,
}

/// A seat with the moment it was taken.
#[derive(Debug, Clone, Copy)]
struct Entry {
    seat: Seat,
    at: u32,
    bytes: u32,
}

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
    /// Unmap this block; it then rests.
    Zap(Seat),
    /// Release this resting block from memory.
    Release(Seat),
    /// Nothing can leave now: try again a little later.
    NotNow,
}

/// Which queue a block joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// New.
    Probation,
    /// Known to be used again.
    Main,
    /// Unmapped, still in memory.
    Resting,
}

/// The queues of a pool.
#[derive(Debug, Default)]
pub struct PoolState {
    limit: u64,
    /// Bytes of blocks.
    used: u64,
    /// Bytes of what blocks need beside themselves: counted, but never refused.
    charged: u64,
    pinned: u64,
    /// Block sizes of the regions in the pool, with their numbers: the largest one says what is the
    /// smallest limit that can work.
    sizes: BTreeMap<u64, usize>,
    probation: VecDeque<Entry>,
    main: VecDeque<Entry>,
    resting: VecDeque<Entry>,
    probation_bytes: u64,
    resting_bytes: u64,
    evictions: u32,
    turn: Option<Turn>,
    /// When each thread was last given a block, for those that were given one lately.
    threads: HashMap<u32, u32>,
    /// Faults that wait for memory.
    waiting: usize,
}

/// A limit with its queues.
#[derive(Debug, Default)]
pub struct Pool {
    state: Mutex<PoolState>,
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
    /// Resting blocks leave first when they take more than their share, or when nothing else can.
    /// Otherwise probation gives while it has more than its share, then main. `passed` resting blocks have
    /// been named in vain by now, for this fault: when those are all, blocks leave that are mapped, or
    /// else blocks that cannot be written back would keep the clean ones from leaving.
    pub fn choose(&mut self, thread: u32, now: u32, passed: usize) -> Victim {
        let resting_share = self.effective() / SHARE;
        let stuck = passed >= self.resting.len();
        let unmapped = self.probation.is_empty() && self.main.is_empty();
        if unmapped && stuck {
            return Victim::NotNow;
        }
        if !stuck && (self.resting_bytes > resting_share || unmapped) {
            return match self.resting.pop_front() {
                Some(entry) => {
                    self.resting_bytes -= u64::from(entry.bytes);
                    self.evictions = self.evictions.wrapping_add(1).max(1);
                    Victim::Release(entry.seat)
                }
                None => Victim::NotNow,
            };
        }
        let from_probation = self.main.is_empty()
            || (self.probation_bytes > self.effective() / SHARE && !self.probation.is_empty());
        let young = |entry: Option<&Entry>| {
            entry.is_some_and(|entry| now.wrapping_sub(entry.at) < GRACE_MS)
        };
        let front = if from_probation {
            self.probation.front()
        } else {
            self.main.front()
        };
        if young(front) && self.short(now) {
            return self.choose_by_turn(thread, now);
        }
        let entry = if from_probation {
            self.probation.pop_front()
        } else {
            self.main.pop_front()
        };
        let entry = entry.expect("the queue was seen not to be empty");
        if from_probation {
            self.probation_bytes -= u64::from(entry.bytes);
        }
        Victim::Zap(entry.seat)
    }

    /// True if the blocks in memory are too few for every thread that faults to have its four.
    fn short(&mut self, now: u32) -> bool {
        let blocks = self.probation.len() + self.main.len();
        if blocks <= BLOCKS_TO_RUN * (self.threads.len() + 1) {
            self.threads
                .retain(|_, last| now.wrapping_sub(*last) < ACTIVE_MS);
        }
        blocks <= BLOCKS_TO_RUN * (self.threads.len() + 1)
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
        for (queue, probation) in [(&mut self.probation, true), (&mut self.main, false)] {
            if let Some(index) = queue
                .iter()
                .take(64)
                .position(|entry| !kept.contains(&entry.seat))
            {
                let entry = queue.remove(index).expect("the index was just found");
                if probation {
                    self.probation_bytes -= u64::from(entry.bytes);
                }
                return Victim::Zap(entry.seat);
            }
        }
        Victim::NotNow
    }

    fn push(&mut self, queue: Queue, entry: Entry) {
        match queue {
            Queue::Probation => {
                self.probation_bytes += u64::from(entry.bytes);
                self.probation.push_back(entry);
            }
            Queue::Main => self.main.push_back(entry),
            Queue::Resting => {
                self.resting_bytes += u64::from(entry.bytes);
                self.resting.push_back(entry);
            }
        }
    }
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
            state: Mutex::new(PoolState {
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

    /// Who leaves next, for a fault of `thread`.
    pub fn choose(&self, thread: u32, now: u32, passed: usize) -> Victim {
        self.state.lock().choose(thread, now, passed)
    }

    /// How often something has been released; the clock of ghosts.
    pub fn evictions(&self) -> u32 {
        self.state.lock().evictions
    }

    /// True if a block that was evicted at `ghost` came back so soon that it should have stayed: fewer
    /// blocks have left since than are in main memory.
    pub fn too_early(&self, ghost: u32) -> bool {
        let state = self.state.lock();
        ghost != 0
            && state.evictions.wrapping_sub(ghost) as usize
                <= state.main.len() + state.probation.len()
    }

    /// Puts a block that was just mapped or unmapped into a queue.
    pub fn seat(&self, queue: Queue, seat: Seat, bytes: usize, now: u32) {
        self.state.lock().push(
            queue,
            Entry {
                seat,
                at: now,
                bytes: bytes as u32,
            },
        );
    }

    /// Notes that `thread` was given a block, if it is its turn.
    pub fn given(&self, thread: u32, seat: Seat, now: u32) {
        let mut state = self.state.lock();
        if state.threads.len() >= MOST_ACTIVE {
            state
                .threads
                .retain(|_, last| now.wrapping_sub(*last) < ACTIVE_MS);
        }
        state.threads.insert(thread, now);
        if let Some(turn) = &mut state.turn
            && turn.thread == thread
        {
            turn.last = now;
            turn.seats.push(seat);
        }
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
        let mut state = self.state.lock();
        let state = &mut *state;
        for queue in [&mut state.probation, &mut state.main, &mut state.resting] {
            queue.retain(|entry| {
                entry.seat.region != region && !put_back(Defect::CloseTakesNeighbours)
            });
        }
        state.probation_bytes = state
            .probation
            .iter()
            .map(|entry| u64::from(entry.bytes))
            .sum();
        state.resting_bytes = state
            .resting
            .iter()
            .map(|entry| u64::from(entry.bytes))
            .sum();
    }

    /// Entries in all queues: stale ones are swept when there are many more of them than blocks.
    pub fn entries(&self) -> usize {
        let state = self.state.lock();
        state.probation.len() + state.main.len() + state.resting.len()
    }

    /// Keeps the entries that `keep` recognises.
    pub fn sweep(&self, mut keep: impl FnMut(Seat, Queue) -> bool) {
        // The check needs the regions' locks, which come before this one: take the queues out first.
        let taken = {
            let mut state = self.state.lock();
            state.probation_bytes = 0;
            state.resting_bytes = 0;
            let state = &mut *state;
            [
                (Queue::Probation, std::mem::take(&mut state.probation)),
                (Queue::Main, std::mem::take(&mut state.main)),
                (Queue::Resting, std::mem::take(&mut state.resting)),
            ]
        };
        let kept: Vec<(Queue, Vec<Entry>)> = taken
            .into_iter()
            .map(|(queue, entries)| {
                (
                    queue,
                    entries
                        .into_iter()
                        .filter(|entry| keep(entry.seat, queue))
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        let mut state = self.state.lock();
        for (queue, entries) in kept {
            for entry in entries {
                state.push(queue, entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_oldest_on_probation_leaves_first_and_rests_before_it_is_released() {
        let pool = pool(10);
        for block in 0..10 {
            assert!(pool.reserve(1));
            pool.seat(Queue::Probation, seat(block), 1, 0);
        }
        assert_eq!(pool.choose(1, 100, 0), Victim::Zap(seat(0)));
        pool.seat(Queue::Resting, seat(0), 1, 100);
        assert_eq!(
            pool.choose(1, 100, 0),
            Victim::Zap(seat(1)),
            "one block may rest"
        );
        pool.seat(Queue::Resting, seat(1), 1, 100);
        assert_eq!(pool.choose(1, 100, 0), Victim::Release(seat(0)));
    }

    #[test]
    fn what_is_known_to_be_used_again_outlives_a_sweep() {
        let pool = pool(100);
        for block in 0..50 {
            pool.seat(Queue::Main, seat(block), 1, 0);
        }
        for block in 50..1000 {
            pool.seat(Queue::Probation, seat(block), 1, 0);
            if block >= 100 {
                match pool.choose(1, 100, 0) {
                    Victim::Zap(out) => {
                        assert!(out.block >= 50);
                        pool.seat(Queue::Resting, out, 1, 100);
                    }
                    Victim::Release(out) => assert!(out.block >= 50),
                    Victim::NotNow => panic!("there is always somebody"),
                }
            }
        }
    }

    #[test]
    fn when_all_blocks_are_young_only_one_thread_takes_and_keeps_what_it_was_given() {
        let pool = pool(4);
        for block in 0..4 {
            assert!(pool.reserve(1));
            pool.seat(Queue::Probation, seat(block), 1, 100);
        }
        pool.wait(true);
        pool.wait(true);
        let mut kept = Vec::new();
        for new in 10..14 {
            let Victim::Zap(out) = pool.choose(7, 101, 0) else {
                panic!("thread 7 has the turn")
            };
            assert!(!kept.contains(&out));
            pool.seat(Queue::Probation, seat(new), 1, 101);
            pool.given(7, seat(new), 101);
            kept.push(seat(new));
            if new < 13 {
                assert_eq!(pool.choose(8, 101, 0), Victim::NotNow);
            }
        }
        assert_eq!(pool.choose(7, 101, 0), Victim::NotNow, "it has moved on");
        assert!(
            matches!(pool.choose(8, 101, 0), Victim::Zap(_)),
            "the next one's turn"
        );
    }
}
