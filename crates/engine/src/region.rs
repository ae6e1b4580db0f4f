//! The handle of a region: open, use, close.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use userfault_store::Store;

use crate::backing::Here;
use crate::block::State;
use crate::body::{Body, COPY_LIMIT, Plan};
use crate::clean;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::error::Error;
use crate::fork::{self, Kept};
use crate::kernel::record;
use crate::memory::{HUGE, Kind, Memory, hugetlb_free, small_page};
use crate::pin::Pin;
use crate::policy::Queue;
use crate::pool::Pool;
use crate::prefetch::{self, PrefetchTicket};
use crate::readahead::Advice;
use crate::signals;
use crate::stats::{self, Stats};
use crate::table::BlockError;
use crate::{Access, FaultWay, Pages, RegionOptions, access, evict, inline, poison, trace};

/// The largest block, bytes.
pub const LARGEST_BLOCK: usize = 64 << 20;

/// The block of "auto" on small pages, bytes: a fault costs a few microseconds beside the copy of so much.
pub const AUTO_SMALL: usize = 64 << 10;

/// Regions from this size on get huge pages with "auto", if the limit holds as many blocks of 2 MiB as
/// this size does. Bytes.
pub const AUTO_HUGE_FROM: u64 = 64 << 20;

const OPEN: u8 = 0;
const SEALED: u8 = 1;

/// Memory under user-space paging.
#[derive(Debug)]
pub struct Region {
    body: Arc<Body>,
    state: AtomicU8,
}

struct Shape {
    block: usize,
    huge: bool,
}

fn shape(options: &RegionOptions, store: &dyn Store, limit: u64) -> Result<Shape, Error> {
    let page = small_page();
    if let Some(block) = options.block
        && !(block.is_power_of_two() && (page..=LARGEST_BLOCK).contains(&block))
    {
        return Err(Error::Invalid(format!(
            "block is {block} bytes; it must be a power of two from {page} to {LARGEST_BLOCK}"
        )));
    }
    let preferred = store
        .preferred_block()
        .next_power_of_two()
        .clamp(page, LARGEST_BLOCK);
    let roomy = options.len >= AUTO_HUGE_FROM && limit >= AUTO_HUGE_FROM;
    match (options.pages, options.block) {
        (Pages::Huge, Some(block)) if block < HUGE => Err(Error::Invalid(format!(
            "pages=\"2MiB\" with a block of {block} bytes: a page is never larger than its block; ask for a block \
             of at least {HUGE} bytes or for pages=\"4KiB\""
        ))),
        (Pages::Huge, block) => Ok(Shape {
            block: block.unwrap_or(HUGE.max(preferred)),
            huge: true,
        }),
        (Pages::Small, block) => Ok(Shape {
            block: block.unwrap_or(AUTO_SMALL.max(preferred)),
            huge: false,
        }),
        (Pages::Auto, Some(block)) => Ok(Shape {
            block,
            huge: block >= HUGE && options.len >= HUGE as u64,
        }),
        (Pages::Auto, None) if roomy => Ok(Shape {
            block: HUGE.max(preferred),
            huge: true,
        }),
        (Pages::Auto, None) => {
            let block = AUTO_SMALL.max(preferred);
            Ok(Shape {
                block,
                huge: block >= HUGE && options.len >= HUGE as u64,
            })
        }
    }
}

fn memory(
    engine: &Engine,
    options: &RegionOptions,
    shape: &Shape,
    limit: u64,
) -> Result<Memory, Error> {
    let writable = options.access != Access::ReadOnly;
    let length = |page: usize| (options.len as usize).next_multiple_of(page);
    if shape.huge {
        let wanted = (options.len.min(limit)).div_ceil(HUGE as u64);
        let hugetlb = engine.abilities.hugetlb && hugetlb_free() >= wanted;
        let first = if hugetlb {
            Memory::new(Kind::Hugetlb, length(HUGE), writable)
        } else {
            Memory::new(Kind::HugeTmpfs, length(HUGE), writable)
        };
        match first {
            Ok(memory) => return Ok(memory),
            Err(error) if options.pages == Pages::Huge => return Err(error),
            Err(_) => {}
        }
    }
    let kind = if writable || shape.block > COPY_LIMIT {
        Kind::Small
    } else {
        Kind::Private
    };
    Memory::new(kind, length(small_page()), writable)
}

impl Region {
    /// Opens `options.len` bytes of `store` as memory.
    pub fn open(store: Arc<dyn Store>, options: RegionOptions) -> Result<Arc<Region>, Error> {
        let _shield = signals::shield();
        if options.len == 0 && !put_back(Defect::ArgumentsUnchecked) {
            return Err(Error::Invalid(
                "the region would be empty; the length must be at least 1 byte".into(),
            ));
        }
        if usize::try_from(options.len).is_err() || options.len > 1 << 46 {
            return Err(Error::Invalid(format!(
                "{} bytes do not fit into the address space",
                options.len
            )));
        }
        if options.access != Access::ReadOnly && !store.writable() {
            return Err(Error::ReadOnly);
        }
        let end = options.offset.checked_add(options.len);
        if end.is_none() || (options.access == Access::ReadWrite && end > Some(store.len())) {
            return Err(Error::Invalid(format!(
                "{} bytes at offset {} do not lie within {}, which has {} bytes and does not grow",
                options.len,
                options.offset,
                store.name(),
                store.len()
            )));
        }
        let engine = Engine::current()?;
        let inline = match options.fault {
            FaultWay::Threads => None,
            FaultWay::Inline => Some(engine.start_inline(options.access != Access::ReadOnly)?),
        };
        let limit = options
            .memory_limit
            .unwrap_or_else(|| engine.pool.figures().limit);
        let shape = shape(&options, &*store, limit)?;
        if options.len.div_ceil(shape.block as u64) > u64::from(u32::MAX) {
            return Err(Error::Invalid(format!(
                "{} bytes are too many for blocks of {} bytes; ask for larger blocks",
                options.len, shape.block
            )));
        }
        let memory = memory(engine, &options, &shape, limit)?;
        // A recording may hold regions to less than they asked for; their shape is the same.
        let own_limit = trace::limit().or(options.memory_limit);
        let own_pool = own_limit.map(|limit| Arc::new(Pool::new(limit)));
        let body = Arc::new(Body::new(Plan {
            id: engine.next_id(),
            name: options.name,
            access: options.access,
            on_error: options.on_error,
            retry_for: options.retry_for,
            read_turn: engine.read_turn(&store),
            store,
            store_offset: options.offset,
            len: options.len as usize,
            memory,
            backing: Box::new(Here),
            block: shape.block,
            own_pool,
            inline: inline.is_some(),
        }));
        if let Some(inline) = inline {
            inline.admit(&body)?;
            engine.pool.prepare_for_handlers();
            engine.pool_of(&body).prepare_for_handlers();
        }
        body.lock().tables_stay = !engine.frees_tables(&body);
        engine.pool.admit(body.block as u64);
        if let Some(own) = &body.own_pool {
            own.admit(body.block as u64);
        }
        engine.admit(&body);
        if let Some(recorder) = &engine.recorder {
            recorder.admit(&body, engine.pool_of(&body).figures().limit);
        }
        let region = Arc::new(Region {
            body,
            state: AtomicU8::new(OPEN),
        });
        fork::keep(&region.kept());
        engine.register(&region.body)?;
        Ok(region)
    }

    /// What a forked child must not get.
    fn kept(&self) -> Vec<Kept> {
        let memory = &self.body.memory;
        let mut kept = vec![Kept::Range(memory.main(), memory.len())];
        if memory.shared() {
            kept.push(Kept::Range(memory.view(), memory.len()));
        }
        kept.extend(memory.fd().map(Kept::Descriptor));
        kept
    }

    fn engine(&self) -> Result<&'static Engine, Error> {
        if self.body.generation != fork::generation() {
            return Err(Error::Forked);
        }
        if self.state.load(Ordering::Acquire) != OPEN {
            return Err(Error::Closed);
        }
        Engine::existing().ok_or(Error::Forked)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), Error> {
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.body.len as u64)
            && !put_back(Defect::ArgumentsUnchecked)
        {
            return Err(Error::Invalid(format!(
                "{len} bytes at offset {offset} lie outside of the region of {} bytes",
                self.body.len
            )));
        }
        Ok(())
    }

    /// Start of the memory.
    pub fn base(&self) -> *mut u8 {
        self.body.memory.main() as *mut u8
    }

    /// Bytes asked for.
    pub fn len(&self) -> usize {
        self.body.len
    }

    /// Never: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of a block.
    pub fn block(&self) -> usize {
        self.body.block
    }

    /// Bytes of a page of the memory.
    pub fn page(&self) -> usize {
        if self.body.memory.huge() {
            HUGE
        } else {
            small_page()
        }
    }

    /// What the memory is made of.
    pub fn pages(&self) -> &'static str {
        self.body.memory.kind().name()
    }

    /// Who answers its faults.
    pub fn fault(&self) -> FaultWay {
        if self.body.doors.is_some() {
            FaultWay::Inline
        } else {
            FaultWay::Threads
        }
    }

    /// Read-only or not.
    pub fn access(&self) -> Access {
        self.body.access
    }

    /// True once the region is closed, or belongs to another process.
    pub fn is_closed(&self) -> bool {
        self.engine().is_err()
    }

    /// True if system calls on absent memory wait like any touch; false if they fail with EFAULT.
    pub fn kernel_faults(&self) -> bool {
        self.body.doors.is_none()
            && Engine::existing().is_some_and(|engine| engine.uffd.kernel_faults())
    }

    /// Writes back what is dirty in a range, and returns when it, and everything written back before, is
    /// durable. Raises an error that the background write-back met since the last flush, once.
    pub fn flush(&self, offset: u64, len: u64) -> Result<(), Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        let engine = self.engine()?;
        clean::flush(engine, &self.body, self.body.blocks(offset, len))
    }

    /// Writes everything that is dirty to the store, which need not be durable afterwards. Only then does the
    /// store of a private region know what has been changed.
    pub fn write_out(&self) -> Result<(), Error> {
        let _shield = signals::shield();
        clean::write_out(self.engine()?, &self.body, 0..self.body.all_blocks())
    }

    /// Says how a range will be touched.
    pub fn advise(&self, offset: u64, len: u64, advice: Advice) -> Result<(), Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        self.engine()?;
        self.body.advise(self.body.blocks(offset, len), advice);
        Ok(())
    }

    /// Brings blocks in ahead of their touch; `(offset, length)` in bytes. What the limit cannot hold is
    /// left out.
    pub fn prefetch(&self, ranges: &[(u64, u64)]) -> Result<PrefetchTicket, Error> {
        let _shield = signals::shield();
        let engine = self.engine()?;
        if self.body.doors.is_some() {
            inline::look_after()?;
        } else {
            inline::keep_handler();
        }
        let mut blocks = Vec::with_capacity(ranges.len());
        for &(offset, len) in ranges {
            self.check(offset, len)?;
            if put_back(Defect::UnalignedPrefetchIsNothing)
                && !offset.is_multiple_of(self.body.block as u64)
            {
                continue;
            }
            blocks.push(self.body.blocks(offset, len));
        }
        Ok(prefetch::start(engine, &self.body, &blocks))
    }

    /// Brings a range in and keeps it there until the pin is dropped.
    pub fn pin(&self, offset: u64, len: u64, write: bool) -> Result<Pin, Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        Pin::new(
            self.engine()?,
            &self.body,
            self.body.blocks(offset, len),
            write,
        )
    }

    /// Writes back and releases the blocks of a range. Pinned blocks stay.
    pub fn evict(&self, offset: u64, len: u64) -> Result<(), Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        let (engine, body) = (self.engine()?, self.body.clone());
        let blocks = body.blocks(offset, len);
        clean::patiently(engine, &self.body, move || {
            evict::range(engine, &body, blocks)
        })
    }

    /// One byte for each block of a range: 0 absent, 1 resident, 2 resting, 3 poisoned. A block that is
    /// changing hands counts as what it was or will be in memory.
    pub fn resident(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        self.engine()?;
        let table = self.body.lock();
        Ok(self
            .body
            .blocks(offset, len)
            .map(|block| match table.state(block) {
                State::Absent | State::Filling => 0,
                State::Resident | State::Cleaning | State::Writing => 1,
                State::Resting | State::Evicting => 2,
                State::Poisoned | State::Poisoning => 3,
            })
            .collect())
    }

    /// The blocks that have been given up and not healed.
    pub fn errors(&self) -> Vec<BlockError> {
        let _shield = signals::shield();
        if self.body.generation != fork::generation() {
            return Vec::new();
        }
        self.body.lock().errors.clone()
    }

    /// Tries the poisoned blocks of a range again; returns the bytes healed. Fails with the first block
    /// that still cannot be had.
    pub fn heal(&self, offset: u64, len: u64) -> Result<u64, Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        let engine = self.engine()?;
        let mut healed = 0;
        for block in self.body.blocks(offset, len) {
            healed += poison::heal(engine, &self.body, block)?;
        }
        Ok(healed)
    }

    /// Copies bytes out without touching the memory.
    pub fn pread(&self, into: &mut [u8], offset: u64) -> Result<(), Error> {
        let _shield = signals::shield();
        self.check(offset, into.len() as u64)?;
        access::read(self.engine()?, &self.body, into, offset)
    }

    /// Copies bytes in without touching the memory. `data` may itself lie in a region.
    pub fn pwrite(&self, data: &[u8], offset: u64) -> Result<(), Error> {
        let _shield = signals::shield();
        self.check(offset, data.len() as u64)?;
        access::write(self.engine()?, &self.body, data, offset)
    }

    /// Reads up to `len` bytes of a descriptor into the region; returns how many there were.
    pub fn read_from_fd(
        &self,
        fd: std::os::fd::RawFd,
        offset: u64,
        len: u64,
    ) -> Result<u64, Error> {
        let _shield = signals::shield();
        self.check(offset, len)?;
        access::read_from(self.engine()?, &self.body, fd, offset, len)
    }

    /// Figures of this region.
    pub fn stats(&self) -> Stats {
        let _shield = signals::shield();
        if self.body.generation != fork::generation() {
            return Stats::default();
        }
        if self.body.doors.is_some() {
            inline::look_after_or_say();
        } else {
            inline::keep_handler();
        }
        let mut stats = of_body(&self.body);
        if let Some(engine) = Engine::existing() {
            stats.limit = engine.pool_of(&self.body).figures().limit;
            stats.without = engine.abilities.missing();
        }
        stats::percentiles(&[&self.body.counters.latency], &mut stats);
        stats
    }

    /// Flushes, then gives the memory up: a later touch is SIGSEGV. After an error the region is open as
    /// before, and the data is there. Closing again does nothing.
    pub fn close(&self) -> Result<(), Error> {
        let _shield = signals::shield();
        let engine = match self.engine() {
            Ok(engine) => engine,
            // In a forked child there is nothing to close, and the second close does nothing.
            Err(_) => return Ok(()),
        };
        let body = &self.body;
        if body.access == Access::Private {
            self.abandon();
            return Ok(());
        }
        clean::flush(engine, body, 0..body.all_blocks())?;
        {
            let mut table = body.lock();
            if table.closed {
                return Ok(());
            }
            table.closed = true;
        }
        let mut last = Ok(());
        if !self.wait_for_owners(body.patience() + Duration::from_secs(1)) {
            last = Err(self.still_owned());
        }
        // From here on nobody maps anything. What was written since the flush is still caught: unmap,
        // gather the evidence, write. A thread that touches meanwhile sleeps until the seal.
        let last = last
            .and_then(|()| self.gather())
            .and_then(|()| clean::flush(engine, body, 0..body.all_blocks()));
        if let Err(error) = last {
            body.lock().closed = false;
            for block in 0..body.all_blocks() {
                if body.lock().state(block) == State::Resting {
                    engine.seat(body, block, Queue::Resting);
                }
                engine.wake(body, block);
            }
            return Err(error);
        }
        for block in 0..body.all_blocks() {
            if engine.hashing && body.lock().state(block) == State::Resting {
                engine.check_content(body, block);
            }
        }
        self.seal(engine);
        Ok(())
    }

    /// Gives the memory up without writing anything back.
    pub fn abandon(&self) {
        let _shield = signals::shield();
        let Ok(engine) = self.engine() else { return };
        {
            let mut table = self.body.lock();
            if table.closed {
                return;
            }
            table.closed = true;
        }
        self.seal(engine);
    }

    /// Waits until nobody owns a block. False if somebody still does after so long.
    fn wait_for_owners(&self, at_most: Duration) -> bool {
        let began = Instant::now();
        let mut table = self.body.lock();
        while table.in_use() && began.elapsed() < at_most {
            self.body.sleep(&mut table, Duration::from_millis(50));
        }
        !table.in_use()
    }

    /// The error of a close that found a block whose owner does not come back.
    fn still_owned(&self) -> Error {
        let table = self.body.lock();
        let block = (0..self.body.all_blocks()).find(|block| table.state(*block).exclusive());
        drop(table);
        self.body.block_stuck(block.unwrap_or(0))
    }

    /// Unmaps everything and gathers the evidence.
    fn gather(&self) -> Result<(), Error> {
        let body = &self.body;
        let Some(engine) = Engine::existing() else {
            return Err(Error::Forked);
        };
        if !body.memory.shared() {
            return Ok(());
        }
        for block in 0..body.all_blocks() {
            {
                // Nobody maps a block any more, but the drain may be cleaning this one.
                let (mut table, mut since) = (body.lock(), None);
                while table.state(block).exclusive() {
                    body.await_owner(&mut table, block, &mut since)?;
                }
                if !table.claim_for_close(block) {
                    continue;
                }
            }
            let zapped = body.memory.zap(body.start(block), body.block_len(block));
            let harvest = engine.harvest_zapped(body, body.pages(block));
            let mut table = body.lock();
            record(&mut table, &harvest);
            let state = match zapped {
                Ok(()) => State::Resting,
                Err(_) => State::Resident,
            };
            let _ = body.release(&mut table, block, state);
            if zapped.is_err() {
                return Err(Error::last_os(
                    "madvise",
                    "the program changed the region's mapping itself",
                ));
            }
        }
        Ok(())
    }

    fn seal(&self, engine: &'static Engine) {
        let body = &self.body;
        body.lock().sealed = true;
        self.wait_for_owners(body.retry_for + Duration::from_secs(2));
        body.memory.seal();
        // Sleepers find PROT_NONE now, and get SIGSEGV instead of sleeping on.
        let _ = engine
            .uffd_of(body)
            .wake(body.memory.main(), body.memory.len());
        if let (Some(_), Some(inline)) = (&body.doors, engine.inline()) {
            inline.dismiss(body);
        }
        engine.dismiss(body);
        engine.pool_of(body).forget(body.id);
        engine.pool.dismiss(body.block as u64);
        let bytes = body.in_memory();
        body.given_back.store(bytes, Ordering::Release);
        engine.give_back(body, bytes);
        let idle = {
            let mut table = body.lock();
            table.forget_spans();
            table.quiet()
        };
        engine.settle_tables(body);
        if idle {
            engine.charge(body, -body.store_mapping.end());
            body.memory.drop_view();
            body.view_gone.store(true, Ordering::Release);
            let mut gone = self.kept();
            gone.remove(0);
            fork::forget(&gone);
        }
        // Otherwise a call of the store that has not come back may still use the view: it goes with the body.
        self.state.store(SEALED, Ordering::Release);
    }
}

impl Drop for Region {
    /// Nobody can hold a pointer into the memory any more.
    fn drop(&mut self) {
        if self.body.generation != fork::generation() {
            // The parent's memory is not mapped here; its descriptors were closed at the fork.
            std::mem::forget(self.body.clone());
            return;
        }
        if put_back(Defect::LeakAtClose) {
            return std::mem::forget(self.body.clone());
        }
        // The addresses stay taken until nobody has the body any more: a store that has not come back leaves
        // threads behind that may still use them.
        self.abandon();
    }
}

fn of_body(body: &Body) -> Stats {
    let mut stats = Stats {
        regions: 1,
        ..Stats::default()
    };
    body.counters.add_to(&mut stats);
    let table = body.lock();
    if table.sealed {
        // It has no memory any more.
        stats.regions = 0;
        return stats;
    }
    stats.resident = (table.resident * body.block) as u64;
    stats.resting = (table.resting * body.block) as u64;
    stats.used =
        ((table.resident + table.resting + table.owned) * body.block).min(body.memory.len()) as u64;
    stats.page_tables = table.spans_used as u64 * body.span_tables();
    stats.dirty = (table.home.count() * body.memory.page()) as u64;
    let pinned = table.pins.values().filter(|pins| pins.count > 0).count();
    stats.pinned = (pinned * body.block) as u64;
    if body.memory.kind() == Kind::Hugetlb {
        stats.hugetlb = stats.resident + stats.resting;
    }
    stats
}

/// Figures of the whole process.
pub fn stats() -> Stats {
    let _shield = signals::shield();
    inline::keep_handler();
    let mut total = Stats::default();
    let Some(engine) = Engine::existing() else {
        return total;
    };
    let bodies = engine.bodies();
    for body in &bodies {
        let one = of_body(body);
        body.counters.add_to(&mut total);
        total.regions += one.regions;
        total.resident += one.resident;
        total.resting += one.resting;
        total.hugetlb += one.hugetlb;
        total.page_tables += one.page_tables;
        total.dirty += one.dirty;
        total.pinned += one.pinned;
    }
    engine.past.add_to(&mut total);
    total.without = engine.abilities.missing();
    let figures = engine.pool.figures();
    (total.limit, total.used) = (figures.limit, figures.used);
    total.staging = engine.staging.bytes();
    let histograms: Vec<_> = bodies
        .iter()
        .map(|body| &body.counters.latency)
        .chain([&engine.past.latency])
        .collect();
    stats::percentiles(&histograms, &mut total);
    total
}

/// Sets the limit of the process; `None` is "auto". Returns the old one. Shrinking evicts at once.
pub fn set_memory_limit(limit: Option<u64>) -> Result<u64, Error> {
    let _shield = signals::shield();
    let engine = Engine::current()?;
    if limit == Some(0) {
        return Err(Error::Invalid(
            "a memory limit of 0 bytes: at least four blocks are needed to run".into(),
        ));
    }
    let old = engine
        .pool
        .set_limit(limit.unwrap_or_else(crate::limit::auto));
    *engine.auto_limit.lock() = limit.is_none();
    engine.shrink();
    Ok(old)
}
