//! What the threads of a checkpointer share: who asks, who cuts, what has failed.
//!
//! The lock `cutting` says who may take pages out of the dirty maps. A cut holds it from its first question to
//! its last copy. The saver takes it for one step of the drain, or of settling a point, and only if no cut
//! has been made since the one that it saved last: what it reads becomes part of the index, and the index
//! of a cut that is still to be saved must not know anything later. Whoever fails takes it to put blocks
//! back, and a cut that waits for room meanwhile fails too, for nobody else would make it any.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use userfault_engine::lock::{Condvar, Mutex, MutexGuard};
use userfault_engine::tracked::{Ledger, Tracked};

use crate::checkpointer::Options;
use crate::error::Error;
use crate::folder::Folder;
use crate::job::Job;
use crate::manifest::PointSummary;
use crate::processors::Processors;
use crate::saver::Command;
use crate::source::{Source, Way};
use crate::staging::Staging;

/// Bytes that one question to the kernel is about, so that a cut need not wait for it for long.
const HARVEST_STEP: usize = 32 << 20;

/// Guarded memory and the arrays that lie in it.
pub struct Group {
    pub memory: Arc<Tracked>,
    /// The number under which its guard knows this checkpointer.
    pub consumer: u64,
    pub arrays: Vec<usize>,
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(guard) = self.memory.guard() {
            guard.unsubscribe(self.consumer);
        }
    }
}

/// What the saver's queue and its callers share.
#[derive(Default)]
pub struct State {
    pub queue: VecDeque<Command>,
    /// Saves that have no outcome.
    pub active: Vec<Arc<Job>>,
    pub points: Vec<PointSummary>,
    /// What failed since somebody was told.
    pub failed: Option<Error>,
    /// Segments that could not be removed.
    pub leftovers: Vec<u32>,
    pub busy: bool,
    pub closing: bool,
    pub ended: bool,
}

impl State {
    /// The number of the last point that is finished or under way. One that failed is no point.
    pub fn last_step(&self) -> Option<u64> {
        let finished = self.points.last().map(|point| point.step);
        let under_way = self.active.iter().map(|job| job.point.step()).max();
        finished.max(under_way)
    }
}

/// What the threads of a checkpointer share.
pub struct Shared {
    pub options: Options,
    pub sources: Vec<Source>,
    pub groups: Vec<Group>,
    /// Name, description, number of the data.
    pub arrays: Vec<(String, String, usize)>,
    pub folder: Folder,
    pub staging: Arc<Staging>,
    pub page: usize,
    pub processors: Processors,
    /// The saver's thread, by its number in the kernel.
    pub saver: AtomicI32,
    pub state: Mutex<State>,
    pub changed: Condvar,
    /// Held by a cut, and by the drain from taking a page to having read it.
    pub cutting: Mutex<()>,
    /// Callers of save() that are not back yet.
    pub wanted: AtomicUsize,
    /// Those who want to put something back.
    failing: AtomicUsize,
    /// A cut copies, and needs no room from the saver.
    pub copying: AtomicBool,
    /// Cuts so far.
    pub cuts: AtomicU64,
    /// Saves and drains that failed: what they had taken was put back.
    pub failures: AtomicU64,
    pub prune_later: Mutex<BTreeSet<u32>>,
    began: Instant,
    /// Milliseconds since `began` at which something was last written.
    progressed: AtomicU64,
}

impl Shared {
    #[allow(
        clippy::too_many_arguments,
        reason = "each is a field, and is made by the one caller"
    )]
    pub fn new(
        options: Options,
        sources: Vec<Source>,
        groups: Vec<Group>,
        arrays: Vec<(String, String, usize)>,
        folder: Folder,
        staging: Arc<Staging>,
        page: usize,
        state: State,
    ) -> Shared {
        Shared {
            options,
            sources,
            groups,
            arrays,
            folder,
            staging,
            page,
            processors: Processors::new(),
            saver: AtomicI32::new(0),
            state: Mutex::new(state),
            changed: Condvar::new(),
            cutting: Mutex::new(()),
            wanted: AtomicUsize::new(0),
            failing: AtomicUsize::new(0),
            copying: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            prune_later: Mutex::default(),
            began: Instant::now(),
            progressed: AtomicU64::new(0),
        }
    }

    /// What the saver does next; waits for it. `None` once the checkpointer is closed and everything is done.
    pub fn next_command(&self) -> Option<Command> {
        let mut state = self.state.lock();
        loop {
            if let Some(command) = state.queue.pop_front() {
                state.busy = true;
                return Some(command);
            }
            if state.closing && state.active.is_empty() {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// The saver has done what [`Shared::next_command`] told it.
    pub fn command_done(&self) {
        self.state.lock().busy = false;
        self.changed.notify_all();
    }

    /// True if the drain should step aside.
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// Keeps cuts away while pages are taken and read for the index of cut number `last`. `None` if a cut is
    /// going on, or has been made since: then what would be read is later than what the index will hold.
    pub fn after_cut(&self, last: u64) -> Option<MutexGuard<'_, ()>> {
        // Never waited for: a cut that waits for room waits for the saver.
        let held = self.cutting.try_lock()?;
        (self.cuts.load(Ordering::Relaxed) == last).then_some(held)
    }

    /// Keeps cuts away while something is put back. A cut that waits for room gives up meanwhile.
    pub fn after_failure(&self) -> MutexGuard<'_, ()> {
        self.failing.fetch_add(1, Ordering::SeqCst);
        self.staging.kick();
        let held = self.cutting.lock();
        self.failing.fetch_sub(1, Ordering::SeqCst);
        held
    }

    /// True if somebody waits to put back what a failed save had taken.
    pub fn failing(&self) -> bool {
        self.failing.load(Ordering::SeqCst) > 0
    }

    /// Lets a cut go first: while it lasts, another thread that works on memory would be in its way.
    pub fn make_way(&self) {
        let mut patience = 200;
        while self.copying.load(Ordering::Acquire) && patience > 0 {
            std::thread::sleep(Duration::from_micros(200));
            patience -= 1;
        }
    }

    /// Asks the kernel what was written, and has it note the next write, in steps between which a cut may begin.
    pub fn harvest(&self, ledger: &Ledger) -> Result<(), Error> {
        let mut at = ledger.start();
        let end = ledger.start() + ledger.len();
        while at < end {
            let step = HARVEST_STEP.min(end - at);
            ledger.harvest(at, step)?;
            at += step;
            self.make_way();
        }
        Ok(())
    }

    /// Something was done.
    pub fn progress(&self) {
        let now = self.began.elapsed().as_millis() as u64;
        self.progressed.store(now, Ordering::Relaxed);
    }

    pub fn idle_for(&self) -> Duration {
        let last = Duration::from_millis(self.progressed.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(last)
    }

    /// Blocks are dirty again.
    pub fn put_back(&self, data: usize, blocks: Range<usize>) {
        let source = &self.sources[data];
        match &source.way {
            Way::Copied => {}
            Way::Silent(ledger) => {
                let pages = source.pages_of(ledger, blocks, self.page);
                if !pages.is_empty() {
                    ledger.put_back(pages);
                }
            }
            Way::Guarded(group) => {
                let group = &self.groups[*group];
                if let Some(guard) = group.memory.guard() {
                    let (address, len, _) = source.memory_of(blocks);
                    let from = address - group.memory.start();
                    let size = guard.block();
                    guard.put_back(group.consumer, from / size..(from + len).div_ceil(size));
                }
            }
        }
    }

    /// Ends the cuts of guarded memory: writers go on.
    pub fn end_guarded(&self, job: &Job) {
        for (group, cut, _) in job.guarded.lock().iter() {
            if let Some(guard) = self.groups[*group].memory.guard() {
                guard.end(*cut);
            }
        }
    }

    /// Makes dirty again what the cut of a failed save took. It is done before anybody is told, so that the
    /// next cut has it.
    pub fn take_back(&self, job: &Job) {
        self.end_guarded(job);
        let _cutting = self.after_failure();
        // A cut that was going on may have begun some since.
        self.end_guarded(job);
        if !job.take_back() {
            return;
        }
        for (data, blocks) in job.taken.lock().drain(..) {
            self.put_back(data, blocks);
        }
        for (group, _, runs) in job.guarded.lock().drain(..) {
            let group = &self.groups[group];
            if let Some(guard) = group.memory.guard() {
                for run in runs {
                    guard.put_back(group.consumer, run);
                }
            }
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Prepares staging for the next cut: the last one needed so many bytes, the one before it `before`.
    pub fn prepare_staging(&self, bytes: usize, before: usize) {
        let with_some_more = |bytes: usize| bytes + bytes / 4;
        self.staging.cool(with_some_more(bytes.max(before)));
        self.staging.warm(with_some_more(bytes));
    }

    /// A save has an outcome.
    pub fn end(&self, job: &Arc<Job>, outcome: Result<(), Error>) {
        let failed = outcome.clone().err();
        // Under the lock: whoever hears of it and calls save() at once is told again there.
        let mut state = self.state.lock();
        let first = job.point.end(outcome);
        state.active.retain(|other| !Arc::ptr_eq(other, job));
        if first && let Some(error) = failed {
            state.failed.get_or_insert(error);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Nothing is followed any more, and the directory is anybody's.
    pub fn let_go(&self) {
        for source in &self.sources {
            if let Way::Silent(ledger) = &source.way {
                ledger.close();
            }
        }
        for group in &self.groups {
            if let Some(guard) = group.memory.guard() {
                guard.unsubscribe(group.consumer);
            }
        }
        self.folder.unlock();
        // Who has closed a checkpointer may hold it for long.
        self.staging.cool(0);
    }

    /// Gives up saves that make no progress, until the checkpointer ends.
    pub fn watch(&self) {
        let limit = self.options.timeout;
        let mut state = self.state.lock();
        while !state.ended {
            if state.active.is_empty() {
                self.changed.wait(&mut state);
                continue;
            }
            if self.idle_for() < limit {
                self.changed
                    .wait_for(&mut state, (limit / 8).max(Duration::from_millis(5)));
                continue;
            }
            let given_up = state.active.clone();
            drop(state);
            for job in &given_up {
                job.cancel(Error::TimedOut(limit));
            }
            // A cut that waits for staging leaves, and writers that wait for it go on.
            self.staging.kick();
            for job in &given_up {
                self.take_back(job);
                self.end(job, Err(job.reason()));
            }
            state = self.state.lock();
        }
    }
}
