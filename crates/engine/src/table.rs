//! The block table: the one owner of "where is this block now" for a region.
//!
//! It is plain data behind the region's lock. No I/O and no system call happens while the lock is held;
//! whoever needs to do either claims the block first, lets go of the lock, and releases the block at the
//! end. Untouched parts of the table cost no memory: every array starts as untouched zeros.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime};

use crate::admission::Admission;
use crate::block::{self, Purpose, State};
use crate::dirty::DirtyMap;
use crate::entries::Entries;
use crate::error::Error;
use crate::fill::Filling;
use crate::policy::Memo;

/// Somebody faulted on the block while it was owned: wake it at the end.
const WAITED: u8 = 1;

/// The owner puts back pages of a block that is resident before and after.
const REFILLING: u8 = 2;

/// The owner is a handler of SIGBUS: nobody but its sleepers watches how long it takes.
const IN_HANDLER: u8 = 4;

/// A toucher has handed a fault on the block over, and it has not been answered yet.
const ASKED: u8 = 8;

/// It was cleaned while it was mapped: what leaves dirty later is not all that was written.
const CLEANED: u8 = 16;

/// A span has a page table.
const TABLE: u16 = 1 << 15;

/// A block that could not be had.
#[derive(Debug, Clone)]
pub struct BlockError {
    /// Offset in the region, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: u64,
    /// The store's error number, 0 if it has none.
    pub errno: i32,
    /// The cause.
    pub message: String,
    /// When the block was given up.
    pub time: SystemTime,
}

/// How often a block is pinned.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pins {
    /// All pins.
    pub count: u32,
    /// Those through which a device may write.
    pub writers: u32,
    /// Copies through the mapping under way, which are no pins: they end by themselves.
    pub holds: u32,
    /// The block has lost its place in its pool's queues: it gets one back when the last of these ends.
    pub unseated: bool,
}

/// The state of every block of a region.
#[derive(Debug)]
pub struct Table {
    entries: Entries,
    /// Blocks of each span that are not absent, and [`TABLE`]: a span that has none needs no page table.
    spans: Vec<u16>,
    /// The kernel frees no page table before its mapping goes.
    pub(crate) tables_stay: bool,
    blocks_per_span: usize,
    /// Spans that came into use, less those that went out, since the pool was last told.
    unsettled_spans: i64,
    pub(crate) spans_used: usize,
    /// The mappings are gone; an owner that comes back changes nothing any more.
    spans_forgotten: bool,
    pub(crate) pins: HashMap<u32, Pins>,
    /// Pages that differ from their home; the store's consumer.
    pub(crate) home: DirtyMap,
    /// Pages written to the store since it last said that they are durable.
    unsynced: DirtyMap,
    /// Pages that the store had when it failed to make them durable, and that had left memory by then.
    unsure: DirtyMap,
    /// Reads that may hang, by block: the ticket of the reader who still owns the fill.
    pub(crate) reads: HashMap<u32, u64>,
    /// Blocks whose memory a hung read may still write to.
    pub(crate) hung: HashMap<u32, u64>,
    /// Owned blocks that somebody sleeps on, by the moment the first of them came, unless the owner has a
    /// deadline of its own.
    waiting_since: HashMap<u32, Instant>,
    /// Owned blocks whose sleepers were given up: poison lies over them until their owner comes back.
    given_up: HashSet<u32>,
    /// Blocks over which lies a mapping of nothing, where the kernel has no poison.
    pub(crate) barred: HashSet<u32>,
    /// Fills under way, and those that wait until fewer are.
    pub(crate) fills: Admission<Filling>,
    pub(crate) errors: Vec<BlockError>,
    /// With the debug option: hashes of blocks as they were mapped, for those that are not dirty.
    pub(crate) hashes: HashMap<u32, u64>,
    pages_per_block: usize,
    /// The write-back error that the next flush or close raises.
    pub(crate) pending: Option<Error>,
    /// Threads that sleep until some block changes state.
    pub(crate) sleepers: usize,
    /// Blocks in memory, by state.
    pub(crate) resident: usize,
    pub(crate) resting: usize,
    /// Blocks that somebody owns.
    pub(crate) owned: usize,
    /// Set while the region is being closed: blocks are only cleaned.
    pub(crate) closed: bool,
    /// Set before the mappings go: nobody takes a block any more, whatever for.
    pub(crate) sealed: bool,
    /// Users of the mappings who own no block: copies out of private memory, spans that are unmapped.
    pub(crate) holds: usize,
}

impl Table {
    pub(crate) fn new(
        blocks: usize,
        pages: usize,
        blocks_per_span: usize,
        pages_per_block: usize,
    ) -> Table {
        Table {
            spans: vec![0; blocks.div_ceil(blocks_per_span)],
            tables_stay: false,
            blocks_per_span,
            unsettled_spans: 0,
            spans_used: 0,
            spans_forgotten: false,
            entries: Entries::new(blocks),
            pins: HashMap::new(),
            home: DirtyMap::new(pages),
            unsynced: DirtyMap::new(pages),
            unsure: DirtyMap::new(pages),
            reads: HashMap::new(),
            hung: HashMap::new(),
            waiting_since: HashMap::new(),
            given_up: HashSet::new(),
            barred: HashSet::new(),
            fills: Admission::new(std::thread::available_parallelism().map_or(1, usize::from)),
            errors: Vec::new(),
            hashes: HashMap::new(),
            pages_per_block,
            pending: None,
            sleepers: 0,
            resident: 0,
            resting: 0,
            owned: 0,
            closed: false,
            sealed: false,
            holds: 0,
        }
    }

    /// One past the last page that can be dirty.
    pub(crate) fn home_pages(&self) -> usize {
        self.home.pages()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn state(&self, block: u32) -> State {
        self.entries.state(block)
    }

    fn set(&mut self, block: u32, state: State) {
        let old = self.state(block);
        self.resident -= usize::from(old == State::Resident);
        self.resting -= usize::from(old == State::Resting);
        self.resident += usize::from(state == State::Resident);
        self.resting += usize::from(state == State::Resting);
        self.owned -= usize::from(old.exclusive());
        self.owned += usize::from(state.exclusive());
        self.entries.set_state(block, state);
        let was = old != State::Absent;
        let is = state != State::Absent;
        if was != is && !self.spans_forgotten {
            let span = &mut self.spans[block as usize / self.blocks_per_span];
            if is {
                *span += 1;
                if *span & TABLE == 0 {
                    *span |= TABLE;
                    self.spans_used += 1;
                    self.unsettled_spans += 1;
                }
            } else {
                *span -= 1;
                if *span == TABLE && !self.tables_stay {
                    *span = 0;
                    self.spans_used -= 1;
                    self.unsettled_spans -= 1;
                }
            }
        }
    }

    /// True if no block of the block's span is in use. The mappings are then held for the caller, who owns
    /// no block any more and is about to unmap the span: they must not go meanwhile.
    pub(crate) fn hold_idle_span(&mut self, block: u32) -> bool {
        let idle = self.spans[block as usize / self.blocks_per_span] == 0;
        self.holds += usize::from(idle);
        idle
    }

    /// Forgets all spans: the mappings are gone.
    pub(crate) fn forget_spans(&mut self) {
        self.unsettled_spans -= self.spans_used as i64;
        self.spans_used = 0;
        self.spans_forgotten = true;
    }

    /// Spans that came into use since the last call, less those that went out.
    pub(crate) fn settle_spans(&mut self) -> i64 {
        std::mem::take(&mut self.unsettled_spans)
    }

    /// True if somebody uses the memory through the view or the mapping at this moment.
    pub(crate) fn in_use(&self) -> bool {
        self.owned > 0 || self.holds > 0
    }

    /// Takes the block for `purpose`; false if its state does not allow it now. While a region is being
    /// closed, blocks are only cleaned.
    pub(crate) fn claim(&mut self, block: u32, purpose: Purpose) -> bool {
        if self.sealed || (self.closed && purpose != Purpose::Clean) {
            return false;
        }
        let state = self.state(block);
        if purpose == Purpose::Evict && self.pins.contains_key(&block) {
            return false;
        }
        let Some(next) = block::claim(state, purpose) else {
            return false;
        };
        self.entries.clear(block, ASKED);
        match purpose {
            Purpose::Refill => self.entries.set(block, REFILLING),
            Purpose::Fill | Purpose::Map => self.entries.clear(block, CLEANED),
            Purpose::Clean if state == State::Resident => self.entries.set(block, CLEANED),
            _ => {}
        }
        self.set(block, next);
        true
    }

    /// As [`Table::claim`], by a handler of SIGBUS.
    pub(crate) fn claim_in_handler(&mut self, block: u32, purpose: Purpose) -> bool {
        let claimed = self.claim(block, purpose);
        if claimed {
            self.entries.set(block, IN_HANDLER);
        }
        claimed
    }

    /// Notes that an unowned block has been asked for; the next owner ends that.
    pub(crate) fn ask(&mut self, block: u32) {
        if matches!(self.state(block), State::Absent | State::Resting) {
            self.entries.set(block, ASKED);
        }
    }

    /// True if an unowned block has been asked for and not been taken since.
    pub(crate) fn is_asked(&self, block: u32) -> bool {
        self.entries.has(block, ASKED)
    }

    /// True if the block has been cleaned since it was mapped.
    pub(crate) fn was_cleaned(&self, block: u32) -> bool {
        self.entries.has(block, CLEANED)
    }

    /// True while the owner puts back pages of a block that is resident before and after.
    pub(crate) fn refilling(&self, block: u32) -> bool {
        self.entries.has(block, REFILLING)
    }

    /// Ends ownership; true if somebody waits and must be woken.
    pub(crate) fn release(&mut self, block: u32, state: State) -> bool {
        debug_assert!(self.state(block).exclusive());
        self.set(block, state);
        let waited = self.entries.has(block, WAITED);
        self.entries.clear(block, WAITED | REFILLING | IN_HANDLER);
        if waited {
            self.waiting_since.remove(&block);
        }
        waited
    }

    /// Takes a resident block of a region that is being closed, to unmap it; false if it is not resident.
    pub(crate) fn claim_for_close(&mut self, block: u32) -> bool {
        debug_assert!(self.closed && !self.state(block).exclusive());
        let resident = self.state(block) == State::Resident;
        if resident {
            self.set(block, State::Evicting);
        }
        resident
    }

    /// Goes from one exclusive state to another without letting go.
    pub(crate) fn turn_into(&mut self, block: u32, state: State) {
        debug_assert!(self.state(block).exclusive() && state.exclusive());
        self.set(block, state);
    }

    /// Notes that a toucher waits for the owner. True if the owner has no deadline, and the wait is to be
    /// watched: a fill has its own.
    pub(crate) fn wait(&mut self, block: u32) -> bool {
        self.entries.set(block, WAITED);
        let no_deadline = matches!(
            self.state(block),
            State::Evicting | State::Cleaning | State::Writing
        ) || self.entries.has(block, IN_HANDLER);
        if !no_deadline || self.waiting_since.contains_key(&block) {
            return false;
        }
        self.waiting_since.insert(block, Instant::now());
        true
    }

    /// How long somebody has been waiting for the owner of a block.
    pub(crate) fn waiting(&self, block: u32) -> Option<Duration> {
        self.waiting_since.get(&block).map(Instant::elapsed)
    }

    /// Notes that the sleepers on an owned block were given up.
    pub(crate) fn give_up_sleepers(&mut self, block: u32) {
        self.waiting_since.remove(&block);
        self.given_up.insert(block);
    }

    /// True while poison lies over a block whose owner has not come back.
    pub(crate) fn is_given_up(&self, block: u32) -> bool {
        !self.given_up.is_empty() && self.given_up.contains(&block)
    }

    /// True if the sleepers on a block, whose owner has now come back, were given up; once.
    pub(crate) fn take_given_up(&mut self, block: u32) -> bool {
        !self.given_up.is_empty() && self.given_up.remove(&block)
    }

    pub(crate) fn memo(&self, block: u32) -> Memo {
        self.entries.memo(block)
    }

    pub(crate) fn set_memo(&mut self, block: u32, memo: Memo) {
        self.entries.set_memo(block, memo);
    }

    /// True if nobody uses the memory, nor may a read that was given up still come back to it.
    pub(crate) fn quiet(&self) -> bool {
        !self.in_use() && self.hung.is_empty()
    }

    /// True if a device may be writing to the block.
    pub(crate) fn write_pinned(&self, block: u32) -> bool {
        self.pins.get(&block).is_some_and(|pins| pins.writers > 0)
    }

    /// Notes that pages were written to the store.
    pub(crate) fn written(&mut self, pages: Range<usize>) {
        self.unsynced.insert(pages);
    }

    /// The pages written since the store was last asked to make them durable.
    pub(crate) fn take_unsynced(&mut self) -> DirtyMap {
        let pages = self.unsynced.pages();
        if self.unsynced.count() == 0 {
            return DirtyMap::new(0);
        }
        std::mem::replace(&mut self.unsynced, DirtyMap::new(pages))
    }

    /// The store could not make `pages` durable, and nobody can say which of them it has: what is still in
    /// memory is dirty again, the rest is to be read and written again. Returns the pages of the rest.
    pub(crate) fn not_durable(&mut self, pages: &DirtyMap, pages_per_block: usize) -> usize {
        let mut gone = 0;
        for run in pages.runs(0..pages.pages()) {
            for page in run {
                if self.state((page / pages_per_block) as u32) != State::Absent {
                    self.home.insert(page..page + 1);
                } else {
                    self.unsure.insert(page..page + 1);
                    gone += 1;
                }
            }
        }
        gone
    }

    /// The first run of pages, within one block, that has to be read and written again.
    pub(crate) fn next_unsure(&self) -> Option<Range<usize>> {
        if self.unsure.count() == 0 {
            return None;
        }
        let first = self.unsure.next(0, self.unsure.pages())?;
        let end = (first / self.pages_per_block + 1) * self.pages_per_block;
        let runs = self.unsure.runs(first..end.min(self.unsure.pages()));
        runs.into_iter().next()
    }

    /// Notes that pages were written again, or are dirty in memory.
    pub(crate) fn sure(&mut self, pages: Range<usize>) {
        self.unsure.remove(pages);
    }

    /// ORs a harvest of evidence into the map of every consumer.
    pub(crate) fn mark_dirty(&mut self, pages: Range<usize>) {
        if !self.hashes.is_empty() && !pages.is_empty() {
            for block in pages.start / self.pages_per_block..=(pages.end - 1) / self.pages_per_block
            {
                self.hashes.remove(&(block as u32));
            }
        }
        self.home.insert(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small deterministic generator: a failing run prints its seed.
    fn random(seed: &mut u64, below: usize) -> usize {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        (*seed >> 16) as usize % below
    }

    /// Any owner may end in any of these; the table does not judge it.
    const ENDS: [State; 4] = [
        State::Absent,
        State::Resident,
        State::Resting,
        State::Poisoned,
    ];

    #[test]
    fn whatever_is_claimed_and_released_the_counts_are_those_of_the_states() {
        for seed in 1..300u64 {
            let mut seed_now = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let blocks = 1 + random(&mut seed_now, 40);
            let per_span = 1 << random(&mut seed_now, 4);
            let mut table = Table::new(blocks, blocks * 2, per_span, 2);
            let mut settled = 0;
            let mut waiting = HashSet::new();
            for _ in 0..400 {
                let block = random(&mut seed_now, blocks) as u32;
                let before = table.state(block);
                if before.exclusive() {
                    match random(&mut seed_now, 3) {
                        0 => {
                            table.wait(block);
                            waiting.insert(block);
                        }
                        _ => {
                            let end = ENDS[random(&mut seed_now, ENDS.len())];
                            // Whoever was told to wait is woken, and nobody else.
                            let waited = table.release(block, end);
                            assert_eq!(waited, waiting.remove(&block), "seed {seed}");
                            assert!(!table.refilling(block), "seed {seed}");
                        }
                    }
                } else {
                    let purpose = Purpose::ALL[random(&mut seed_now, Purpose::ALL.len())];
                    let pinned = random(&mut seed_now, 4) == 0;
                    if pinned {
                        table.pins.insert(block, Pins::default());
                    }
                    let claimed = table.claim(block, purpose);
                    let wanted = block::claim(before, purpose);
                    if pinned && purpose == Purpose::Evict {
                        assert!(!claimed, "seed {seed}: a pinned block was evicted");
                    } else {
                        assert_eq!(claimed, wanted.is_some(), "seed {seed}");
                    }
                    assert_eq!(
                        table.state(block),
                        wanted.filter(|_| claimed).unwrap_or(before)
                    );
                    table.pins.remove(&block);
                }
                let states: Vec<State> = (0..blocks as u32).map(|b| table.state(b)).collect();
                let count =
                    |wanted: fn(&State) -> bool| states.iter().filter(|s| wanted(s)).count();
                assert_eq!(
                    table.resident,
                    count(|s| *s == State::Resident),
                    "seed {seed}"
                );
                assert_eq!(
                    table.resting,
                    count(|s| *s == State::Resting),
                    "seed {seed}"
                );
                assert_eq!(table.owned, count(|s| s.exclusive()), "seed {seed}");
                assert_eq!(table.in_use(), table.owned > 0);
                let used = states
                    .chunks(per_span)
                    .filter(|span| span.iter().any(|s| *s != State::Absent))
                    .count();
                assert_eq!(table.spans_used, used, "seed {seed}");
                settled += table.settle_spans();
                assert_eq!(settled, used as i64, "seed {seed}");
            }
        }
    }

    #[test]
    fn nobody_takes_a_block_of_a_sealed_region_and_only_a_write_back_one_of_a_closed_region() {
        for state in [
            State::Absent,
            State::Resident,
            State::Resting,
            State::Poisoned,
        ] {
            for purpose in Purpose::ALL {
                for sealed in [false, true] {
                    let mut table = Table::new(1, 1, 1, 1);
                    table.set(0, state);
                    (table.closed, table.sealed) = (true, sealed);
                    let may = !sealed
                        && purpose == Purpose::Clean
                        && block::claim(state, purpose).is_some();
                    assert_eq!(table.claim(0, purpose), may, "{state:?} {purpose:?}");
                }
            }
        }
    }

    #[test]
    fn after_a_failed_sync_every_page_is_dirty_or_to_be_written_again() {
        for seed in 1..200u64 {
            let mut seed_now = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let (blocks, per_block) =
                (1 + random(&mut seed_now, 12), 1 << random(&mut seed_now, 4));
            let pages = blocks * per_block;
            let mut table = Table::new(blocks, pages, 4, per_block);
            let mut written = HashSet::new();
            for block in 0..blocks {
                table.set(block as u32, ENDS[random(&mut seed_now, 3)]);
            }
            for _ in 0..random(&mut seed_now, 20) {
                let page = random(&mut seed_now, pages);
                table.written(page..page + 1);
                written.insert(page);
            }
            let taken = table.take_unsynced();
            let gone = table.not_durable(&taken, per_block);
            let mut again = HashSet::new();
            while let Some(run) = table.next_unsure() {
                assert_eq!(
                    run.start / per_block,
                    (run.end - 1) / per_block,
                    "seed {seed}"
                );
                assert_eq!(table.state((run.start / per_block) as u32), State::Absent);
                again.extend(run.clone());
                table.sure(run);
            }
            assert_eq!(again.len(), gone, "seed {seed}");
            let dirty = written
                .iter()
                .filter(|page| table.home.any(**page..**page + 1));
            assert_eq!(dirty.count() + gone, written.len(), "seed {seed}");
            assert!(again.is_subset(&written), "seed {seed}");
        }
    }
}
