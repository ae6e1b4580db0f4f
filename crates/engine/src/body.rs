//! A region as the engine sees it: memory, block table, home, and the pool that pays for it.
//!
//! [`crate::Region`] is the handle that users hold; faults, the drain and open tickets hold bodies.
//! Lock order: `table`, then the pool's lock. No I/O while `table` is held.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::lock::{Mutex, MutexGuard};
use userfault_store::Store;

use crate::backing::Backing;
use crate::block::State;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::errand;
use crate::error::Error;
use crate::futex::{self, Guard, Lock};
use crate::inline::Doors;
use crate::memory::{HUGE, Kind, Memory};
use crate::policy::Seat;
use crate::pool::Pool;
use crate::presumption::Presumption;
use crate::readahead::{Advice, Walks, Window};
use crate::shortage::Told;
use crate::stats::Counters;
use crate::store_mapping::StoreMapping;
use crate::table::Table;
use crate::{Access, Kept, OnError, fork};

/// Blocks up to this size on small pages are read into a buffer and put in place by UFFDIO_COPY, which
/// is faster there than reading into the view; larger ones are read into the view. Bytes.
pub(crate) const COPY_LIMIT: usize = 1 << 20;

/// A sync that makes less than this durable in a second counts as hung, beside the region's `retry_for`.
const SLOWEST_SYNC: u64 = 16 << 20;

/// How long evictions leave a store alone that refused a write, milliseconds.
const REFUSED_MS: u32 = 200;

/// The served part of a region.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) id: u32,
    pub(crate) generation: u32,
    pub(crate) name: String,
    pub(crate) access: Access,
    pub(crate) on_error: OnError,
    pub(crate) retry_for: Duration,
    pub(crate) store: StoreBox,
    /// Held during a read, for stores that take one at a time: one lock for all regions of a store.
    read_turn: Option<Arc<Mutex<()>>>,
    /// Where the region begins in its store, bytes.
    pub(crate) store_offset: u64,
    /// Bytes asked for; the mapping may be longer.
    pub(crate) len: usize,
    pub(crate) memory: Memory,
    /// How blocks come in, and who is woken.
    pub(crate) backing: Box<dyn Backing>,
    pub(crate) block: usize,
    /// The region's own pool, if it has a limit of its own.
    pub(crate) own_pool: Option<Arc<Pool>>,
    /// Held by a flush: a failed sync hides what another flush waits for.
    pub(crate) flushing: Mutex<()>,
    /// Until when evictions do not try the store again, milliseconds of the engine.
    refused_until: AtomicU32,
    pub(crate) shortage_told: Told,
    /// The store's file system cannot begin a read without waiting for it.
    grounded: AtomicBool,
    /// Calls of the store that were declared hung and have not come back.
    pub(crate) stuck: Arc<AtomicUsize>,
    /// True once the view is gone.
    pub(crate) view_gone: AtomicBool,
    /// Bytes in memory that close has given back to the pools.
    pub(crate) given_back: AtomicU64,
    /// True while what is dirty of it is written in the background.
    pub(crate) draining: AtomicBool,
    table: Lock<Table>,
    /// Grows when some block has changed state, if anybody sleeps on that.
    changes: AtomicU32,
    pub(crate) counters: Counters,
    walks: Lock<Walking>,
    pub(crate) presumption: Presumption,
    /// The store's file, where that is in memory.
    pub(crate) store_mapping: StoreMapping,
    /// Where the touchers of a region with `fault="inline"` sleep; `None` if its faults are messages.
    pub(crate) doors: Option<Doors>,
}

/// What is known of how the region is walked, and what the program says of it.
#[derive(Debug, Default)]
struct Walking {
    walks: Walks,
    advice: Vec<(Range<u32>, Advice)>,
}

impl Walking {
    fn advice(&self, block: u32) -> Advice {
        self.advice
            .iter()
            .rev()
            .find(|(blocks, _)| blocks.contains(&block))
            .map_or(Advice::Normal, |(_, advice)| *advice)
    }

    /// As [`Walks::fault`], by what the program says of the block.
    fn fault(&mut self, thread: u32, block: u32, longest: impl FnOnce() -> u32) -> Option<Window> {
        let advice = self.advice(block);
        self.walks.fault(thread, block, longest, advice)
    }
}

/// A store, with a name to print.
pub(crate) struct StoreBox(pub(crate) Arc<dyn Store>);

impl std::fmt::Debug for StoreBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.name())
    }
}

/// What a body is made from.
pub(crate) struct Plan {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) access: Access,
    pub(crate) on_error: OnError,
    pub(crate) retry_for: Duration,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) read_turn: Option<Arc<Mutex<()>>>,
    pub(crate) store_offset: u64,
    pub(crate) len: usize,
    pub(crate) memory: Memory,
    pub(crate) backing: Box<dyn Backing>,
    pub(crate) block: usize,
    pub(crate) own_pool: Option<Arc<Pool>>,
    /// True if faults are answered in the touching thread.
    pub(crate) inline: bool,
}

impl Drop for Body {
    /// Nobody can hold a pointer into the memory any more, and no call of the store is under way: what close
    /// had to leave, since somebody did not come back, goes now.
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        let (main, view) = (self.memory.main(), self.memory.view());
        if !self.view_gone.load(Ordering::Acquire) {
            self.memory.drop_view();
            fork::forget(&[Kept::Range(view, self.memory.len())]);
            if let Some(fd) = self.memory.fd() {
                // The number will be somebody else's: a child must not close that one.
                fork::forget(&[Kept::Descriptor(fd)]);
            }
        }
        fork::forget(&[Kept::Range(main, self.memory.len())]);
        if self.doors.is_some()
            && let Some(inline) = Engine::existing().and_then(Engine::inline)
        {
            inline.forget(main);
        }
        self.memory.unmap_main();
        let tables = self.store_mapping.end();
        if let Some(engine) = Engine::existing() {
            engine.charge(self, -tables);
            let before = self.given_back.load(Ordering::Acquire);
            let late = self.in_memory().saturating_sub(before);
            engine.give_back(self, late);
        }
    }
}

impl Body {
    pub(crate) fn new(plan: Plan) -> Body {
        let blocks = plan.memory.len().div_ceil(plan.block);
        let pages = if plan.access != Access::ReadOnly {
            plan.memory.len() / plan.memory.page()
        } else {
            0
        };
        let pages_per_block = plan.block / plan.memory.page();
        Body {
            id: plan.id,
            generation: fork::generation(),
            name: plan.name,
            access: plan.access,
            on_error: plan.on_error,
            retry_for: plan.retry_for,
            read_turn: plan.read_turn,
            store: StoreBox(plan.store),
            store_offset: if put_back(Defect::OffsetIgnored) {
                0
            } else {
                plan.store_offset
            },
            len: plan.len,
            memory: plan.memory,
            backing: plan.backing,
            block: plan.block,
            own_pool: plan.own_pool,
            flushing: Mutex::new(()),
            refused_until: AtomicU32::new(0),
            shortage_told: Told::default(),
            grounded: AtomicBool::new(false),
            stuck: Arc::default(),
            view_gone: AtomicBool::new(false),
            given_back: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            table: Lock::new(Table::new(
                blocks,
                pages,
                (HUGE / plan.block).max(1),
                pages_per_block,
            )),
            changes: AtomicU32::new(0),
            counters: Counters::new(),
            walks: Lock::default(),
            presumption: Presumption::default(),
            store_mapping: StoreMapping::default(),
            doors: plan.inline.then(Doors::default),
        }
    }

    pub(crate) fn writable(&self) -> bool {
        self.access != Access::ReadOnly
    }

    /// True if blocks are read into a buffer and copied into place.
    pub(crate) fn by_copy(&self) -> bool {
        self.memory.kind() == Kind::Elsewhere || (!self.memory.huge() && self.block <= COPY_LIMIT)
    }

    pub(crate) fn seat(&self, block: u32) -> Seat {
        Seat {
            region: self.id,
            block,
        }
    }

    /// Offset of a block in the region, bytes.
    pub(crate) fn start(&self, block: u32) -> usize {
        block as usize * self.block
    }

    /// Mapped length of a block, bytes: the last one may be shorter.
    pub(crate) fn block_len(&self, block: u32) -> usize {
        self.block.min(self.memory.len() - self.start(block))
    }

    /// Address of a block in the user's mapping.
    pub(crate) fn address(&self, block: u32) -> usize {
        self.memory.main() + self.start(block)
    }

    /// The pages of a block.
    pub(crate) fn pages(&self, block: u32) -> Range<usize> {
        let start = self.start(block) / self.memory.page();
        start..start + self.block_len(block) / self.memory.page()
    }

    /// The pages of some neighbours, at least one.
    pub(crate) fn pages_of(&self, blocks: &Range<u32>) -> Range<usize> {
        self.pages(blocks.start).start..self.pages(blocks.end - 1).end
    }

    /// Mapped length of neighbours, bytes.
    pub(crate) fn len_of(&self, blocks: &Range<u32>) -> usize {
        let end = self.memory.len().min(self.start(blocks.end));
        end.saturating_sub(self.start(blocks.start))
    }

    /// The span of a block: what one page table of the user's mapping covers, or the block if that is
    /// larger. Start and length in the region, bytes.
    pub(crate) fn span(&self, block: u32) -> (usize, usize) {
        let len = self.block.max(HUGE);
        let start = self.start(block) / len * len;
        (start, len.min(self.memory.len() - start))
    }

    /// Page tables that a span in use needs, in both mappings, bytes.
    pub(crate) fn span_tables(&self) -> u64 {
        let tables = (self.block.max(HUGE) / HUGE * crate::memory::small_page()) as u64;
        match self.memory.kind() {
            Kind::Hugetlb | Kind::Elsewhere => 0,
            // The view of huge pages needs no table of its own.
            Kind::Private | Kind::HugeTmpfs => tables,
            Kind::Small => 2 * tables,
        }
    }

    /// The blocks that `len` bytes at `offset` touch.
    pub(crate) fn blocks(&self, offset: u64, len: u64) -> Range<u32> {
        if len == 0 {
            return 0..0;
        }
        let first = offset / self.block as u64;
        let last = (offset + len - 1) / self.block as u64;
        first as u32..last as u32 + 1
    }

    /// The part of `len` bytes at `start` that the store has: the tail of the mapping is not in it.
    pub(crate) fn stored(&self, start: usize, len: usize) -> usize {
        if put_back(Defect::TailIsStored) {
            return len;
        }
        len.min(self.len.saturating_sub(start))
    }

    /// Notes what the program says of some blocks.
    pub(crate) fn advise(&self, blocks: Range<u32>, advice: Advice) {
        let list = &mut self.walks.lock().advice;
        // What is covered whole by the new word is forgotten, so that the list stays short.
        list.retain(|(old, _)| old.start < blocks.start || old.end > blocks.end);
        list.push((blocks, advice));
    }

    /// Bytes of the blocks in memory that nobody owns.
    pub(crate) fn in_memory(&self) -> u64 {
        let table = self.lock();
        let bytes: usize = (0..table.blocks() as u32)
            .filter(|block| matches!(table.state(*block), State::Resident | State::Resting))
            .map(|block| self.block_len(block))
            .sum();
        bytes as u64
    }

    /// Notes a missing fault; returns what its walk will touch next, at most `longest` blocks.
    pub(crate) fn walked(
        &self,
        thread: u32,
        block: u32,
        longest: impl FnOnce() -> u32,
    ) -> Option<Window> {
        self.walks.lock().fault(thread, block, longest)
    }

    /// As [`Body::walked`], in the handler of SIGBUS.
    pub(crate) fn walked_in_handler(
        &self,
        thread: u32,
        block: u32,
        longest: impl FnOnce() -> u32,
    ) -> Option<Window> {
        self.walks.lock_in_handler().fault(thread, block, longest)
    }

    /// Number of blocks.
    pub(crate) fn all_blocks(&self) -> u32 {
        self.memory.len().div_ceil(self.block) as u32
    }

    pub(crate) fn lock(&self) -> Guard<'_, Table> {
        self.table.lock()
    }

    /// As [`Body::lock`], in the handler of SIGBUS.
    pub(crate) fn lock_in_handler(&self) -> Guard<'_, Table> {
        self.table.lock_in_handler()
    }

    /// Sleeps until some block changes state, at most `at_most`.
    pub(crate) fn sleep(&self, table: &mut Guard<'_, Table>, at_most: Duration) {
        table.sleepers += 1;
        let seen = self.changes.load(Ordering::SeqCst);
        table.sleep(&self.changes, seen, at_most);
        table.sleepers -= 1;
    }

    /// Ends ownership of a block. True if a toucher waits and must be woken.
    pub(crate) fn release(&self, table: &mut Table, block: u32, state: State) -> bool {
        if table.take_given_up(block) {
            // The poison lay there only for as long as nobody knew when the owner would come back.
            if let Some(engine) = Engine::existing() {
                let _ = engine.lift_poison(self, table, block);
            }
            let offset = self.start(block) as u64;
            table.errors.retain(|error| error.offset != offset);
        }
        let waited = table.release(block, state);
        self.changed(table);
        if let Some(doors) = &self.doors {
            doors.open(block);
        }
        waited
    }

    /// Wakes the callers that sleep until something changes.
    pub(crate) fn changed(&self, table: &Table) {
        if table.sleepers > 0 {
            self.changes.fetch_add(1, Ordering::SeqCst);
            futex::wake(&self.changes, i32::MAX);
        }
    }

    /// Reads a block's bytes from the store; the tail beyond the region is zeroed.
    pub(crate) fn read_store(
        &self,
        start: usize,
        into: &mut [u8],
        now: bool,
    ) -> std::io::Result<bool> {
        let stored = self.stored(start, into.len());
        let (bytes, tail) = into.split_at_mut(stored);
        let offset = self.store_offset + start as u64;
        let Some(_turn) = self.turn(now) else {
            return Ok(false);
        };
        let read = if now {
            self.store.0.read_now(offset, bytes)?
        } else {
            self.store.0.read(offset, bytes)?;
            true
        };
        if read {
            tail.fill(0);
            crate::stats::add(&self.counters.bytes_read, stored as u64);
        }
        Ok(read)
    }

    /// A descriptor from which a range of the store can be read in flight, and the offset there.
    pub(crate) fn direct(&self, offset: u64, len: usize) -> Option<(BorrowedFd<'_>, u64)> {
        if self.read_turn.is_some() {
            return None;
        }
        self.store.0.direct(offset, len)
    }

    /// True if the store's reads do not fly.
    pub(crate) fn grounded(&self) -> bool {
        self.grounded.load(Ordering::Relaxed)
    }

    /// Notes that the store's file system cannot begin a read without waiting.
    pub(crate) fn ground(&self) {
        self.grounded.store(true, Ordering::Relaxed);
    }

    /// As [`Body::read_store`], in a handler of SIGBUS. False: the ordinary way has to read it.
    pub(crate) fn read_bare(&self, start: usize, into: &mut [u8]) -> bool {
        let stored = self.stored(start, into.len());
        let (bytes, tail) = into.split_at_mut(stored);
        let offset = self.store_offset + start as u64;
        if self.read_turn.is_some() || !self.store.0.read_bare(offset, bytes) {
            return false;
        }
        tail.fill(0);
        crate::stats::add(&self.counters.bytes_read, stored as u64);
        true
    }

    /// Writes bytes to the store; what lies beyond the region is left out.
    pub(crate) fn write_store(
        &self,
        start: usize,
        bytes: &[u8],
        leaving: bool,
    ) -> Result<(), Error> {
        let bytes = &bytes[..self.stored(start, bytes.len())];
        if bytes.is_empty() {
            return Ok(());
        }
        let offset = self.store_offset + start as u64;
        let store = &self.store.0;
        let call = ("write", offset, bytes.len() as u64);
        let written = errand::call(store, call, self.patience(), &self.stuck, || {
            if leaving {
                store.write_leaving(offset, bytes)
            } else {
                store.write(offset, bytes)
            }
        });
        match written {
            Ok(()) => {
                crate::stats::add(&self.counters.bytes_written, bytes.len() as u64);
                Ok(())
            }
            Err(error) => Err(Error::store(
                &*self.store.0,
                "write",
                offset,
                bytes.len() as u64,
                &error,
            )),
        }
    }

    /// Has the store make durable what it was given. `bytes` were, since the last time.
    pub(crate) fn sync_store(&self, bytes: u64) -> Result<(), Error> {
        let store = &self.store.0;
        let (offset, len) = (self.store_offset, self.len as u64);
        let patience = self.patience() + Duration::from_secs(bytes / SLOWEST_SYNC);
        errand::call(store, ("sync", offset, len), patience, &self.stuck, || {
            store.sync()
        })
        .map_err(|error| Error::store(&**store, "sync", offset, len, &error))
    }

    /// How long a write may take before whoever waits for it is told that it hangs.
    pub(crate) fn patience(&self) -> Duration {
        self.retry_for.max(errand::LEAST)
    }

    /// True while a call of the store hangs.
    pub(crate) fn stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed) > 0
    }

    /// The error of a caller who waited too long for a block that somebody else writes.
    pub(crate) fn block_stuck(&self, block: u32) -> Error {
        let (offset, len) = (self.start(block), self.block_len(block));
        let offset = self.store_offset + offset as u64;
        errand::late(&*self.store.0, "write", offset, len as u64, self.patience())
    }

    /// Sleeps until a block changes state, or fails when its owner has had it for too long. Fills, and what
    /// follows them, have deadlines of their own. `since` is the caller's, `None` at first.
    pub(crate) fn await_owner(
        &self,
        table: &mut Guard<'_, Table>,
        block: u32,
        since: &mut Option<Instant>,
    ) -> Result<(), Error> {
        let began = *since.get_or_insert_with(Instant::now);
        let writing = matches!(
            table.state(block),
            State::Evicting | State::Cleaning | State::Writing
        );
        if writing && began.elapsed() > self.patience() {
            return Err(self.block_stuck(block));
        }
        if !writing {
            *since = None;
        }
        self.sleep(table, Duration::from_millis(100));
        Ok(())
    }

    /// Notes that the store refused a write: evictions leave it alone for a while.
    pub(crate) fn write_failed(&self, now: u32) {
        let until = now.wrapping_add(REFUSED_MS).max(1);
        self.refused_until.store(until, Ordering::Relaxed);
    }

    /// True if the store refused a write a moment ago, or does not come back from one. A store that refuses is not hammered, and a fault
    /// that needs room does not wait for one error after the other.
    pub(crate) fn refuses_writes(&self, now: u32) -> bool {
        let until = self.refused_until.load(Ordering::Relaxed);
        self.stuck() || until != 0 && (until.wrapping_sub(now) as i32) > 0
    }

    /// Waits for the store's turn, if it can do one read at a time only. With `now`, `None` says that
    /// another read is under way.
    fn turn(&self, now: bool) -> Option<Option<MutexGuard<'_, ()>>> {
        match &self.read_turn {
            None => Some(None),
            Some(turn) if now => turn.try_lock().map(Some),
            Some(turn) => Some(Some(turn.lock())),
        }
    }

    /// True if a failed read is tried again.
    pub(crate) fn retries(&self) -> bool {
        match self.on_error {
            OnError::Auto => self.store.0.remote(),
            OnError::Retry => true,
            OnError::Poison => false,
        }
    }
}
