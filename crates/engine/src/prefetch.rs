//! Bringing blocks in before they are touched.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::error::Error;

/// A prefetch under way. It never evicts what it brought in itself: what does not fit is left out.
#[derive(Debug)]
pub struct PrefetchTicket {
    body: Arc<Body>,
    blocks: Vec<u32>,
}

/// Starts to bring in the blocks of `ranges`, as many as the limit holds.
pub(crate) fn start(
    engine: &'static Engine,
    body: &Arc<Body>,
    ranges: &[Range<u32>],
) -> PrefetchTicket {
    let figures = engine.pool_of(body).figures();
    let mut room = figures
        .limit
        .saturating_sub(crate::pool::BLOCKS_TO_RUN as u64 * body.block as u64);
    let mut blocks = Vec::new();
    for block in ranges.iter().cloned().flatten() {
        let len = body.block_len(block) as u64;
        if room < len {
            break;
        }
        room -= len;
        let mut table = body.lock();
        match table.state(block) {
            State::Absent if table.claim(block, Purpose::Fill) => {
                drop(table);
                engine.submit_fill(body, block);
            }
            State::Resting if table.claim(block, Purpose::Map) => {
                drop(table);
                engine.bring_back(body, block);
            }
            _ => {}
        }
        blocks.push(block);
    }
    PrefetchTicket {
        body: body.clone(),
        blocks,
    }
}

impl PrefetchTicket {
    /// True if nothing of it is under way any more.
    pub fn is_done(&self) -> bool {
        if self.body.generation != crate::fork::generation() {
            return true;
        }
        let table = self.body.lock();
        self.blocks
            .iter()
            .all(|block| !matches!(table.state(*block), State::Filling | State::Poisoning))
    }

    /// Waits for the end. Fails with the first block that could not be had.
    pub fn wait(&self) -> Result<(), Error> {
        if self.body.generation != crate::fork::generation() {
            return Err(Error::Forked);
        }
        let mut table = self.body.lock();
        for block in &self.blocks {
            loop {
                match table.state(*block) {
                    _ if table.closed => return Err(Error::Closed),
                    State::Poisoned => {
                        return Err(crate::poison::error(&table, &self.body, *block));
                    }
                    State::Filling | State::Poisoning => {
                        self.body.sleep(&mut table, Duration::from_millis(100))
                    }
                    _ => break,
                }
            }
        }
        Ok(())
    }
}
