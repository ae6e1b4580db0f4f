//! How a block leaves memory.
//!
//! First it is unmapped (zapped), and only then asked for evidence: after the zap nobody can dirty it any
//! more, so what the scan says is final. It rests for a while. Then what is dirty is written back, and the
//! memory is given back (punched). The block has one owner from before the zap to the end; a fault on it
//! waits.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::block::State;
use crate::body::Body;
use crate::clean::{overlap, write_resting};
use crate::engine::Engine;
use crate::error::Error;
use crate::homeward;
use crate::kernel::record;
use crate::policy::Queue;
use crate::room::claim_victim;
use crate::stats::add;
use crate::workers::Lead;

/// How often [`range`] unmaps a block that threads touch again and again.
const TRIES: u32 = 8;

/// Unmaps resident blocks. False if none of them could leave.
pub(crate) fn zap(engine: &Engine, body: &Body, blocks: Range<u32>) -> bool {
    let (mut left, mut run) = (false, blocks.start..blocks.start);
    for block in blocks {
        if claim_victim(engine, body, block, State::Resident) {
            run.end = block + 1;
            continue;
        }
        left |= unmap(engine, body, run);
        run = block + 1..block + 1;
    }
    left | unmap(engine, body, run)
}

/// Unmaps neighbours in state Evicting at one go; each rests afterwards, or is gone if its memory cannot rest. False
/// if there are none.
fn unmap(engine: &Engine, body: &Body, blocks: Range<u32>) -> bool {
    if blocks.is_empty() {
        return false;
    }
    body.memory
        .zap(body.start(blocks.start), body.len_of(&blocks))
        .expect("unmapping pages of the region's own mapping");
    let mut harvest = Vec::new();
    if body.memory.shared() {
        harvest = engine.harvest_zapped(body, body.pages_of(&blocks));
        record(&mut body.lock(), &harvest);
    }
    for block in blocks {
        has_been_unmapped(engine, body, block, &harvest);
    }
    true
}

fn has_been_unmapped(engine: &Engine, body: &Body, block: u32, harvest: &[Range<usize>]) {
    let len = body.block_len(block);
    let waited;
    if body.memory.shared() {
        let mut table = body.lock();
        if !table.was_cleaned(block) {
            engine.learn_written(body, block, || overlap(harvest, &body.pages(block)));
        }
        waited = body.release(&mut table, block, State::Resting);
        drop(table);
        engine.seat(body, block, Queue::Resting);
    } else {
        let mut table = body.lock();
        let memo = engine.pool_of(body).left(table.memo(block));
        table.set_memo(block, memo);
        waited = body.release(&mut table, block, State::Absent);
        let idle = table.hold_idle_span(block);
        drop(table);
        engine.give_back(body, len as u64);
        if idle {
            engine.release_tables(body, block);
        }
        add(&body.counters.evictions, 1);
    }
    if waited {
        engine.wake(body, block);
    }
}

/// Releases a resting block from memory. False if it could not leave: it is wanted, or it is dirty and
/// could not be written; then it stays, with its data.
pub(crate) fn release(engine: &Engine, body: &Body, block: u32, lead: &mut Lead) -> bool {
    if !claim_victim(engine, body, block, State::Resting) {
        return false;
    }
    let (start, len, page) = (body.start(block), body.block_len(block), body.memory.page());
    let mut runs = {
        let mut table = body.lock();
        if body.writable() {
            let runs = table.home.runs(body.pages(block));
            table.home.remove(body.pages(block));
            runs
        } else {
            Vec::new()
        }
    };
    if !runs.is_empty() {
        if body.refuses_writes(engine.now_ms()) {
            stay(engine, body, block, runs, None);
            return false;
        }
        lead.give_up();
        // The neighbours that rest dirty beside it will have to be written too: let the drain do it in
        // the order of the store.
        homeward::ask(engine);
    }
    while let Some(run) = runs.first().cloned() {
        let watch = lead.watch_write();
        let written = write_resting(engine, body, run.start * page, run.len() * page);
        lead.write_ended(watch);
        if let Err(error) = written {
            body.write_failed(engine.now_ms());
            stay(engine, body, block, runs, Some(error));
            return false;
        }
        body.lock().written(runs.remove(0));
    }
    engine.check_content(body, block);
    body.memory
        .punch(start, len)
        .expect("punching the region's own memory");
    let mut table = body.lock();
    let memo = engine.pool_of(body).left(table.memo(block));
    table.set_memo(block, memo);
    let waited = body.release(&mut table, block, State::Absent);
    let idle = table.hold_idle_span(block);
    drop(table);
    engine.give_back(body, len as u64);
    if idle {
        engine.release_tables(body, block);
    }
    add(&body.counters.evictions, 1);
    if waited {
        engine.wake(body, block);
    }
    true
}

/// Ends an eviction that did not come to its end: the block rests, with all its data.
fn stay(engine: &Engine, body: &Body, block: u32, dirty: Vec<Range<usize>>, error: Option<Error>) {
    let mut table = body.lock();
    for run in dirty {
        table.home.insert(run);
    }
    if let Some(error) = error {
        table.pending = Some(error);
        add(&body.counters.errors, 1);
    }
    let waited = body.release(&mut table, block, State::Resting);
    drop(table);
    engine.seat(body, block, Queue::Resting);
    if waited {
        engine.wake(body, block);
    }
}

/// Unmaps and releases a block now, whatever its place in the queues. False if it is pinned, owned by
/// somebody else, or could not be written back.
pub(crate) fn now(engine: &Engine, body: &Body, block: u32, lead: &mut Lead) -> bool {
    use crate::block::Purpose;
    let unmapped = {
        let mut table = body.lock();
        match table.state(block) {
            State::Resting => true,
            State::Resident if table.claim(block, Purpose::Evict) => false,
            _ => return matches!(table.state(block), State::Absent | State::Poisoned),
        }
    };
    if !unmapped {
        unmap(engine, body, block..block + 1);
    }
    body.lock().state(block) == State::Absent || release(engine, body, block, lead)
}

/// Unmaps and releases the blocks of a range that are not pinned, and waits for those that others own.
pub(crate) fn range(engine: &'static Engine, body: &Body, blocks: Range<u32>) -> Result<(), Error> {
    for block in blocks {
        let (mut tries, mut since) = (0, None);
        let began = Instant::now();
        while !now(engine, body, block, &mut Lead::none(engine)) {
            tries += 1;
            let mut table = body.lock();
            if table.closed {
                return Err(Error::Closed);
            }
            if table.pins.contains_key(&block) {
                break;
            }
            let state = table.state(block);
            if state == State::Resting {
                if let Some(error) = table.pending.take() {
                    return Err(error);
                }
                if body.stuck() && began.elapsed() > body.patience() {
                    return Err(body.block_stuck(block));
                }
                // The store refused a write a moment ago, or hangs in one.
                body.sleep(&mut table, Duration::from_millis(20));
            }
            if state == State::Resident && tries >= TRIES {
                // It left, and was touched again before it was gone, time after time.
                break;
            }
            if state.exclusive() {
                body.await_owner(&mut table, block, &mut since)?;
            }
        }
    }
    Ok(())
}
