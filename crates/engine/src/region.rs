//! The handle of a region: what a user may ask of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use userfault_store::Store;

use crate::backing::Here;
use crate::block::State;
use crate::body::{Body, Plan};
use crate::clean;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::error::Error;
use crate::fork::{self, Kept};
use crate::memory::{HUGE, small_page};
use crate::pin::Pin;
use crate::pool::Pool;
use crate::prefetch::{self, PrefetchTicket};
use crate::readahead::Advice;
use crate::signals;
use crate::stats::{self, Stats};
use crate::table::BlockError;
use crate::{
    Access, FaultWay, RegionOptions, access, evict, figures, inline, poison, shape, trace,
};

const OPEN: u8 = 0;
/// The state of a region that nobody can touch any more.
pub(crate) const SEALED: u8 = 1;

/// Memory under user-space paging.
#[derive(Debug)]
pub struct Region {
    pub(crate) body: Arc<Body>,
    pub(crate) state: AtomicU8,
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
        let shape = shape::shape(&options, &*store, limit)?;
        if options.len.div_ceil(shape.block as u64) > u64::from(u32::MAX) {
            return Err(Error::Invalid(format!(
                "{} bytes are too many for blocks of {} bytes; ask for larger blocks",
                options.len, shape.block
            )));
        }
        let memory = shape::memory(engine, &options, &shape, limit)?;
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
    pub(crate) fn kept(&self) -> Vec<Kept> {
        let memory = &self.body.memory;
        let mut kept = vec![Kept::Range(memory.main(), memory.len())];
        if memory.shared() {
            kept.push(Kept::Range(memory.view(), memory.len()));
        }
        kept.extend(memory.fd().map(Kept::Descriptor));
        kept
    }

    pub(crate) fn engine(&self) -> Result<&'static Engine, Error> {
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
        let mut stats = figures::of_body(&self.body);
        if let Some(engine) = Engine::existing() {
            stats.limit = engine.pool_of(&self.body).figures().limit;
            stats.without = engine.abilities.missing();
        }
        stats::percentiles(&[&self.body.counters.latency], &mut stats);
        stats
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
