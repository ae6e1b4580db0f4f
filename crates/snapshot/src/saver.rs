//! The thread behind the cuts: it drains, saves and prunes, one thing at a time and in order.
//!
//! Batches of copied blocks come from the cut, from writers of guarded memory, and from the drain. Each
//! block is hashed, compared with the index, and written to the segment of the next point if it differs.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use userfault_engine::tracked::{Aside, Ledger, Saved};

use crate::checkpointer::Shared;
use crate::codec::Compress;
use crate::entry::{Entry, Kind, PAGE, hash, is_zero};
use crate::error::Error;
use crate::folder::segment_name;
use crate::index::DataIndex;
use crate::manifest::{ArrayRecord, DataRecord, Manifest, PointRecord, PointSummary};
use crate::point::Point;
use crate::prune;
use crate::segment::SegmentWriter;
use crate::source::{Source, Way};
use crate::staging::{CHUNK, Chunk};

/// Between two looks of the drain at what was written.
const DRAIN_EVERY: Duration = Duration::from_millis(200);

/// The longest pause of a drain that finds that it does not help.
const DRAIN_SELDOM: Duration = Duration::from_secs(5);

/// The drain copies once this share of an array's pages is known to be dirty.
const DRAIN_FROM: f64 = 0.005;

/// If more than this share is written anew at once, draining it does not make the cut shorter.
const DRAIN_UP_TO: f64 = 0.2;

/// Bytes that the drain reads while a cut would have to wait for it.
const DRAIN_STEP: usize = 512 << 10;

/// Bytes that one question to the kernel is about, for the same reason.
const HARVEST_STEP: usize = 32 << 20;

/// A point that needs more segments than this has the emptiest of them copied into its own.
const MOST_SEGMENTS: usize = 64;

/// Consecutive blocks of one array in a batch.
pub struct Item {
    data: usize,
    blocks: Range<usize>,
    /// Where their bytes begin in the buffer.
    at: usize,
}

/// Memory that a batch lies in.
pub enum Buffer {
    /// Staging.
    Chunk(Chunk),
    /// The saver's own.
    Own(Vec<u8>),
}

impl Buffer {
    fn bytes(&self) -> &[u8] {
        match self {
            Buffer::Chunk(chunk) => chunk,
            Buffer::Own(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Buffer::Chunk(chunk) => chunk,
            Buffer::Own(bytes) => bytes,
        }
    }
}

/// Copied blocks.
pub struct Batch {
    buffer: Buffer,
    items: Vec<Item>,
}

/// Fills batches with blocks.
pub struct Copier<'a> {
    sources: &'a [Source],
    /// The next buffer; `None`: give up.
    next: &'a mut dyn FnMut() -> Option<Buffer>,
    /// Takes a full batch.
    full: &'a mut dyn FnMut(Batch),
    buffer: Option<Buffer>,
    used: usize,
    items: Vec<Item>,
    /// Foreign ranges that are still to be read, and where in the buffer.
    ranges: Vec<(usize, usize)>,
    ranges_at: usize,
    ranges_of: usize,
}

impl<'a> Copier<'a> {
    pub fn new(
        sources: &'a [Source],
        next: &'a mut dyn FnMut() -> Option<Buffer>,
        full: &'a mut dyn FnMut(Batch),
    ) -> Copier<'a> {
        Copier {
            sources,
            next,
            full,
            buffer: None,
            used: 0,
            items: Vec::new(),
            ranges: Vec::new(),
            ranges_at: 0,
            ranges_of: 0,
        }
    }

    /// Copies blocks of an array. `Ok(false)`: there is no buffer any more, the save was given up.
    pub fn copy(&mut self, data: usize, blocks: Range<usize>) -> Result<bool, Error> {
        let source = &self.sources[data];
        let mut first = blocks.start;
        while first < blocks.end {
            if self.buffer.is_none() {
                self.buffer = (self.next)();
                let Some(buffer) = &self.buffer else {
                    return Ok(false);
                };
                debug_assert!(buffer.bytes().len() >= source.block);
            }
            let room = self.buffer.as_ref().expect("just taken").bytes().len() - self.used;
            let fits = (room / source.block).min(blocks.end - first);
            if fits == 0 {
                self.send()?;
                continue;
            }
            let part = first..first + fits;
            first = part.end;
            let (address, len, lead) = source.memory_of(part.clone());
            let at = self.used;
            if source.own.is_some() {
                let buffer = self.buffer.as_mut().expect("just taken").bytes_mut();
                buffer[at..at + lead].fill(0);
                source.copy_own(address, &mut buffer[at + lead..at + lead + len]);
            } else {
                if self.ranges_of != data || lead > 0 {
                    self.read()?;
                }
                if lead > 0 {
                    self.buffer.as_mut().expect("just taken").bytes_mut()[at..at + lead].fill(0);
                }
                if self.ranges.is_empty() {
                    (self.ranges_at, self.ranges_of) = (at + lead, data);
                }
                self.ranges.push((address, len));
            }
            self.used += lead + len;
            self.items.push(Item {
                data,
                blocks: part,
                at,
            });
        }
        Ok(true)
    }

    fn read(&mut self) -> Result<(), Error> {
        if self.ranges.is_empty() {
            return Ok(());
        }
        let len: usize = self.ranges.iter().map(|range| range.1).sum();
        let buffer = self.buffer.as_mut().expect("ranges lie in it").bytes_mut();
        let into = &mut buffer[self.ranges_at..self.ranges_at + len];
        let read = self.sources[self.ranges_of].copy_foreign(&self.ranges, into);
        self.ranges.clear();
        read
    }

    /// Hands over what there is.
    pub fn send(&mut self) -> Result<(), Error> {
        self.read()?;
        self.used = 0;
        if let Some(buffer) = self.buffer.take()
            && !self.items.is_empty()
        {
            (self.full)(Batch {
                buffer,
                items: std::mem::take(&mut self.items),
            });
        }
        Ok(())
    }
}

/// Arrays by number, and blocks of each.
pub type Parts = Vec<(usize, Vec<Range<usize>>)>;

/// A part of a cut that a second thread may copy.
#[derive(Default)]
enum Help {
    #[default]
    None,
    Wanted(Parts),
    Given,
    Done(Result<(), Error>),
}

/// Copies blocks and gives them to the saver. Ends early if there is no buffer any more.
pub fn copy_parts(
    shared: &Shared,
    job: &Job,
    parts: Parts,
    next: &mut dyn FnMut() -> Option<Buffer>,
) -> Result<(), Error> {
    let mut full = |batch: Batch| job.push(batch);
    let mut copier = Copier::new(&shared.sources, next, &mut full);
    for (data, runs) in parts {
        for run in runs {
            if !copier.copy(data, run)? {
                // The watcher gave it up, and has said why.
                return Ok(());
            }
        }
    }
    copier.send()
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
    time: f64,
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
    help: Mutex<Help>,
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
            help: Mutex::default(),
            helped: Condvar::new(),
        }
    }

    pub fn push(&self, batch: Batch) {
        self.batches.lock().queue.push_back(batch);
        self.bell.notify_all();
    }

    /// Asks the saver to copy a part of the cut, if it comes in time.
    pub fn ask_for_help(&self, parts: Parts) {
        *self.help.lock() = Help::Wanted(parts);
    }

    /// Takes the part back if nobody has begun with it; else waits until it is done, and says how it went.
    pub fn end_help(&self) -> Result<Parts, Error> {
        let mut help = self.help.lock();
        loop {
            match std::mem::take(&mut *help) {
                Help::Wanted(parts) => return Ok(parts),
                Help::Given => {
                    *help = Help::Given;
                    self.helped.wait(&mut help);
                }
                Help::Done(result) => return result.map(|()| Parts::new()),
                Help::None => return Ok(Parts::new()),
            }
        }
    }

    /// Does the part that was asked for, on the saver's thread.
    fn give_help(&self, shared: &Shared) {
        let mut help = self.help.lock();
        let Help::Wanted(parts) = std::mem::take(&mut *help) else {
            return;
        };
        *help = Help::Given;
        drop(help);
        // The saver itself is who makes room in staging, so it does not wait for any.
        let mut next = || {
            let chunk = shared.staging.try_take();
            Some(chunk.map_or_else(|| Buffer::Own(vec![0; CHUNK]), Buffer::Chunk))
        };
        let result = copy_parts(shared, self, parts, &mut next);
        *self.help.lock() = Help::Done(result);
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
    fn pop(&self) -> Option<Batch> {
        self.batches.lock().queue.pop_front()
    }

    /// Waits a moment for a batch.
    fn wait_for_batch(&self) {
        let mut batches = self.batches.lock();
        if batches.queue.is_empty() {
            self.bell.wait_for(&mut batches, Duration::from_millis(2));
        }
    }

    /// The next batch of the cut; `None` when the cut is over and all of it is processed.
    fn next(&self) -> Option<Batch> {
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

/// What the saver is asked to do.
pub enum Command {
    /// Finish this save.
    Save(Arc<Job>),
    /// Keep so many points.
    Prune(usize),
}

/// The state of the thread.
pub struct Saver {
    shared: Arc<Shared>,
    index: Vec<DataIndex>,
    manifest: Manifest,
    segment: Option<SegmentWriter>,
    next_segment: u32,
    /// What the token bucket of `max_rate` has been given.
    paid_until: Instant,
    drain: Drain,
}

struct Drain {
    next: Instant,
    every: Duration,
    /// Until every block has been copied once.
    first: bool,
    /// A write failed: nothing is drained before the next save.
    resting: bool,
    buffer: Option<Vec<u8>>,
}

impl Saver {
    pub fn new(
        shared: Arc<Shared>,
        index: Vec<DataIndex>,
        manifest: Manifest,
        next_segment: u32,
    ) -> Saver {
        Saver {
            shared,
            index,
            manifest,
            segment: None,
            next_segment,
            paid_until: Instant::now(),
            drain: Drain {
                next: Instant::now(),
                every: DRAIN_EVERY,
                first: true,
                resting: false,
                buffer: None,
            },
        }
    }

    /// Works until the checkpointer is closed and everything asked for is done.
    pub fn run(mut self) {
        let shared = self.shared.clone();
        loop {
            let command = {
                let mut state = shared.state.lock();
                loop {
                    if let Some(command) = state.queue.pop_front() {
                        state.busy = true;
                        break Some(command);
                    }
                    if state.closing {
                        break None;
                    }
                    if shared.options.drain && !self.drain.resting {
                        let now = Instant::now();
                        if self.drain.next <= now {
                            drop(state);
                            self.drain_round();
                            state = shared.state.lock();
                        } else {
                            shared.changed.wait_until(&mut state, self.drain.next);
                        }
                    } else {
                        shared.changed.wait(&mut state);
                    }
                }
            };
            let Some(command) = command else {
                break;
            };
            match command {
                Command::Save(job) => self.save(&job),
                Command::Prune(keep) => {
                    let pruned = prune::sweep(&shared, &mut self.manifest, keep);
                    if let Err(error) = pruned {
                        shared.state.lock().failed.get_or_insert(error);
                    }
                }
            }
            let mut state = shared.state.lock();
            state.busy = false;
            state.points.clone_from(&self.manifest.points);
            shared.changed.notify_all();
        }
        // What was drained since the last point belongs to no point.
        if let Some(segment) = self.segment.take() {
            let number = segment.number();
            drop(segment);
            let _ = shared.folder.remove(&segment_name(number));
        }
        let mut state = shared.state.lock();
        state.ended = true;
        shared.changed.notify_all();
    }

    fn save(&mut self, job: &Arc<Job>) {
        self.drain.resting = false;
        job.give_help(&self.shared);
        let result = self.store(job).and_then(|()| self.publish(job));
        self.shared.end_guarded(job);
        job.point.used(self.shared.staging.take_peak());
        match result {
            Ok(()) => {
                self.shared
                    .state
                    .lock()
                    .points
                    .clone_from(&self.manifest.points);
                self.shared.end(job, Ok(()));
                if let Some(keep) = self.shared.options.max_to_keep
                    && let Err(error) = prune::prune(&self.shared, &mut self.manifest, keep)
                {
                    self.shared.state.lock().failed.get_or_insert(error);
                }
                // The next cut needs about as much.
                self.shared.warm(job.point.extra_bytes());
            }
            Err(error) => {
                self.give_up_segment();
                self.shared.take_back(job);
                self.shared.end(job, Err(error));
            }
        }
    }

    /// Blocks are as if nobody had copied them.
    fn lost(&mut self, data: usize, blocks: Range<usize>) {
        self.shared.put_back(data, blocks);
    }

    /// Removes the segment of the next point; what was in it has to be copied again.
    fn give_up_segment(&mut self) {
        let Some(segment) = self.segment.take() else {
            return;
        };
        let number = segment.number();
        drop(segment);
        let shared = self.shared.clone();
        for (data, index) in self.index.iter_mut().enumerate() {
            index.forget(number, |block| shared.put_back(data, block..block + 1));
        }
        // If it cannot be removed now, the next save, or the next run, does it.
        if shared.folder.remove(&segment_name(number)).is_err() {
            shared.state.lock().leftovers.push(number);
        }
    }

    /// Takes everything of a cut.
    fn store(&mut self, job: &Job) -> Result<(), Error> {
        while let Some(batch) = job.next() {
            self.process(&batch, Some(job))?;
        }
        let shared = self.shared.clone();
        self.settle(job)?;
        let cuts: Vec<(usize, u64)> = job
            .guarded
            .lock()
            .iter()
            .map(|(group, cut, _)| (*group, *cut))
            .collect();
        for (group, cut) in cuts {
            let group = &shared.groups[group];
            let Some(guard) = group.memory.guard() else {
                continue;
            };
            let mut from = 0;
            loop {
                while let Some(batch) = job.pop() {
                    self.process(&batch, Some(job))?;
                }
                if job.is_cancelled() {
                    break;
                }
                let mut batches = Vec::new();
                let saved = guard.save_next(cut, from, |offset, len, _| {
                    let mut next = || Some(Buffer::Own(vec![0; CHUNK]));
                    let mut full = |batch| batches.push(batch);
                    let mut copier = Copier::new(&shared.sources, &mut next, &mut full);
                    for &data in &group.arrays {
                        let blocks =
                            shared.sources[data].blocks_at(group.memory.start() + offset, len);
                        if !blocks.is_empty() {
                            let _ = copier.copy(data, blocks);
                        }
                    }
                    let _ = copier.send();
                });
                for batch in batches {
                    self.process(&batch, Some(job))?;
                }
                match saved {
                    Saved::Block(block) => from = block + 1,
                    Saved::Busy => job.wait_for_batch(),
                    Saved::All => break,
                }
            }
        }
        // A block that a writer saved was pending until its batch was here.
        while let Some(batch) = job.pop() {
            self.process(&batch, Some(job))?;
        }
        if job.is_cancelled() {
            return Err(job.reason());
        }
        if job.failures.load(Ordering::Relaxed) != self.shared.failures.load(Ordering::Relaxed) {
            // Its cut did not copy what an earlier one had taken, and that is lost.
            return Err(Error::Memory(
                "an earlier save, or the drain, failed after the cut of this point; save again"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Protects again what was written before the cut. Those pages count as written until then, so each is
    /// compared with what was just saved of it: equal is clean, since a write from here on is noted.
    fn settle(&mut self, job: &Job) -> Result<(), Error> {
        let shared = self.shared.clone();
        for source in &shared.sources {
            if let Way::Silent(ledger) = &source.way {
                self.harvest(ledger)?;
            }
        }
        let taken = job.taken.lock().clone();
        let mut buffer = vec![0; CHUNK];
        for (data, blocks) in taken {
            let source = &shared.sources[data];
            let Way::Silent(ledger) = &source.way else {
                continue;
            };
            let step = (DRAIN_STEP / source.block).max(1);
            let mut first = blocks.start;
            while first < blocks.end && !job.is_cancelled() {
                let part = first..blocks.end.min(first + step);
                first = part.end;
                let _cutting = shared.cutting.lock();
                if shared.cuts.load(Ordering::Relaxed) != job.cut.load(Ordering::Relaxed) {
                    // The index will be that of a later cut: equal to this one proves nothing then.
                    return Ok(());
                }
                let runs = ledger.take(source.pages_of(ledger, part.clone(), shared.page));
                if runs.is_empty() {
                    continue;
                }
                let (address, len, lead) = source.memory_of(part.clone());
                buffer[..lead].fill(0);
                let into = &mut buffer[lead..lead + len];
                let read = if source.own.is_some() {
                    source.copy_own(address, into);
                    Ok(())
                } else {
                    source.copy_foreign(&[(address, len)], into)
                };
                if let Err(error) = read {
                    for run in runs {
                        ledger.put_back(run);
                    }
                    return Err(error);
                }
                let mut at = 0;
                for block in part {
                    let len = source.len_of(block..block + 1);
                    let content = &buffer[at..at + len];
                    at += len;
                    let same = match self.index[data].get(block) {
                        Some(Entry::ZERO) => is_zero(content),
                        Some(entry) => entry.hash == hash(content),
                        None => false,
                    };
                    if !same {
                        shared.put_back(data, block..block + 1);
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks the kernel in steps, between which a cut may begin.
    fn harvest(&self, ledger: &Ledger) -> Result<(), Error> {
        let mut at = ledger.start();
        let end = ledger.start() + ledger.len();
        while at < end {
            let step = HARVEST_STEP.min(end - at);
            ledger.harvest(at, step)?;
            at += step;
            self.shared.make_way();
        }
        Ok(())
    }

    fn segment(&mut self) -> Result<(), Error> {
        if self.segment.is_none() {
            let number = self.next_segment;
            self.next_segment += 1;
            let created =
                SegmentWriter::create(&self.shared.folder, number, self.manifest.identity);
            match created {
                Ok(segment) => self.segment = Some(segment),
                Err(error) => {
                    let _ = self.shared.folder.remove(&segment_name(number));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Hashes, compares and writes the blocks of a batch.
    fn process(&mut self, batch: &Batch, job: Option<&Job>) -> Result<(), Error> {
        if job.is_some_and(Job::is_cancelled) {
            return Ok(());
        }
        self.segment()?;
        let shared = self.shared.clone();
        shared.progress();
        shared.make_way();
        let bytes = batch.buffer.bytes();
        let mut pending: Option<(u32, Range<usize>)> = None;
        let mut total = 0;
        for item in &batch.items {
            let source = &shared.sources[item.data];
            let mut at = item.at;
            for block in item.blocks.clone() {
                let len = source.len_of(block..block + 1);
                let content = &bytes[at..at + len];
                let (from, to) = (at, at + len);
                at = to;
                total += len;
                let old = self.index[item.data].get(block);
                if is_zero(content) {
                    if old != Some(Entry::ZERO) {
                        self.set(item.data, block, old, Entry::ZERO);
                    }
                    continue;
                }
                let sum = hash(content);
                if old.is_some_and(|old| old.kind() != Kind::Zero && old.hash == sum) {
                    // Written, but with the same bytes.
                    continue;
                }
                if let Some(way) = shared.options.compress
                    && let Some(stored) = way.encode(content)
                {
                    self.write_compressed(item.data, block, old, sum, way, &stored)?;
                    continue;
                }
                let segment = self.segment.as_mut().expect("made above");
                let number = segment.number();
                let page = match old {
                    // Not yet visible to anybody: overwritten in place.
                    Some(old) if old.kind() == Kind::Raw && old.segment() == number => old.page(),
                    _ => segment.take(&shared.folder, len)?,
                };
                self.set(
                    item.data,
                    block,
                    old,
                    Entry::new(sum, Kind::Raw, number, page),
                );
                // Blocks that follow each other in the buffer and in the file are one write.
                match &mut pending {
                    Some((first, range))
                        if range.end == from
                            && range.len().is_multiple_of(PAGE)
                            && *first as usize + range.len() / PAGE == page as usize =>
                    {
                        range.end = to;
                    }
                    _ => {
                        if let Some((first, range)) = pending.replace((page, from..to)) {
                            self.write(first, &bytes[range])?;
                        }
                    }
                }
            }
        }
        if let Some((first, range)) = pending {
            self.write(first, &bytes[range])?;
        }
        if let Some(job) = job {
            job.point
                .done_bytes
                .fetch_add(total as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn write(&mut self, page: u32, bytes: &[u8]) -> Result<(), Error> {
        self.pay(bytes.len());
        let shared = self.shared.clone();
        let segment = self.segment.as_mut().expect("made before");
        segment.write(&shared.folder, page, bytes)?;
        shared.progress();
        Ok(())
    }

    fn write_compressed(
        &mut self,
        data: usize,
        block: usize,
        old: Option<Entry>,
        sum: u64,
        way: Compress,
        stored: &[u8],
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        let segment = self.segment.as_mut().expect("made before");
        let page = segment.take(&shared.folder, stored.len())?;
        segment.note_size(page, stored.len());
        let entry = Entry::new(sum, way.kind(), segment.number(), page);
        self.set(data, block, old, entry);
        self.write(page, stored)
    }

    /// Sets an entry; what it replaces in this same segment is not used any more.
    fn set(&mut self, data: usize, block: usize, old: Option<Entry>, new: Entry) {
        let segment = self.segment.as_mut().expect("made before");
        if let Some(old) = old
            && old.kind() != Kind::Zero
            && old.segment() == segment.number()
            && old.page() != new.page()
        {
            let pages = match old.kind() {
                Kind::Raw => self.shared.sources[data]
                    .len_of(block..block + 1)
                    .div_ceil(PAGE) as u32,
                _ => segment.size_at(old.page()),
            };
            segment.drop_pages(old.page()..old.page() + pages);
        }
        self.index[data].set(block, new);
    }

    /// Waits as long as `max_rate` demands.
    fn pay(&mut self, bytes: usize) {
        let Some(rate) = self.shared.options.max_rate else {
            return;
        };
        let now = Instant::now();
        self.paid_until = self.paid_until.max(now) + Duration::from_secs_f64(bytes as f64 / rate);
        // A quarter of a second may be written at once.
        while let Some(wait) = self
            .paid_until
            .checked_duration_since(Instant::now() + Duration::from_millis(250))
        {
            self.shared.progress();
            std::thread::sleep(wait.min(Duration::from_millis(100)));
        }
    }

    /// Writes the index and lets the manifest name the point.
    fn publish(&mut self, job: &Job) -> Result<(), Error> {
        self.segment()?;
        self.consolidate()?;
        let shared = self.shared.clone();
        let segment = self.segment.as_mut().expect("made above");
        let mut data = Vec::new();
        let mut leaves = Vec::new();
        let mut segments = BTreeSet::from([segment.number()]);
        for (index, source) in self.index.iter().zip(&shared.sources) {
            let (directory, new) = index.write(&shared.folder, segment)?;
            index.add_segments(&new, &mut segments);
            leaves.push(new);
            data.push(DataRecord {
                nbytes: source.nbytes as u64,
                lead: source.lead as u64,
                block: source.block as u64,
                directory,
            });
            shared.progress();
        }
        let arrays = shared
            .arrays
            .iter()
            .map(|(name, description, data)| ArrayRecord {
                name: name.clone(),
                description: description.clone(),
                data: *data,
            })
            .collect();
        let record = PointRecord {
            step: job.point.step(),
            meta: job.meta.clone(),
            arrays,
            data,
        };
        let record = segment.append(&shared.folder, &record.to_bytes())?;
        segment.finish(&shared.folder)?;
        shared.progress();
        let mut manifest = self.manifest.clone();
        manifest.points.push(PointSummary {
            step: job.point.step(),
            segment: segment.number(),
            record,
            time: job.time,
            segments: segments.into_iter().collect(),
        });
        if job.is_cancelled() {
            return Err(job.reason());
        }
        if let Err(error) = shared.folder.replace_manifest(&manifest.to_bytes()) {
            // It may have its name all the same. What a manifest names must stay.
            let named = shared.folder.names(segment.number());
            let undone = !named
                || shared
                    .folder
                    .replace_manifest(&self.manifest.to_bytes())
                    .is_ok();
            if undone {
                return Err(error);
            }
        }
        self.manifest = manifest;
        self.segment = None;
        for (index, leaves) in self.index.iter_mut().zip(leaves) {
            index.published(leaves);
        }
        Ok(())
    }

    /// Keeps the number of files that a point needs small: copies what is left in the emptiest ones.
    fn consolidate(&mut self) -> Result<(), Error> {
        let mut blocks: std::collections::BTreeMap<u32, usize> = Default::default();
        for entry in self.index.iter().flat_map(DataIndex::entries) {
            if entry.kind() != Kind::Zero {
                *blocks.entry(entry.segment()).or_default() += 1;
            }
        }
        if blocks.len() <= MOST_SEGMENTS {
            return Ok(());
        }
        let mut by_use: Vec<(usize, u32)> = blocks.into_iter().map(|(a, b)| (b, a)).collect();
        by_use.sort_unstable();
        let number = self.segment.as_ref().map_or(0, SegmentWriter::number);
        let leaving: BTreeSet<u32> = by_use
            .into_iter()
            .map(|(_, segment)| segment)
            .filter(|segment| *segment != number)
            .take(MOST_SEGMENTS / 2)
            .collect();
        let shared = self.shared.clone();
        let files = crate::reader::Files::new(shared.folder.path(), self.manifest.identity);
        for data in 0..self.index.len() {
            let source = &shared.sources[data];
            for block in 0..source.blocks() {
                let Some(old) = self.index[data].get(block) else {
                    continue;
                };
                if old.kind() == Kind::Zero || !leaving.contains(&old.segment()) {
                    continue;
                }
                let mut bytes = vec![0; source.len_of(block..block + 1)];
                files.read_block(old, source.block, &mut bytes)?;
                self.index[data].forget_block(block);
                let batch = Batch {
                    items: vec![Item {
                        data,
                        blocks: block..block + 1,
                        at: 0,
                    }],
                    buffer: Buffer::Own(bytes),
                };
                self.process(&batch, None)?;
            }
        }
        Ok(())
    }

    /// One look at what was written, and copying it if that is worth it.
    fn drain_round(&mut self) {
        if let Err(error) = self.drain_once() {
            // The disk is full, or an array is gone: the next save tells.
            let _ = error;
            self.give_up_segment();
            let _cutting = self.shared.cutting.lock();
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
                self.harvest(ledger)?;
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
                let _cutting = shared.cutting.lock();
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
