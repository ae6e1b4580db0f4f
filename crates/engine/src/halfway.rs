//! A fill that the kernel broke off: it has mapped some pages of a block, and has no memory for the rest.
//!
//! Whoever waited for one of those pages has gone on: it may have been written since. So the block cannot simply be
//! dropped. Its pages are unmapped and asked for evidence, as in an eviction. What was written goes to the store
//! first, or if the store does not take it, the rest of the block is put beside it through the view. Only then the
//! fill ends, one way or the other, and nothing is lost.
//!
//! A handler of SIGBUS can do nothing of that. It leaves the block as it is, in state Filling, and a thread of the
//! engine ends the fill in its place (see `inline`).

use std::io;
use std::time::{Duration, Instant};

use crate::body::Body;
use crate::engine::Engine;
use crate::kernel::record;
use crate::stats::add;
use crate::workers::Lead;

/// How long to wait for the store or for memory before the next try.
const PAUSE: Duration = Duration::from_millis(20);

/// What became of a block.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Halfway {
    /// It is absent again; the store has what was written.
    Dropped,
    /// It is whole, and mapped.
    Whole,
}

impl Engine {
    /// Ends a fill of an owned block of which the first `placed` bytes are in memory, and some of those may be
    /// mapped. `rest` are the bytes of the store behind them, if they can be had.
    pub(crate) fn end_halfway(
        &self,
        body: &Body,
        block: u32,
        placed: usize,
        rest: Option<&[u8]>,
        lead: &mut Lead,
    ) -> Halfway {
        let (start, len) = (body.start(block), body.block_len(block));
        let page = body.memory.page();
        let _ = body.memory.zap(start, len);
        let pages = body.pages(block);
        let mut written = Vec::new();
        if body.memory.shared() {
            // Beyond what was placed there is nothing, and nothing says so: it must not count as written.
            let there = pages.start..pages.start + placed / page;
            for run in self.harvest_zapped(body, pages.clone()) {
                let run = run.start..run.end.min(there.end);
                if !run.is_empty() {
                    written.push(run);
                }
            }
            record(&mut body.lock(), &written);
        }
        let began = Instant::now();
        while let Some(run) = written.first().cloned() {
            lead.give_up();
            let (at, len) = (run.start * page, run.len() * page);
            let kept = body.memory.resting_bytes(at, len);
            match body.write_store(at, kept, true) {
                Ok(()) => {
                    let mut table = body.lock();
                    table.home.remove(run.clone());
                    table.written(run);
                    written.remove(0);
                }
                Err(error) => {
                    body.write_failed(self.now_ms());
                    body.lock().pending = Some(error);
                    add(&body.counters.errors, 1);
                    if let Some(rest) = rest
                        && self.put_rest(body, block, placed, rest).is_ok()
                    {
                        return Halfway::Whole;
                    }
                    if began.elapsed() > body.patience() {
                        crate::say::line(&format!(
                            "userfault: {}: {} bytes at offset {at} that were written are lost: neither the \
                             store nor the machine's memory takes them",
                            body.name, len,
                        ));
                        body.lock().home.remove(pages.clone());
                        break;
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
        let _ = body.memory.punch(start, len);
        Halfway::Dropped
    }

    /// Puts what is missing of a block beside what is there, and maps it.
    fn put_rest(&self, body: &Body, block: u32, placed: usize, rest: &[u8]) -> io::Result<()> {
        let at = body.start(block) + placed;
        if !rest.is_empty() {
            body.memory.claim(at, rest.len())?;
            body.memory.write_held(at, rest);
        }
        self.map_again(body, block)
    }
}
