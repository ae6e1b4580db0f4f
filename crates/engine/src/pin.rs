//! Pins: blocks that stay mapped, for system calls, devices and impatient loops.
//!
//! A pinned block is resident and is not evicted. Through a pin with `write` a device may write behind
//! every page table (O_DIRECT reads into the region, io_uring's fixed buffers, RDMA): such blocks are
//! dirty at every flush until the pin ends, and once more when it does. Where the first write to a page is a
//! message (see `protect`), the pages under such a pin are never protected: a system call that writes them must
//! not need one.

use std::ops::Range;
use std::sync::Arc;

use crate::block::State;
use crate::body::Body;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::Evidence;
use crate::policy::Queue;
use crate::protect::Protected;
use crate::table::Table;

/// A pinned range; dropping it unpins.
#[derive(Debug)]
pub struct Pin {
    body: Arc<Body>,
    blocks: Range<u32>,
    write: bool,
    released: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

/// Adds a pin to a block; returns the bytes that are newly pinned.
fn add(table: &mut Table, body: &Body, block: u32, write: bool) -> u64 {
    let pins = table.pins.entry(block).or_default();
    pins.count += 1;
    pins.writers += u32::from(write);
    if pins.count == 1 {
        body.block_len(block) as u64
    } else {
        0
    }
}

/// Takes a pin away; returns the bytes that are pinned no more. Adds the block to `homeless` if it has to be
/// given a place in the queues again.
fn take(
    table: &mut Table,
    body: &Body,
    block: u32,
    write: bool,
    homeless: &mut Vec<(u32, Queue)>,
) -> u64 {
    // A pin that failed may cover blocks that it did not get: no device has written there.
    let had = matches!(
        table.state(block),
        State::Resident | State::Cleaning | State::Writing
    );
    if write && had {
        table.mark_dirty(body.pages(block));
    }
    let Some(pins) = table.pins.get_mut(&block) else {
        return 0;
    };
    pins.count -= 1;
    pins.writers -= u32::from(write);
    if pins.count > 0 {
        return 0;
    }
    forget_if_over(table, block, homeless);
    body.block_len(block) as u64
}

/// Forgets the pins of a block when the last has ended. It may have lost its place in the queues meanwhile.
fn forget_if_over(table: &mut Table, block: u32, homeless: &mut Vec<(u32, Queue)>) {
    let Some(pins) = table.pins.get(&block) else {
        return;
    };
    if pins.count > 0 || pins.holds > 0 {
        return;
    }
    if pins.unseated {
        let state = table.state(block);
        // Whoever cleans or writes it gives it back as it was; an entry in the wrong queue is dropped when
        // its turn comes.
        let owned = matches!(state, State::Cleaning | State::Writing);
        if owned || state == State::Resident {
            homeless.push((block, Queue::Mapped(table.memo(block).rank())));
        }
        if owned || state == State::Resting {
            homeless.push((block, Queue::Resting));
        }
    }
    table.pins.remove(&block);
}

/// Waits until a pinned block is resident.
fn make_resident(engine: &'static Engine, body: &Arc<Body>, block: u32) -> Result<(), Error> {
    use crate::block::Purpose;
    let mut since = None;
    loop {
        let mut table = body.lock();
        if table.closed {
            return Err(Error::Closed);
        }
        match table.state(block) {
            State::Resident => return Ok(()),
            State::Poisoned => return Err(crate::poison::error(&table, body, block)),
            State::Absent => {
                table.claim(block, Purpose::Fill);
                drop(table);
                engine.submit_fill(body, block);
            }
            State::Resting => {
                table.claim(block, Purpose::Map);
                drop(table);
                engine.bring_back(body, block);
            }
            _ => body.await_owner(&mut table, block, &mut since)?,
        }
    }
}

impl Pin {
    /// Pins `blocks` and makes them resident.
    pub(crate) fn new(
        engine: &'static Engine,
        body: &Arc<Body>,
        blocks: Range<u32>,
        write: bool,
    ) -> Result<Pin, Error> {
        if write && !body.writable() {
            return Err(Error::ReadOnly);
        }
        let mut fresh = 0;
        {
            let mut table = body.lock();
            for block in blocks.clone() {
                fresh += add(&mut table, body, block, write);
            }
        }
        let mut pin = Pin {
            body: body.clone(),
            blocks: blocks.clone(),
            write,
            released: false,
        };
        let pools = [body.own_pool.as_deref(), Some(&*engine.pool)];
        for (index, pool) in pools.iter().flatten().enumerate() {
            if let Err(room) = pool.pin(fresh) {
                for earlier in pools.iter().flatten().take(index) {
                    earlier.unpin(fresh);
                }
                pin.undo(engine);
                return Err(Error::Memory {
                    asked: fresh,
                    limit: room,
                    what: "the pin".into(),
                });
            }
        }
        for block in blocks {
            make_resident(engine, body, block)?;
            if write && engine.evidence(body) == Evidence::Table {
                // Whoever cleans the block from here on sees the pin, and leaves the pages writable.
                let mut table = body.lock();
                table.mark_dirty(body.pages(block));
                engine.protection(body).lift(body.pages(block));
            }
        }
        Ok(pin)
    }

    /// Takes the marks away without giving back what was never taken from the pools.
    fn undo(&mut self, engine: &Engine) -> u64 {
        self.released = true;
        let mut homeless = Vec::new();
        let mut table = self.body.lock();
        let freed = self
            .blocks
            .clone()
            .map(|block| take(&mut table, &self.body, block, self.write, &mut homeless))
            .sum();
        drop(table);
        for (block, queue) in homeless {
            engine.seat(&self.body, block, queue);
        }
        freed
    }

    /// Ends the pin. Does nothing the second time, or in a forked child.
    pub fn release(&mut self) {
        if self.released || self.body.generation != crate::fork::generation() {
            return;
        }
        if let Some(engine) = Engine::existing() {
            let freed = self.undo(engine);
            for pool in [self.body.own_pool.as_deref(), Some(&*engine.pool)]
                .into_iter()
                .flatten()
            {
                pool.unpin(freed);
            }
        }
    }

    /// The pinned range: offset and length in bytes.
    pub fn range(&self) -> (u64, u64) {
        let start = self.body.start(self.blocks.start) as u64;
        let end = (self.body.start(self.blocks.end) as u64).min(self.body.len as u64);
        (start, end.saturating_sub(start))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.release();
    }
}

/// Keeps one block resident for the length of a copy. It counts as one of the blocks that a thread needs
/// to run, not as pinned memory.
pub(crate) struct Hold<'a> {
    engine: &'static Engine,
    body: &'a Arc<Body>,
    block: u32,
}

impl<'a> Hold<'a> {
    pub(crate) fn new(
        engine: &'static Engine,
        body: &'a Arc<Body>,
        block: u32,
    ) -> Result<Hold<'a>, Error> {
        {
            let mut table = body.lock();
            if table.closed {
                return Err(Error::Closed);
            }
            table.holds += 1;
            table.pins.entry(block).or_default().holds += 1;
        }
        let hold = Hold {
            engine,
            body,
            block,
        };
        make_resident(engine, body, block)?;
        Ok(hold)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut table = self.body.lock();
        table.holds -= 1;
        let mut homeless = Vec::new();
        if let Some(pins) = table.pins.get_mut(&self.block) {
            pins.holds -= 1;
        }
        forget_if_over(&mut table, self.block, &mut homeless);
        self.body.changed(&table);
        drop(table);
        for (block, queue) in homeless {
            self.engine.seat(self.body, block, queue);
        }
    }
}
