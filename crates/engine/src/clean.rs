//! Write-back: dirty pages go home.
//!
//! Neighbouring blocks are cleaned together. They are held in state Cleaning from before the scan to
//! after the write, so that no older bytes can overtake newer ones on their way to the store; the program
//! goes on touching what is mapped. The dirty bits are taken out first and the scan's harvest is put in,
//! then the bits are read: what is written meanwhile sets new bits or is found by the next scan, and an
//! error puts the bits back. Where the table itself knows what was written (see `protect`), pages are protected
//! again once their bits are taken, and before they are copied. Bytes of mapped blocks are copied before they are written: the program may change
//! them while a store computes a checksum.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Access;
use crate::block::{Purpose, State};
use crate::body::Body;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::errand::{call, late};
use crate::error::Error;
use crate::kernel::{Evidence, record};
use crate::protect::protect_again;
use crate::staging;
use crate::stats::add;

/// Blocks that are cleaned together, bytes.
const TOGETHER: usize = 1 << 20;

/// Which blocks are worth a write now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// Everything in memory, also what somebody else is writing: a flush.
    All,
    /// Everything in memory that nobody owns now.
    Free,
    /// What rests and is dirty: it will not change any more before it leaves.
    Resting,
}

/// Cleans the blocks of `blocks`, in order. Stops at the first error; everything stays dirty that was not
/// written.
pub(crate) fn clean(
    engine: &'static Engine,
    body: &Body,
    blocks: Range<u32>,
    which: Which,
) -> Result<(), Error> {
    clean_for(engine, body, blocks, which, false)
}

/// As [`clean`], for nobody who waits: an error is kept for the next flush before anybody else can have the
/// block that it was met with.
pub(crate) fn clean_behind(
    engine: &'static Engine,
    body: &Body,
    blocks: Range<u32>,
    which: Which,
) -> Result<(), Error> {
    clean_for(engine, body, blocks, which, true)
}

fn clean_for(
    engine: &'static Engine,
    body: &Body,
    blocks: Range<u32>,
    which: Which,
    behind: bool,
) -> Result<(), Error> {
    let mut next = blocks.start;
    while next < blocks.end {
        let held = hold(engine, body, next..blocks.end, which)?;
        let Some(last) = held.last() else {
            return Ok(());
        };
        next = last.block + 1;
        write_back(engine, body, &held, behind)?;
    }
    Ok(())
}

struct Held {
    block: u32,
    mapped: bool,
    /// It was not cleaned before, since it was mapped.
    first: bool,
}

/// Claims the next run of neighbouring blocks that may be dirty.
fn hold(
    engine: &Engine,
    body: &Body,
    blocks: Range<u32>,
    which: Which,
) -> Result<Vec<Held>, Error> {
    let exact = engine.evidence(body) == Evidence::Table;
    let mut held: Vec<Held> = Vec::new();
    let mut since = None;
    let mut table = body.lock();
    let mut block = blocks.start;
    while block < blocks.end && held.len() * body.block < TOGETHER.max(body.block) {
        let state = table.state(block);
        let wanted = match state {
            State::Resident if exact => {
                which != Which::Resting
                    && (table.home.any(body.pages(block)) || table.write_pinned(block))
            }
            State::Resident => which != Which::Resting,
            State::Resting => table.home.any(body.pages(block)),
            _ => false,
        };
        let wanted =
            wanted && !(put_back(Defect::PinnedIsNotWritten) && table.pins.contains_key(&block));
        let first = !table.was_cleaned(block);
        if wanted && table.claim(block, Purpose::Clean) {
            held.push(Held {
                block,
                mapped: state == State::Resident,
                first,
            });
        } else if !held.is_empty() && !put_back(Defect::FlushHoldsAndWaits) {
            // Whoever holds blocks waits for none.
            break;
        } else if state.exclusive() && which == Which::All {
            // A flush covers what its owner is doing: it may be a write-back that fails.
            body.await_owner(&mut table, block, &mut since)?;
            continue;
        } else if !wanted && which == Which::Resting {
            // Jump to the next page that is known to be dirty.
            let pages = body.pages(block);
            match table.home.next(pages.end, table.home_pages()) {
                Some(page) => {
                    block = (page * body.memory.page() / body.block) as u32;
                    continue;
                }
                None => break,
            }
        }
        block += 1;
        since = None;
    }
    while put_back(Defect::FlushHoldsAndWaits) && !held.is_empty() && table.owned > held.len() {
        body.sleep(&mut table, Duration::from_millis(100));
    }
    Ok(held)
}

/// The blocks of a run, which has one at least.
fn blocks(held: &[Held]) -> Range<u32> {
    held[0].block..held[held.len() - 1].block + 1
}

/// Writes bytes of blocks that rest and that the caller owns: they cannot change, and are written as they stand.
pub(crate) fn write_resting(
    engine: &Engine,
    body: &Body,
    start: usize,
    len: usize,
) -> Result<(), Error> {
    if engine.write_to_store(body, start, len) {
        return Ok(());
    }
    if !body.memory.is_copied_out() {
        return body.write_store(start, body.memory.resting_bytes(start, len), true);
    }
    staging::with(engine, len, |bytes| {
        body.memory.copy_held(start, bytes);
        body.write_store(start, bytes, true)
    })
}

fn write_back(
    engine: &'static Engine,
    body: &Body,
    held: &[Held],
    behind: bool,
) -> Result<(), Error> {
    let page = body.memory.page();
    let pages = body.pages_of(&blocks(held));
    for run in held
        .chunk_by(|a, b| a.mapped == b.mapped)
        .filter(|run| run[0].mapped)
    {
        let harvest = engine.harvest_mapped(body, body.pages_of(&blocks(run)));
        for held in run.iter().filter(|held| held.first) {
            engine.learn_written(body, held.block, || {
                overlap(&harvest, &body.pages(held.block))
            });
        }
        record(&mut body.lock(), &harvest);
    }
    let mut mapped = Vec::new();
    let mut runs = {
        let mut table = body.lock();
        for held in held {
            if table.write_pinned(held.block) {
                // A device writes behind the page tables: everything may have changed.
                table.mark_dirty(body.pages(held.block));
            } else if held.mapped {
                mapped.push(body.pages(held.block));
            }
        }
        let runs = table.home.runs(pages.clone());
        table.home.remove(pages);
        runs
    };
    let still_writable = if engine.evidence(body) == Evidence::Table {
        protect_again(&engine.protection(body), mapped)
    } else {
        Vec::new()
    };
    for held in held {
        if !still_writable.contains(&body.pages(held.block)) {
            engine.note_cleaned(body, held.block);
        }
    }
    let resting = held.iter().all(|held| !held.mapped);
    let mut result = Ok(());
    while let Some(run) = runs.first_mut() {
        let part = run.start..run.end.min(run.start + (TOGETHER / page).max(1));
        let (start, len) = (part.start * page, part.len() * page);
        result = if resting {
            write_resting(engine, body, start, len)
        } else {
            staging::with(engine, len, |buffer| {
                body.memory.copy_held(start, buffer);
                body.write_store(start, buffer, false)
            })
        };
        if result.is_err() {
            body.write_failed(engine.now_ms());
            break;
        }
        body.lock().written(part.clone());
        run.start = part.end;
        if run.start == run.end {
            runs.remove(0);
        }
    }
    let mut table = body.lock();
    for run in runs.into_iter().chain(still_writable) {
        table.home.insert(run);
    }
    if let Err(error) = &result {
        add(&body.counters.errors, 1);
        if behind {
            table.pending = Some(error.clone());
        }
    }
    let mut waited = Vec::new();
    for held in held {
        if table.write_pinned(held.block) {
            table.mark_dirty(body.pages(held.block));
        }
        let state = if held.mapped {
            State::Resident
        } else {
            State::Resting
        };
        if body.release(&mut table, held.block, state) {
            waited.push(held.block);
        }
    }
    drop(table);
    for block in waited {
        engine.wake(body, block);
    }
    result
}

/// Pages of `harvest` that are among `pages`.
pub(crate) fn overlap(harvest: &[Range<usize>], pages: &Range<usize>) -> usize {
    harvest
        .iter()
        .map(|run| {
            run.end
                .min(pages.end)
                .saturating_sub(run.start.max(pages.start))
        })
        .sum()
}

/// Writes back everything in `blocks` and makes it durable. An error that the background write-back met
/// since the last flush is raised once. A store that does not come back is an error too.
pub(crate) fn flush(
    engine: &'static Engine,
    body: &Arc<Body>,
    blocks: Range<u32>,
) -> Result<(), Error> {
    if body.access != Access::ReadWrite {
        // Private changes are nobody's to keep.
        return Ok(());
    }
    let mine = body.clone();
    patiently(engine, body, move || flush_now(engine, &mine, blocks))
}

/// As [`clean`], but a store that does not come back is an error.
pub(crate) fn write_out(
    engine: &'static Engine,
    body: &Arc<Body>,
    blocks: Range<u32>,
) -> Result<(), Error> {
    let mine = body.clone();
    patiently(engine, body, move || {
        clean(engine, &mine, blocks, Which::All)
    })
}

/// Runs a write-back that its caller may leave. An error that it meets then is for the next flush.
pub(crate) fn patiently(
    engine: &'static Engine,
    body: &Arc<Body>,
    work: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<(), Error> {
    let body = body.clone();
    engine.errand(work, move |result| keep_error(&body, result))?
}

/// Keeps the error of a write-back that nobody waits for.
pub(crate) fn keep_error(body: &Body, result: Result<(), Error>) {
    if let Err(error) = result {
        body.lock().pending = Some(error);
    }
}

fn flush_now(engine: &'static Engine, body: &Body, blocks: Range<u32>) -> Result<(), Error> {
    let began = Instant::now();
    let _one = loop {
        if let Some(turn) = body.flushing.try_lock() {
            break turn;
        }
        std::thread::sleep(Duration::from_millis(1));
        if body.stuck() && began.elapsed() > body.patience() {
            let (offset, len) = (body.store_offset, body.len as u64);
            return Err(late(
                &*body.store.0,
                "an earlier flush",
                offset,
                len,
                body.patience(),
            ));
        }
    };
    let met = body.lock().pending.take();
    let cleaned = write_again(engine, body).and_then(|()| clean(engine, body, blocks, Which::All));
    let synced = cleaned.and_then(|()| sync(body));
    // It may have met one while this flush waited for its blocks.
    let met = met.or(body.lock().pending.take());
    // What failed in the background has been tried again just now. It is raised all the same, once: the
    // program may want to know that its store refuses writes.
    synced.and(met.map_or(Ok(()), Err))
}

/// Makes durable what was written. After an error what is still in memory is dirty again, since the store
/// may have forgotten any of it. What has left memory since the last sync is read and written again by the
/// next flush: that mends it if the store still has it somewhere, as a page cache does. If not, the error is
/// all that tells of it, so it says how much there is.
fn sync(body: &Body) -> Result<(), Error> {
    let page = body.memory.page();
    let written = body.lock().take_unsynced();
    let bytes = (written.count() * page) as u64;
    body.sync_store(bytes).map_err(|mut error| {
        let gone = body.lock().not_durable(&written, body.block / page);
        if let Error::Store { message, .. } = &mut error
            && gone > 0
        {
            message.push_str(&format!(
                "; of what was written since the last sync {} bytes have left memory: the next flush writes them \
                 again, as the store has them then",
                gone * page
            ));
        }
        error
    })
}

/// Bytes that are read and written again at once: less than what a file store reads past the page cache, in
/// which alone they may be.
const AGAIN: usize = 64 << 10;

/// Reads and writes again what had left memory when a sync failed.
fn write_again(engine: &'static Engine, body: &Body) -> Result<(), Error> {
    let page = body.memory.page();
    let mut since = None;
    loop {
        let mut table = body.lock();
        let Some(run) = table.next_unsure() else {
            return Ok(());
        };
        let run = run.start..run.end.min(run.start + (AGAIN / page).max(1));
        let block = (run.start * page / body.block) as u32;
        match table.state(block) {
            State::Absent if table.claim(block, Purpose::Write) => {}
            State::Absent => return Err(Error::Closed),
            // It was read from the store since, or is a part of what was.
            State::Resident | State::Resting => {
                table.mark_dirty(run.clone());
                table.sure(run);
                continue;
            }
            State::Poisoned => {
                table.sure(run);
                continue;
            }
            _ => {
                body.await_owner(&mut table, block, &mut since)?;
                continue;
            }
        }
        drop(table);
        let (start, len) = (run.start * page, run.len() * page);
        let done = staging::with(engine, len, |buffer| {
            let store = &body.store.0;
            let (what, offset, len) = ("read", body.store_offset + start as u64, len as u64);
            call(
                store,
                (what, offset, len),
                body.patience(),
                &body.stuck,
                || body.read_store(start, buffer, false),
            )
            .map_err(|error| Error::store(&**store, what, offset, len, &error))?;
            body.write_store(start, buffer, true)
        });
        let mut table = body.lock();
        if done.is_ok() {
            table.sure(run.clone());
            table.written(run);
        }
        let waited = body.release(&mut table, block, State::Absent);
        drop(table);
        if waited {
            engine.wake(body, block);
        }
        done?;
    }
}
