//! A target of the drain: what was written is copied into the next point's segment before anybody asks for a point.
//!
//! The engine's drain comes round after round, when the saver has nothing else to do, so that little is
//! left at the cut. A round asks the kernel first, and copies only where that makes the next cut shorter: what is
//! written anew faster than it is copied is left to the cut. No page is copied twice within an *epoch*,
//! for a page that is written all the time is dirty at the cut whatever is done. Asking takes a
//! small share of the time.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use userfault_engine::dirty::DirtyMap;
use userfault_engine::drain::{Draining, Next, Target, begin};
use userfault_engine::lock::Mutex;
use userfault_engine::tracked::Ledger;

use crate::copier::{Batch, Buffer, Copier};
use crate::error::Error;
use crate::saver::Saver;
use crate::shared::Shared;
use crate::source::{Source, Way};
use crate::staging::CHUNK;

/// Between two looks of the drain at what was written, at least.
const DRAIN_EVERY: Duration = Duration::from_millis(50);

/// Between two looks at a program that writes little.
const DRAIN_QUIETLY: Duration = Duration::from_millis(400);

/// Asking the kernel and protecting takes at most one part of so many of the time.
const ASKING: u32 = 5;

/// The length of an epoch.
const EPOCH: Duration = Duration::from_millis(800);

/// The longest pause of a drain that finds that it does not help.
const DRAIN_SELDOM: Duration = Duration::from_secs(5);

/// The drain copies once this share of all pages is known to be dirty.
const DRAIN_FROM: f64 = 0.001;

/// It looks again when this share is expected to be: so much is left at a cut, if asking does not take too long.
const DRAIN_AT: f64 = 0.002;

/// If more than this share is written anew at once, draining it does not make the cut shorter. The same if all
/// of it would be written within a second.
const DRAIN_UP_TO: f64 = 0.2;

/// Bytes that the drain reads while a cut would have to wait for it.
pub const DRAIN_STEP: usize = 512 << 10;

/// What the drain remembers between its rounds.
pub struct Drain {
    next: Instant,
    every: Duration,
    /// Until every block has been copied once.
    first: bool,
    /// Pages of each array that were copied in this epoch.
    copied: Vec<DirtyMap>,
    /// Pages that are dirty and stay it, for they were copied in this epoch.
    left: usize,
    epoch: Instant,
    /// When what was written was last taken from the kernel.
    taken: Instant,
    /// A write failed: nothing is drained before the next save.
    pub resting: bool,
    buffer: Option<Vec<u8>>,
}

impl Drain {
    pub fn new(shared: &Shared) -> Drain {
        let pages = |source: &Source| match &source.way {
            Way::Silent(ledger) => ledger.len() / shared.page,
            _ => 0,
        };
        Drain {
            next: Instant::now(),
            every: DRAIN_EVERY,
            first: true,
            copied: shared
                .sources
                .iter()
                .map(pages)
                .map(DirtyMap::new)
                .collect(),
            left: 0,
            epoch: Instant::now(),
            taken: Instant::now(),
            resting: false,
            buffer: None,
        }
    }
}

/// True if a program that wrote `anew` of its `pages` in some time is faster than any drain.
fn hopeless(anew: usize, pages: usize, since: Duration) -> bool {
    anew as f64 > pages as f64 * DRAIN_UP_TO.min(since.as_secs_f64())
}

impl Drain {
    /// Those of some dirty pages of an array that are to be copied; the others are put back.
    fn choose(
        &mut self,
        data: usize,
        ledger: &Ledger,
        runs: Vec<Range<usize>>,
    ) -> Vec<Range<usize>> {
        let copied = &mut self.copied[data];
        let mut chosen = Vec::with_capacity(runs.len());
        for run in runs {
            let again = copied.runs(run.clone());
            let mut from = run.start;
            for again in again {
                if from < again.start {
                    chosen.push(from..again.start);
                }
                self.left += again.len();
                from = again.end;
                ledger.put_back(again);
            }
            if from < run.end {
                chosen.push(from..run.end);
            }
            copied.insert(run);
        }
        chosen
    }

    /// How long it takes until so many pages more are dirty, if the program goes on as it did when it wrote
    /// `written` pages since the kernel was asked last; within what is sensible.
    fn until(&self, more: f64, written: usize) -> Duration {
        let wait = self.taken.elapsed().as_secs_f64() * more / written as f64;
        let least = DRAIN_EVERY.as_secs_f64();
        let most = DRAIN_QUIETLY.as_secs_f64();
        // Nothing was written: not a number, or endless.
        Duration::from_secs_f64(if wait.is_nan() {
            most
        } else {
            wait.clamp(least, most)
        })
    }

    fn is_due(&self) -> bool {
        !self.resting && self.next <= Instant::now()
    }

    fn next_round(&self) -> Next {
        if self.resting {
            Next::WhenAsked
        } else {
            Next::In(self.next.saturating_duration_since(Instant::now()))
        }
    }

    /// Begins another epoch when one is over.
    fn look(&mut self) {
        if self.epoch.elapsed() >= EPOCH {
            self.epoch = Instant::now();
            self.left = 0;
            for copied in &mut self.copied {
                copied.remove(0..copied.pages());
            }
        }
    }
}

/// The next point of a checkpointer, as a target.
struct NextPoint(Arc<Mutex<Saver>>);

/// Has the drain work for the next point of a checkpointer, if it wants that and some of its memory is tracked silently.
pub fn drain_into(shared: &Shared, saver: &Arc<Mutex<Saver>>) -> Result<Option<Draining>, Error> {
    let silent = |source: &Source| matches!(source.way, Way::Silent(_));
    if !shared.options.drain || !shared.sources.iter().any(silent) {
        return Ok(None);
    }
    begin(Arc::new(NextPoint(saver.clone())), Next::In(Duration::ZERO))
        .map(Some)
        .map_err(|error| Error::Memory(error.to_string()))
}

impl Target for NextPoint {
    fn round(&self) -> Next {
        // At work on a save, or pruning: it asks for a round when that is over.
        let Some(mut saver) = self.0.try_lock() else {
            return Next::WhenAsked;
        };
        if saver.drain.is_due() {
            saver.drain_round();
        }
        saver.drain.next_round()
    }
}

impl Saver {
    /// One look at what was written, and copying it if that is worth it.
    fn drain_round(&mut self) {
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
        let began = Instant::now();
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
        if !self.drain.first && hopeless(anew, pages, self.drain.taken.elapsed()) {
            self.drain.every = (self.drain.every * 2).min(DRAIN_SELDOM);
            return Ok(());
        }
        self.drain.look();
        let written = dirty.saturating_sub(self.drain.left);
        let at = DRAIN_AT * pages as f64;
        if (written as f64) < DRAIN_FROM * pages as f64 {
            let wait = self.drain.until(at - written as f64, written);
            self.drain.every = wait.max(began.elapsed() * ASKING);
            return Ok(());
        }
        let wait = self.drain.until(at, written);
        self.drain.left = 0;
        for source in &shared.sources {
            if let Way::Silent(ledger) = &source.way {
                shared.harvest(ledger)?;
            }
        }
        self.drain.taken = Instant::now();
        self.drain.every = wait.max(began.elapsed() * ASKING);
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
                let runs = self.drain.choose(data, ledger, runs);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::following::COPIED_BELOW;
    use userfault_engine::Pages;
    use userfault_engine::tracked::Tracked;

    fn drain(pages: usize) -> Drain {
        Drain {
            next: Instant::now(),
            every: DRAIN_EVERY,
            first: true,
            copied: vec![DirtyMap::new(pages)],
            left: 0,
            epoch: Instant::now(),
            taken: Instant::now(),
            resting: false,
            buffer: None,
        }
    }

    #[test]
    fn who_writes_all_of_its_memory_within_a_second_is_left_to_the_cut() {
        let look = Duration::from_millis(50);
        assert!(hopeless(60, 1000, look));
        assert!(!hopeless(40, 1000, look));
        // However long nobody has looked.
        assert!(hopeless(300, 1000, Duration::from_secs(5)));
        assert!(!hopeless(100, 1000, Duration::from_secs(5)));
    }

    #[test]
    fn the_next_look_is_when_as_much_is_expected_as_may_be_left() {
        let mut drain = drain(1);
        drain.taken = Instant::now() - Duration::from_millis(100);
        // Twice as many as were written in the time until now take twice that time.
        let before = drain.taken.elapsed() * 2;
        let wait = drain.until(200.0, 100);
        assert!(
            (before.min(DRAIN_QUIETLY)..=drain.taken.elapsed() * 2).contains(&wait),
            "{wait:?}"
        );
        assert_eq!(drain.until(1.0, 100_000), DRAIN_EVERY);
        assert_eq!(drain.until(200.0, 1), DRAIN_QUIETLY);
        assert_eq!(drain.until(200.0, 0), DRAIN_QUIETLY);
        assert_eq!(drain.until(0.0, 0), DRAIN_QUIETLY);
    }

    #[test]
    fn a_page_is_copied_once_in_an_epoch_and_stays_dirty_when_it_is_written_again() {
        let memory = Tracked::new(COPIED_BELOW, Pages::Small).unwrap();
        let ledger = Ledger::open(memory.start(), memory.len()).unwrap();
        let pages = memory.len() / ledger.page();
        ledger.take(0..pages);
        let mut drain = drain(pages);
        assert_eq!(drain.choose(0, &ledger, vec![3..5, 9..10]), [3..5, 9..10]);
        assert_eq!(drain.choose(0, &ledger, vec![2..6, 9..10]), [2..3, 5..6]);
        assert_eq!(drain.left, 3);
        assert_eq!(ledger.take(0..pages), [3..5, 9..10]);
        drain.epoch = Instant::now() - EPOCH;
        drain.look();
        assert_eq!(drain.left, 0);
        assert_eq!(drain.choose(0, &ledger, vec![3..5, 7..8]), [3..5, 7..8]);
    }
}
