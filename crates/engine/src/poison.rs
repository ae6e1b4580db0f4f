//! Blocks that could not be had: SIGBUS at the touch, a record, one line on stderr, and the way back.
//!
//! Poison is a state of the table. The marker in the page table is only its shadow: a neighbour's
//! UFFDIO_CONTINUE or the program's own MADV_DONTNEED can lift it, and then it is put back. Where the kernel
//! has no poison, a mapping of nothing takes its place (see `bar`).

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::block::{Purpose, State};
use crate::body::Body;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::error::Error;
use crate::stats::add;
use crate::table::{BlockError, Table};

/// Gives a block up. Its state is Filling or Poisoning, its memory has been released.
pub(crate) fn give_up(engine: &Engine, body: &Body, block: u32, cause: &io::Error) {
    if put_back(Defect::ReadErrorIsTheEnd) {
        std::process::exit(1);
    }
    body.lock().turn_into(block, State::Poisoning);
    let (offset, len) = (body.start(block) as u64, body.block_len(block) as u64);
    // Before the marker and the state: a thread that meets them may ask at once, or be the last of its process.
    add(&body.counters.errors, 1);
    crate::say::line(&format!(
        "userfault: {}: {len} bytes at offset {offset} could not be read from {}: {cause}; touching them is \
         SIGBUS until heal({offset}, {len}) succeeds",
        body.name,
        body.store.0.name(),
    ));
    body.lock().errors.push(BlockError {
        offset,
        len,
        errno: userfault_store::errno(cause),
        message: cause.to_string(),
        time: SystemTime::now(),
    });
    if let Err(error) = body.backing.poison(engine, body, block) {
        // Without the marker the toucher would only ask again, for ever: make the memory itself say no.
        let instead = body.backing.forbid(body, block);
        crate::say::line(&format!(
            "userfault: {}: poisoning failed: {error}; {instead}",
            body.name
        ));
    }
    let _ = body.release(&mut body.lock(), block, State::Poisoned);
    engine.wake(body, block);
}

/// Records, and says on stderr, that the sleepers on an owned block are given up: its write does not come back.
pub(crate) fn tell_sleepers(body: &Body, table: &mut Table, block: u32, cause: &str) {
    let (offset, len) = (body.start(block) as u64, body.block_len(block) as u64);
    crate::say::line(&format!(
        "userfault: {}: {len} bytes at offset {offset} cannot be reached, {}: {cause}; touching them is SIGBUS \
         until it has",
        body.name,
        body.store.0.name(),
    ));
    table.errors.push(BlockError {
        offset,
        len,
        errno: 0,
        message: cause.to_owned(),
        time: SystemTime::now(),
    });
    add(&body.counters.errors, 1);
}

/// Tries a poisoned block again; returns the bytes healed.
pub(crate) fn heal(engine: &'static Engine, body: &Arc<Body>, block: u32) -> Result<u64, Error> {
    let offset = body.start(block) as u64;
    {
        let mut table = body.lock();
        // The toucher hears of it first, and may ask before the block has its state.
        while table.state(block) == State::Poisoning {
            body.sleep(&mut table, Duration::from_millis(100));
        }
        if table.state(block) != State::Poisoned {
            return Ok(0);
        }
        if table.hung.contains_key(&block) {
            return Err(error(&table, body, block));
        }
        if !table.claim(block, Purpose::Heal) {
            return Err(Error::Closed);
        }
        table.errors.retain(|error| error.offset != offset);
    }
    engine.submit_fill(body, block);
    let mut table = body.lock();
    loop {
        match table.state(block) {
            State::Filling | State::Poisoning => body.sleep(&mut table, Duration::from_millis(100)),
            State::Poisoned => return Err(error(&table, body, block)),
            _ => return Ok(body.block_len(block) as u64),
        }
    }
}

/// The error of a call that needs a poisoned block.
pub(crate) fn error(table: &Table, body: &Body, block: u32) -> Error {
    let offset = body.start(block) as u64;
    let cause = table
        .errors
        .iter()
        .rev()
        .find(|error| error.offset == offset);
    Error::Poisoned {
        offset,
        len: body.block_len(block) as u64,
        cause: cause.map_or_else(
            || "it was given up".to_owned(),
            |error| error.message.clone(),
        ),
    }
}
