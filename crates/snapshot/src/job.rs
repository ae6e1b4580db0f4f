//! A save on its way: what its cut took, and the batches that wait to be written.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use userfault_engine::lock::{Condvar, Mutex};
use userfault_engine::tracked::Aside;

use crate::copier::{Batch, Buffer, Copier, Piece};
use crate::error::Error;
use crate::point::Point;
use crate::shared::Shared;
use crate::staging::CHUNK;

/// What a cut copies, for whoever has time to copy it.
#[derive(Default)]
struct Shares {
    left: VecDeque<Piece>,
    /// The saver is copying a piece.
    helping: bool,
    /// The saver does not help.
    done: bool,
    error: Option<Error>,
}

#[derive(Default)]
struct Batches {
    queue: VecDeque<Batch>,
    /// The cut is over: no more batches but from writers of guarded memory.
    cut: bool,
}

/// One cut of a guarded group: the group, the number of the cut, its blocks.
type Guarded = (usize, u64, Vec<Range<usize>>);

/// A save on its way.
pub struct Job {
    pub point: Arc<Point>,
    pub meta: String,
    pub time: f64,
    batches: Mutex<Batches>,
    bell: Condvar,
    cancelled: AtomicBool,
    /// Why it was cancelled.
    reason: Mutex<Option<Error>>,
    /// Blocks of arrays that the cut took; they are put back if the save fails.
    pub taken: Mutex<Vec<(usize, Range<usize>)>>,
    /// Its cuts of guarded groups: group, number of the cut, blocks.
    pub guarded: Mutex<Vec<Guarded>>,
    /// Failures that had been when its cut began. One more since then, and blocks are missing from it.
    pub failures: AtomicU64,
    /// Its number among the cuts.
    pub cut: AtomicU64,
    /// What was taken has been put back.
    put_back: AtomicBool,
    shares: Mutex<Shares>,
    helped: Condvar,
}

impl Job {
    pub fn new(point: Arc<Point>, meta: String) -> Job {
        Job {
            point,
            meta,
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |since| since.as_secs_f64()),
            batches: Mutex::default(),
            bell: Condvar::new(),
            cancelled: AtomicBool::new(false),
            reason: Mutex::default(),
            taken: Mutex::default(),
            guarded: Mutex::default(),
            failures: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            put_back: AtomicBool::new(false),
            shares: Mutex::default(),
            helped: Condvar::new(),
        }
    }

    pub fn push(&self, batch: Batch) {
        self.batches.lock().queue.push_back(batch);
        self.bell.notify_all();
    }

    /// Says what the cut has to copy.
    pub fn share_out(&self, pieces: Vec<Piece>) {
        self.shares.lock().left = pieces.into();
    }

    /// The saver has other things to do than to help.
    pub fn help_is_done(&self) {
        self.shares.lock().done = true;
    }

    /// Copies pieces until there are none, and gives them to the saver. Ends early if there is no buffer.
    pub fn copy_shares(
        &self,
        shared: &Shared,
        next: &mut dyn FnMut() -> Option<Buffer>,
    ) -> Result<(), Error> {
        let mut full = |batch: Batch| self.push(batch);
        let mut copier = Copier::new(&shared.sources, next, &mut full);
        loop {
            let Some((data, runs)) = self.shares.lock().left.pop_front() else {
                return copier.send();
            };
            for run in runs {
                match copier.copy(data, run) {
                    Ok(true) => {}
                    stopped => {
                        // Given up by somebody who has said why, or failed: nobody needs the rest.
                        self.shares.lock().left.clear();
                        return stopped.map(|_| ());
                    }
                }
            }
        }
    }

    /// Waits until the saver has done with its piece, and says how that went.
    pub fn end_help(&self) -> Result<(), Error> {
        let mut shares = self.shares.lock();
        shares.done = true;
        while shares.helping {
            self.helped.wait(&mut shares);
        }
        shares.error.take().map_or(Ok(()), Err)
    }

    /// Copies pieces of a cut that is going on, on the saver's thread.
    pub fn give_help(&self, shared: &Shared) {
        {
            let mut shares = self.shares.lock();
            if shares.done || shares.left.is_empty() {
                return;
            }
            shares.helping = true;
        }
        // The saver itself is who makes room in staging, so it does not wait for any.
        let mut next = || {
            let chunk = shared.staging.try_take();
            Some(chunk.map_or_else(|| Buffer::Own(vec![0; CHUNK]), Buffer::Chunk))
        };
        let result = self.copy_shares(shared, &mut next);
        let mut shares = self.shares.lock();
        shares.helping = false;
        shares.error = result.err();
        self.helped.notify_all();
    }

    /// The cut is over.
    pub fn end_of_cut(&self) {
        self.batches.lock().cut = true;
        self.bell.notify_all();
    }

    pub fn cancel(&self, reason: Error) {
        self.reason.lock().get_or_insert(reason);
        self.cancelled.store(true, Ordering::Release);
        self.bell.notify_all();
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Why it was cancelled.
    pub fn reason(&self) -> Error {
        self.reason.lock().clone().unwrap_or(Error::Closed)
    }

    /// True for the first caller: what was taken has to be put back once.
    pub fn take_back(&self) -> bool {
        !self.put_back.swap(true, Ordering::AcqRel)
    }

    /// The next batch, if one is there.
    pub fn pop(&self) -> Option<Batch> {
        self.batches.lock().queue.pop_front()
    }

    /// Waits a moment for a batch.
    pub fn wait_for_batch(&self) {
        let mut batches = self.batches.lock();
        if batches.queue.is_empty() {
            self.bell.wait_for(&mut batches, Duration::from_millis(2));
        }
    }

    /// The next batch of the cut; `None` when the cut is over and all of it is processed.
    pub fn next(&self) -> Option<Batch> {
        let mut batches = self.batches.lock();
        loop {
            if self.is_cancelled() {
                return None;
            }
            if let Some(batch) = batches.queue.pop_front() {
                return Some(batch);
            }
            if batches.cut {
                return None;
            }
            self.bell.wait(&mut batches);
        }
    }
}

/// Where the old bytes of guarded blocks go when their writer does not wait for the saver.
pub struct JobAside {
    pub shared: Arc<Shared>,
    pub job: Arc<Job>,
    pub group: usize,
}

impl Aside for JobAside {
    fn take(&self, offset: usize, len: usize, _copy: &dyn Fn(usize, &mut [u8])) {
        let staging = &self.shared.staging;
        let mut next = || staging.take(&|| self.job.is_cancelled()).map(Buffer::Chunk);
        let mut full = |batch| self.job.push(batch);
        let mut copier = Copier::new(&self.shared.sources, &mut next, &mut full);
        let group = &self.shared.groups[self.group];
        let address = group.memory.start() + offset;
        for &data in &group.arrays {
            let blocks = self.shared.sources[data].blocks_at(address, len);
            // Our own memory, so that only a cancelled save ends it early.
            if !blocks.is_empty() && !copier.copy(data, blocks).unwrap_or(false) {
                return;
            }
        }
        let _ = copier.send();
    }
}
