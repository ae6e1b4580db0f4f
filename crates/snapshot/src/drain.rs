//! The drain: what was written is copied into the next point's segment before anybody asks for a point.
//!
//! It runs on the saver's thread when there is nothing else to do, round after round, so that little is
//! left at the cut. It asks the kernel first, and copies only where that makes the next cut shorter: what is
//! written anew faster than it is copied is left to the cut.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::copier::{Batch, Buffer, Copier};
use crate::error::Error;
use crate::saver::Saver;
use crate::source::Way;
use crate::staging::CHUNK;

/// Between two looks of the drain at what was written.
const DRAIN_EVERY: Duration = Duration::from_millis(200);

/// The longest pause of a drain that finds that it does not help.
const DRAIN_SELDOM: Duration = Duration::from_secs(5);

/// The drain copies once this share of an array's pages is known to be dirty.
const DRAIN_FROM: f64 = 0.005;

/// If more than this share is written anew at once, draining it does not make the cut shorter.
const DRAIN_UP_TO: f64 = 0.2;

/// Bytes that the drain reads while a cut would have to wait for it.
pub const DRAIN_STEP: usize = 512 << 10;

/// What the drain remembers between its rounds.
pub struct Drain {
    pub next: Instant,
    every: Duration,
    /// Until every block has been copied once.
    first: bool,
    /// A write failed: nothing is drained before the next save.
    pub resting: bool,
    buffer: Option<Vec<u8>>,
}

impl Drain {
    pub fn new() -> Drain {
        Drain {
            next: Instant::now(),
            every: DRAIN_EVERY,
            first: true,
            resting: false,
            buffer: None,
        }
    }
}

impl Saver {
    /// One look at what was written, and copying it if that is worth it.
    pub fn drain_round(&mut self) {
        if let Err(error) = self.drain_once() {
            // The disk is full, or an array is gone: the next save tells.
            let _ = error;
            self.give_up_segment();
            let _cutting = self.shared.after_failure();
            self.shared.failures.fetch_add(1, Ordering::Relaxed);
            self.drain.resting = true;
        }
        self.drain.next = Instant::now() + self.drain.every;
    }

    fn drain_once(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let (mut dirty, mut pages, mut anew) = (0, 0, 0);
        for source in &shared.sources {
            let Way::Silent(ledger) = &source.way else {
                continue;
            };
            // Only asked, not protected again: that interrupts the processors that write.
            let count = ledger.written()?;
            dirty += count;
            anew += count - ledger.count().min(count);
            pages += ledger.len() / shared.page;
        }
        if pages == 0 {
            self.drain.resting = true;
            return Ok(());
        }
        let hopeless = !self.drain.first && anew as f64 > DRAIN_UP_TO * pages as f64;
        if hopeless {
            self.drain.every = (self.drain.every * 2).min(DRAIN_SELDOM);
            return Ok(());
        }
        self.drain.every = DRAIN_EVERY;
        if (dirty as f64) < DRAIN_FROM * pages as f64 {
            return Ok(());
        }
        for source in &shared.sources {
            if let Way::Silent(ledger) = &source.way {
                shared.harvest(ledger)?;
            }
        }
        for data in 0..shared.sources.len() {
            if !self.drain_source(data)? {
                return Ok(());
            }
        }
        self.drain.first = false;
        Ok(())
    }

    /// Copies what is dirty of one array; false if a save is waiting.
    fn drain_source(&mut self, data: usize) -> Result<bool, Error> {
        let shared = self.shared.clone();
        let source = &shared.sources[data];
        let Way::Silent(ledger) = &source.way else {
            return Ok(true);
        };
        let mut from = 0;
        loop {
            if shared.wanted() {
                return Ok(false);
            }
            let mut batches = Vec::new();
            let mut result = Ok(true);
            {
                // What has been taken has to be read before a cut may begin: later it is no longer what
                // the cut stands for.
                let Some(_cutting) = shared.after_cut(self.cut) else {
                    return Ok(false);
                };
                let runs = ledger.take_some(from, DRAIN_STEP / shared.page);
                let Some(last) = runs.last() else {
                    return Ok(true);
                };
                from = last.end;
                let mut buffer = self.drain.buffer.take();
                let mut next =
                    || Some(Buffer::Own(buffer.take().unwrap_or_else(|| vec![0; CHUNK])));
                let mut full = |batch| batches.push(batch);
                let mut copier = Copier::new(&shared.sources, &mut next, &mut full);
                let mut done = 0;
                for run in &runs {
                    let blocks = source.blocks_of_pages(ledger, run.clone(), shared.page);
                    let blocks = blocks.start.max(done)..blocks.end;
                    if blocks.is_empty() {
                        continue;
                    }
                    done = blocks.end;
                    result = copier.copy(data, blocks);
                    if result.is_err() {
                        break;
                    }
                }
                if result.is_ok() {
                    result = copier.send().map(|()| true);
                }
                if result.is_err() {
                    for run in runs {
                        ledger.put_back(run);
                    }
                }
            }
            result?;
            let mut batches = batches.into_iter();
            while let Some(batch) = batches.next() {
                if let Err(error) = self.process_drained(batch) {
                    for batch in batches {
                        for item in batch.items {
                            self.lost(item.data, item.blocks);
                        }
                    }
                    return Err(error);
                }
            }
        }
    }

    fn process_drained(&mut self, batch: Batch) -> Result<(), Error> {
        let result = self.process(&batch, None);
        if result.is_err() {
            for item in batch.items {
                self.lost(item.data, item.blocks);
            }
        } else {
            self.drain.buffer = match batch.buffer {
                Buffer::Own(bytes) => Some(bytes),
                Buffer::Chunk(_) => None,
            };
        }
        result
    }
}
