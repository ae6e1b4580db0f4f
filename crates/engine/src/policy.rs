//! The policy: who leaves memory next. A pure function of what has happened; it sees no clock, no region and
//! no memory, and the simulator in `sim/` runs this very code.
//!
//! A pager does not see hits. What it sees of a block is when it comes and when it goes, and two signs that it
//! should have stayed: it is touched while it *rests* (unmapped, still in memory), or it is brought in again so
//! soon that a memory twice as large would have had it. Each sign raises the block by one rank:
//!
//! ```text
//!     absent ---fill---> New ----sign---> Known ---sign---> Proven ---sign---> Proven
//!                         \                 |                 /
//!                          `--------------zap---------------'
//!                                           v
//!                                        resting ---touch: one rank up, mapped again
//!                                           |
//!                                        release: absent; its memo keeps rank and time
//! ```
//!
//! A block that comes back too late begins as New. Each rank is a queue, first in, first out. Who gives next:
//!
//! 1. Resting blocks, when they have more than a tenth of the limit.
//! 2. The oldest New or Known block that has stood there for a whole turn of the memory without a sign: a queue
//!    within its share would keep it for good. While Proven blocks do worse than Known ones, the oldest of all,
//!    after half a turn more: nothing has been learned, and first in, first out is not bad then.
//! 3. New, when they have more than a twentieth; Known, when they have more than their share; else Proven.
//!
//! The share of the Known is learned: of the blocks of either rank that rest, some are touched again before they
//! are released. Where more of the Known are, the share grows, for then the Proven are stale; else it shrinks.
//!
//! Queue entries are hints. A block that left in another way leaves its entry behind, and whoever takes an entry
//! checks the block's state.

use std::collections::VecDeque;

/// The part of the limit that may rest: one in so many.
const RESTING_SHARE: u64 = 10;

/// The part of the limit that New blocks keep when others could give: one in so many.
const NEW_SHARE: u64 = 20;

/// The bounds of the Known blocks' share, and where it begins, in parts of [`WHOLE`].
const KNOWN_SHARE: [u64; 3] = [WHOLE / 10, WHOLE * 3 / 10, WHOLE * 8 / 10];

/// The whole, for shares and for the fractions that are learned.
const WHOLE: u64 = 1 << 20;

/// A new observation has a weight of one in `1 << MEMORY`.
const MEMORY: u32 = 6;

/// A block of a region, as the queues name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seat {
    /// The region's number.
    pub region: u32,
    /// The block's number in it.
    pub block: u32,
}

/// How much is known for a block's staying.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rank {
    /// Nothing.
    #[default]
    New,
    /// It came back once.
    Known,
    /// It came back again and again.
    Proven,
}

impl Rank {
    const ALL: [Rank; 3] = [Rank::New, Rank::Known, Rank::Proven];

    fn above(self) -> Rank {
        match self {
            Rank::New => Rank::Known,
            Rank::Known | Rank::Proven => Rank::Proven,
        }
    }
}

/// What a block table remembers of a block for the policy: its rank, and for an absent block when it left.
/// Fresh zeros are a block that was never in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memo(u32);

impl Memo {
    const RANK: u32 = 3;

    /// From a number that [`Memo::number`] gave.
    pub fn from_number(number: u32) -> Memo {
        Memo(number)
    }

    /// As a number, for the table.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The rank that the block has, or had when it left.
    pub fn rank(self) -> Rank {
        Rank::ALL[(self.0 & Memo::RANK).min(2) as usize]
    }

    fn mapped(rank: Rank) -> Memo {
        Memo(rank as u32)
    }

    /// `released` counts the blocks that have left by now; it is cut to 30 bits, with 0 for never.
    fn gone(rank: Rank, released: u32) -> Memo {
        Memo((released << 2).max(4) | rank as u32)
    }

    /// How many blocks have left since this one did.
    fn since(self, released: u32) -> Option<u32> {
        (self.0 > Memo::RANK).then(|| (released << 2).wrapping_sub(self.0 & !Memo::RANK) >> 2)
    }
}

/// Which queue a block joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Mapped.
    Mapped(Rank),
    /// Unmapped, still in memory.
    Resting,
}

/// A seat in a queue.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The block.
    pub seat: Seat,
    /// When it joined, milliseconds of the caller's clock; not the policy's business.
    pub at: u32,
    /// Its length in memory, bytes.
    pub bytes: u32,
    /// How many blocks had left when it joined.
    joined: u32,
}

#[derive(Debug, Default)]
struct Line {
    entries: VecDeque<Entry>,
    bytes: u64,
}

impl Line {
    fn push(&mut self, entry: Entry) {
        self.bytes += u64::from(entry.bytes);
        self.entries.push_back(entry);
    }

    fn take(&mut self, index: usize) -> Option<Entry> {
        let entry = self.entries.remove(index)?;
        self.bytes -= u64::from(entry.bytes);
        Some(entry)
    }
}

/// The queues, and what has been learned.
#[derive(Debug)]
pub struct Policy {
    mapped: [Line; 3],
    resting: Line,
    /// Blocks that have left memory; the clock of the memos.
    released: u32,
    /// For each rank, how many of the blocks that rested were touched again, in parts of [`WHOLE`].
    returns: [u64; 3],
    /// The share of the Known, in parts of [`WHOLE`] of the limit.
    known_share: u64,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            mapped: Default::default(),
            resting: Line::default(),
            released: 0,
            returns: [0; 3],
            known_share: KNOWN_SHARE[1],
        }
    }
}

impl Policy {
    /// A block is brought in. Returns its new memo, whose rank says which queue it joins.
    pub fn brought_in(&mut self, memo: Memo) -> Memo {
        let early = memo
            .since(self.released)
            .is_some_and(|since| since as usize <= self.mapped());
        Memo::mapped(if early {
            memo.rank().above()
        } else {
            Rank::New
        })
    }

    /// A resting block is touched, and mapped again. Returns its new memo.
    pub fn came_back(&mut self, memo: Memo) -> Memo {
        self.judge(memo.rank(), true);
        Memo::mapped(memo.rank().above())
    }

    /// A block has left memory. Returns its new memo.
    pub fn left(&mut self, memo: Memo) -> Memo {
        self.judge(memo.rank(), false);
        self.released = self.released.wrapping_add(1);
        Memo::gone(memo.rank(), self.released)
    }

    /// Learns from the end of a block's rest.
    fn judge(&mut self, rank: Rank, returned: bool) {
        let returns = &mut self.returns[rank as usize];
        *returns -= *returns >> MEMORY;
        if returned {
            *returns += WHOLE >> MEMORY;
        }
        // One block's worth a time.
        let step = WHOLE / (self.mapped() as u64).max(16);
        let [least, _, most] = KNOWN_SHARE;
        self.known_share = if self.proven_are_stale() {
            (self.known_share + step).min(most)
        } else {
            self.known_share.saturating_sub(step).max(least)
        };
    }

    fn proven_are_stale(&self) -> bool {
        self.returns[Rank::Known as usize] > self.returns[Rank::Proven as usize]
    }

    /// A block joins a queue, at its end. `at` is kept for the caller.
    pub fn join(&mut self, queue: Queue, seat: Seat, bytes: u32, at: u32) {
        let entry = Entry {
            seat,
            at,
            bytes,
            joined: self.released,
        };
        self.line(queue).push(entry);
    }

    fn line(&mut self, queue: Queue) -> &mut Line {
        match queue {
            Queue::Mapped(rank) => &mut self.mapped[rank as usize],
            Queue::Resting => &mut self.resting,
        }
    }

    /// The queue that gives next under a limit of so many bytes, or `None` if all are empty. With `stuck`, the
    /// resting blocks have been tried and cannot leave.
    pub fn next(&self, limit: u64, stuck: bool) -> Option<Queue> {
        let [new, known, proven] = &self.mapped;
        if !stuck && (self.resting.bytes > limit / RESTING_SHARE || self.mapped() == 0) {
            return (!self.resting.entries.is_empty()).then_some(Queue::Resting);
        }
        let age = |rank: Rank| {
            let front = self.mapped[rank as usize].entries.front();
            front.map_or(0, |entry| self.released.wrapping_sub(entry.joined) as usize)
        };
        let (of, turn): (&[Rank], usize) = if self.proven_are_stale() {
            (&Rank::ALL, self.mapped() * 3 / 2)
        } else {
            (&[Rank::New, Rank::Known], self.mapped())
        };
        let oldest = of.iter().copied().max_by_key(|rank| age(*rank));
        let known_share =
            (u128::from(limit) * u128::from(self.known_share) / u128::from(WHOLE)) as u64;
        let rank = if let Some(oldest) = oldest.filter(|rank| age(*rank) > turn) {
            oldest
        } else if new.bytes > limit / NEW_SHARE && !new.entries.is_empty() {
            Rank::New
        } else if known.bytes > known_share && !known.entries.is_empty() {
            Rank::Known
        } else if !proven.entries.is_empty() {
            Rank::Proven
        } else if !known.entries.is_empty() {
            Rank::Known
        } else if !new.entries.is_empty() {
            Rank::New
        } else {
            return None;
        };
        Some(Queue::Mapped(rank))
    }

    /// The first of a queue.
    pub fn front(&self, queue: Queue) -> Option<&Entry> {
        match queue {
            Queue::Mapped(rank) => &self.mapped[rank as usize],
            Queue::Resting => &self.resting,
        }
        .entries
        .front()
    }

    /// Takes the first of a queue out.
    pub fn take(&mut self, queue: Queue) -> Option<Entry> {
        self.line(queue).take(0)
    }

    /// Takes the first entry of a queue out that `wanted` accepts, looking at no more than `far`.
    pub fn take_near(
        &mut self,
        queue: Queue,
        far: usize,
        wanted: impl Fn(&Entry) -> bool,
    ) -> Option<Entry> {
        let line = self.line(queue);
        let index = line.entries.iter().take(far).position(wanted)?;
        line.take(index)
    }

    /// Takes the first mapped block out that `wanted` accepts, looking at no more than `far` of each queue.
    pub fn take_mapped(&mut self, far: usize, wanted: impl Fn(Seat) -> bool) -> Option<Entry> {
        self.mapped.iter_mut().find_map(|line| {
            let index = line
                .entries
                .iter()
                .take(far)
                .position(|entry| wanted(entry.seat))?;
            line.take(index)
        })
    }

    /// Entries of mapped blocks.
    pub fn mapped(&self) -> usize {
        self.mapped.iter().map(|line| line.entries.len()).sum()
    }

    /// Entries of resting blocks.
    pub fn resting(&self) -> usize {
        self.resting.entries.len()
    }

    /// True if `places` more blocks can be put into any one queue of mapped blocks without growing it.
    pub fn has_places(&self, places: usize) -> bool {
        let room = |line: &Line| line.entries.capacity() - line.entries.len();
        self.mapped.iter().all(|line| room(line) >= places)
    }

    /// Makes the queues of mapped blocks grow until they have so many places.
    pub fn keep_places(&mut self, places: usize) {
        for line in &mut self.mapped {
            line.entries.reserve(places);
        }
    }

    /// Forgets the entries of blocks that are `gone`.
    pub fn forget(&mut self, gone: impl Fn(Seat) -> bool) {
        for line in self.mapped.iter_mut().chain([&mut self.resting]) {
            line.entries.retain(|entry| !gone(entry.seat));
            line.bytes = line
                .entries
                .iter()
                .map(|entry| u64::from(entry.bytes))
                .sum();
        }
    }

    /// Takes all queues out, for a look at each entry.
    pub fn take_all(&mut self) -> Vec<(Queue, Vec<Entry>)> {
        let queues = Rank::ALL
            .map(Queue::Mapped)
            .into_iter()
            .chain([Queue::Resting]);
        queues
            .map(|queue| (queue, std::mem::take(self.line(queue)).entries.into()))
            .collect()
    }

    /// Puts an entry back that [`Policy::take_all`] took, at the end of its queue.
    pub fn put_back(&mut self, queue: Queue, entry: Entry) {
        self.line(queue).push(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: Seat = Seat {
        region: 0,
        block: 0,
    };

    fn seat(block: u32) -> Seat {
        Seat { region: 0, block }
    }

    /// Has one block leave, of a limit in blocks of one byte; the mapped ones rest first.
    fn one_leaves(policy: &mut Policy, memos: &mut [Memo], limit: u64) -> u32 {
        loop {
            let queue = policy.next(limit, false).expect("there is somebody");
            let entry = policy.take(queue).expect("the queue gives");
            if queue == Queue::Resting {
                let memo = &mut memos[entry.seat.block as usize];
                *memo = policy.left(*memo);
                return entry.seat.block;
            }
            policy.join(Queue::Resting, entry.seat, 1, 0);
        }
    }

    fn bring_in(policy: &mut Policy, memos: &mut [Memo], block: u32) -> Rank {
        let memo = policy.brought_in(memos[block as usize]);
        memos[block as usize] = memo;
        policy.join(Queue::Mapped(memo.rank()), seat(block), 1, 0);
        memo.rank()
    }

    #[test]
    fn each_early_return_raises_a_block_by_one_rank_and_a_late_one_begins_anew() {
        let (mut policy, mut memos) = (Policy::default(), vec![Memo::default(); 20]);
        for block in 0..10 {
            assert_eq!(bring_in(&mut policy, &mut memos, block), Rank::New);
        }
        let mut memo = memos[0];
        for expected in [Rank::Known, Rank::Proven, Rank::Proven] {
            memo = policy.left(memo);
            for _ in 0..10 {
                policy.left(Memo::default());
            }
            memo = policy.brought_in(memo);
            assert_eq!(memo.rank(), expected, "ten blocks have left since, of ten");
        }
        memo = policy.left(memo);
        for _ in 0..11 {
            policy.left(Memo::default());
        }
        assert_eq!(policy.brought_in(memo).rank(), Rank::New);
    }

    #[test]
    fn a_touch_during_rest_raises_a_block_and_is_remembered_in_its_memo() {
        let mut policy = Policy::default();
        let memo = policy.came_back(Memo::default());
        assert_eq!(memo.rank(), Rank::Known);
        assert_eq!(policy.came_back(memo).rank(), Rank::Proven);
        assert_eq!(policy.left(memo).rank(), Rank::Known);
    }

    #[test]
    fn memos_survive_the_wrap_of_their_clock() {
        for released in [0, 1, 77, (1 << 30) - 1, u32::MAX - 1] {
            let memo = Memo::gone(Rank::Proven, released);
            assert_eq!(memo.rank(), Rank::Proven);
            assert_eq!(Memo::from_number(memo.number()), memo);
            let since = memo.since(released.wrapping_add(5)).expect("it has left");
            // The one number that means "never" is given up for its neighbour.
            assert!(since == 5 || since == 4, "{since}");
        }
        assert_eq!(Memo::mapped(Rank::Proven).since(9), None);
    }

    #[test]
    fn proven_blocks_outlive_a_sweep_of_new_ones() {
        let (mut policy, mut memos) = (Policy::default(), vec![Memo::default(); 2000]);
        for block in 0..50 {
            memos[block as usize] = Memo::mapped(Rank::Proven);
            policy.join(Queue::Mapped(Rank::Proven), seat(block), 1, 0);
        }
        for block in 50..2000 {
            if block >= 100 {
                assert!(one_leaves(&mut policy, &mut memos, 100) >= 50);
            }
            bring_in(&mut policy, &mut memos, block);
        }
    }

    #[test]
    fn blocks_without_a_sign_do_not_keep_a_place_for_good() {
        // All that comes is Known; a few New ones within their share must leave within some turns.
        let (mut policy, mut memos) = (Policy::default(), vec![Memo::default(); 2000]);
        for block in 0..4 {
            bring_in(&mut policy, &mut memos, block);
        }
        for block in 4..100 {
            memos[block as usize] = Memo::mapped(Rank::Known);
            policy.join(Queue::Mapped(Rank::Known), seat(block), 1, 0);
        }
        let mut left = 0;
        for block in 100..500 {
            left += usize::from(one_leaves(&mut policy, &mut memos, 100) < 4);
            memos[block as usize] = Memo::mapped(Rank::Known);
            policy.join(Queue::Mapped(Rank::Known), seat(block), 1, 0);
        }
        assert_eq!(left, 4);
    }

    #[test]
    fn stale_proven_blocks_give_way_to_known_ones_that_return() {
        let mut policy = Policy::default();
        for block in 0..100 {
            policy.join(Queue::Mapped(Rank::Proven), seat(block), 1, 0);
        }
        for _ in 0..1000 {
            policy.came_back(Memo::mapped(Rank::Known));
            policy.left(Memo::mapped(Rank::Proven));
        }
        assert_eq!(policy.known_share, KNOWN_SHARE[2]);
        for block in 100..150 {
            policy.join(Queue::Mapped(Rank::Known), seat(block), 1, 0);
        }
        assert_eq!(policy.next(150, false), Some(Queue::Mapped(Rank::Proven)));
        for _ in 0..1000 {
            policy.came_back(Memo::mapped(Rank::Proven));
            policy.left(Memo::mapped(Rank::Known));
        }
        assert_eq!(policy.known_share, KNOWN_SHARE[0]);
        assert_eq!(policy.next(150, false), Some(Queue::Mapped(Rank::Known)));
    }

    #[test]
    fn resting_blocks_that_are_stuck_are_passed_over() {
        let mut policy = Policy::default();
        assert_eq!(policy.next(10, false), None);
        policy.join(Queue::Resting, NOBODY, 1, 0);
        assert_eq!(policy.next(10, false), Some(Queue::Resting));
        assert_eq!(policy.next(10, true), None);
        policy.join(Queue::Mapped(Rank::New), NOBODY, 1, 0);
        assert_eq!(policy.next(10, true), Some(Queue::Mapped(Rank::New)));
    }
}
