//! A save on its way: what its cut took, and the batches that wait to be written.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use userfault_engine::lock::{Condvar, Mutex};
use userfault_engine::tracked::Aside;

use crate::copier::{Batch, Buffer, Copier};
use crate::error::Error;
use crate::point::Point;
use crate::shared::Shared;
use crate::shares::Shares;

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
    /// What its cut has to do.
    pub shares: Shares,
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
            shares: Shares::default(),
        }
    }

    pub fn push(&self, batch: Batch) {
        self.batches.lock().queue.push_back(batch);
        self.bell.notify_all();
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
