//! Saving arrays, again and again, while the program goes on.
//!
//! Unsafe: asks for the page size.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use userfault_engine::generation;
use userfault_engine::tracked::{Ledger, Tracked, own_memory, trackable};

use crate::codec::Compress;
use crate::entry::PAGE;
use crate::error::Error;
use crate::folder::{Fault, Folder, read_manifest};
use crate::index::{DataIndex, same_layout};
use crate::manifest::{Manifest, PointSummary};
use crate::point::Point;
use crate::reader::OpenPoint;
use crate::saver::{Buffer, Command, Job, JobAside, Parts, Saver, copy_parts};
use crate::source::{Source, Way};
use crate::staging::Staging;

/// Bytes of a block that is stored as it is: what one page of memory holds.
const PLAIN_BLOCK: usize = PAGE;

/// Bytes of a block that is compressed: smaller ones do not get much smaller.
const COMPRESSED_BLOCK: usize = 64 << 10;

/// Foreign arrays below this are copied: tracking them would cost a mapping each. Bytes.
pub const COPIED_BELOW: usize = 1 << 20;

/// From so many bytes on a second thread helps to copy. Bytes.
const BY_TWO: usize = 1 << 20;

/// One array to be saved.
#[derive(Debug, Clone)]
pub struct Array {
    /// Its name.
    pub name: String,
    /// What Python needs to know of it: a JSON text.
    pub description: String,
    /// Address of its first byte. Whoever makes a checkpointer keeps the memory alive.
    pub start: usize,
    /// Bytes, at least one.
    pub nbytes: usize,
    /// Copy it at every cut, whatever it is made of.
    pub always_copy: bool,
}

/// How to save.
#[derive(Clone)]
pub struct Options {
    /// Keep so many points.
    pub max_to_keep: Option<usize>,
    /// Compress blocks.
    pub compress: Option<Compress>,
    /// A point is finished when it is on the disk.
    pub durable: bool,
    /// Bytes a second that are written at most.
    pub max_rate: Option<f64>,
    /// Bytes that may be used for what was copied aside.
    pub staging: usize,
    /// Copy in the background between points.
    pub drain: bool,
    /// A save that writes nothing for so long has failed.
    pub timeout: Duration,
    /// Called before every call on a file.
    pub fault: Option<Fault>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_to_keep: None,
            compress: None,
            durable: true,
            max_rate: None,
            staging: 256 << 20,
            drain: true,
            timeout: Duration::from_secs(60),
            fault: None,
        }
    }
}

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
    last_step: Option<u64>,
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
    pub state: Mutex<State>,
    pub changed: Condvar,
    /// Held by a cut, and by the drain from taking a page to having read it.
    pub cutting: Mutex<()>,
    /// A cut waits.
    wanted: AtomicBool,
    /// A cut copies, and needs no room from the saver.
    copying: AtomicBool,
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
    /// True if the drain should step aside.
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Lets a cut go first: while it lasts, another thread that works on memory would be in its way.
    pub fn make_way(&self) {
        let mut patience = 200;
        while self.copying.load(Ordering::Acquire) && patience > 0 {
            std::thread::sleep(Duration::from_micros(200));
            patience -= 1;
        }
    }

    /// Something was done.
    pub fn progress(&self) {
        let now = self.began.elapsed().as_millis() as u64;
        self.progressed.store(now, Ordering::Relaxed);
    }

    fn idle_for(&self) -> Duration {
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
        let _cutting = self.cutting.lock();
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

    /// Prepares staging for a cut of so many bytes.
    pub fn warm(&self, bytes: usize) {
        self.staging.warm(bytes + bytes / 4);
    }

    /// A save has an outcome.
    pub fn end(&self, job: &Arc<Job>, outcome: Result<(), Error>) {
        let failed = outcome.clone().err();
        let first = job.point.end(outcome);
        let mut state = self.state.lock();
        state.active.retain(|other| !Arc::ptr_eq(other, job));
        if first && let Some(error) = failed {
            state.failed.get_or_insert(error);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Gives up saves that make no progress, until the checkpointer ends.
    fn watch(&self) {
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

/// Saves arrays into a directory.
pub struct Checkpointer {
    shared: Arc<Shared>,
    generation: u32,
    /// One cut at a time.
    saving: Mutex<()>,
}

impl Checkpointer {
    /// Begins to follow `arrays`. Their memory must stay what it is as long as the checkpointer lives: its
    /// maker holds the objects that own it.
    pub fn open(
        path: PathBuf,
        arrays: Vec<Array>,
        options: Options,
    ) -> Result<Checkpointer, Error> {
        let page = page_size();
        let folder = Folder::open(&path, options.durable, options.fault.clone())?;
        let manifest = match read_manifest(&path)? {
            Some(bytes) => Manifest::from_bytes(&path.join(crate::folder::MANIFEST), &bytes)?,
            None => Manifest::new(identity()),
        };
        folder.remove_leftovers(|number| manifest.names(number))?;
        let next_segment = manifest
            .points
            .iter()
            .flat_map(|point| &point.segments)
            .max()
            .map_or(1, |last| last + 1);
        let mut places: Vec<(usize, usize)> = Vec::new();
        let mut named = Vec::new();
        let mut sources: Vec<Source> = Vec::new();
        let mut groups: Vec<Group> = Vec::new();
        for array in &arrays {
            if array.nbytes == 0 {
                return Err(Error::Invalid(format!(
                    "array {:?} has no bytes",
                    array.name
                )));
            }
            if named.iter().any(|(name, _, _)| *name == array.name) {
                return Err(Error::Invalid(format!(
                    "two arrays have the name {:?}",
                    array.name
                )));
            }
            let place = (array.start, array.nbytes);
            let data = match places.iter().position(|other| *other == place) {
                // The same memory under another name.
                Some(data) => data,
                None => {
                    places.push(place);
                    let number = sources.len();
                    sources.push(source(array, &options, page, number, &mut groups)?);
                    number
                }
            };
            named.push((array.name.clone(), array.description.clone(), data));
        }
        let index = carried_on(&path, &manifest, &named, &sources);
        let staging = Staging::new(options.staging)
            .map_err(|error| Error::Memory(format!("no address space for staging: {error}")))?;
        let state = State {
            points: manifest.points.clone(),
            last_step: manifest.points.last().map(|point| point.step),
            ..State::default()
        };
        let shared = Arc::new(Shared {
            options,
            sources,
            groups,
            arrays: named,
            folder,
            staging,
            page,
            state: Mutex::new(state),
            changed: Condvar::new(),
            cutting: Mutex::new(()),
            wanted: AtomicBool::new(false),
            copying: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            prune_later: Mutex::default(),
            began: Instant::now(),
            progressed: AtomicU64::new(0),
        });
        let saver = Saver::new(shared.clone(), index, manifest, next_segment);
        let watcher = shared.clone();
        spawn("userfault-save", move || saver.run())?;
        spawn("userfault-watch", move || watcher.watch())?;
        Ok(Checkpointer {
            shared,
            generation: generation(),
            saving: Mutex::new(()),
        })
    }

    fn check(&self) -> Result<(), Error> {
        if self.generation != generation() {
            return Err(Error::Forked);
        }
        if self.shared.state.lock().closing {
            return Err(Error::Closed);
        }
        Ok(())
    }

    /// Takes a point: returns at the cut. `meta` is a JSON text. Fails if an earlier save failed and nobody
    /// has been told yet.
    pub fn save(&self, step: Option<u64>, meta: String) -> Result<Arc<Point>, Error> {
        self.check()?;
        let shared = &self.shared;
        shared.wanted.store(true, Ordering::Relaxed);
        let _saving = self.saving.lock();
        let result = self.cut(step, meta);
        shared.wanted.store(false, Ordering::Relaxed);
        result
    }

    fn cut(&self, step: Option<u64>, meta: String) -> Result<Arc<Point>, Error> {
        let shared = &self.shared;
        let began = Instant::now();
        let job = {
            let mut state = shared.state.lock();
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            if !shared.groups.is_empty() {
                // A guard has one cut of a consumer at a time.
                while !state.active.is_empty() {
                    shared.changed.wait(&mut state);
                }
                if let Some(error) = state.failed.take() {
                    return Err(error);
                }
            }
            let step = match (step, state.last_step) {
                (Some(step), Some(last)) if step <= last => {
                    return Err(Error::Invalid(format!(
                        "step {step} does not come after step {last}, the last one saved"
                    )));
                }
                (Some(step), _) => step,
                (None, Some(last)) => last + 1,
                (None, None) => 0,
            };
            let point = Arc::new(Point::new(step, shared.method()));
            let job = Arc::new(Job::new(point, meta));
            if state.active.is_empty() {
                shared.progress();
            }
            state.active.push(job.clone());
            job
        };
        let handed_over = AtomicBool::new(false);
        let hand_over = || {
            if !handed_over.swap(true, Ordering::Relaxed) {
                let mut state = shared.state.lock();
                state.queue.push_back(Command::Save(job.clone()));
                drop(state);
                shared.changed.notify_all();
            }
        };
        let result = {
            let _cutting = shared.cutting.lock();
            let failures = shared.failures.load(Ordering::Relaxed);
            job.failures.store(failures, Ordering::Relaxed);
            job.cut.store(
                shared.cuts.fetch_add(1, Ordering::Relaxed) + 1,
                Ordering::Relaxed,
            );
            shared.copying.store(true, Ordering::Release);
            let copied = self.copy_aside(&job, &hand_over);
            shared.copying.store(false, Ordering::Release);
            copied
        };
        if let Err(error) = result {
            job.cancel(error);
            shared.take_back(&job);
            shared.end(&job, Err(job.reason()));
        } else {
            shared.state.lock().last_step = Some(job.point.step());
        }
        job.end_of_cut();
        hand_over();
        job.point.stalled(began.elapsed());
        Ok(job.point.clone())
    }

    /// The cut: protects what is guarded, asks what else was written, and copies that.
    /// `hand_over` sets the saver to work: at once if staging would not hold it all, or if it can help to copy;
    /// else at the end, for two threads that work on memory slow each other down.
    fn copy_aside(&self, job: &Arc<Job>, hand_over: &(dyn Fn() + Sync)) -> Result<(), Error> {
        let shared = &self.shared;
        let mut total = 0;
        for (number, group) in shared.groups.iter().enumerate() {
            let Some(guard) = group.memory.guard() else {
                continue;
            };
            let aside = Arc::new(JobAside {
                shared: shared.clone(),
                job: job.clone(),
                group: number,
            });
            let (cut, pending) = guard.cut(group.consumer, aside)?;
            total += pending.iter().map(ExactSizeIterator::len).sum::<usize>() * guard.block();
            job.guarded.lock().push((number, cut, pending));
        }
        let mut parts = Parts::new();
        for (data, source) in shared.sources.iter().enumerate() {
            match &source.way {
                Way::Guarded(_) => {}
                Way::Copied => parts.push((data, std::iter::once(0..source.blocks()).collect())),
                Way::Silent(ledger) => {
                    let pages = ledger.take_written()?;
                    let mut blocks: Vec<Range<usize>> = Vec::with_capacity(pages.len());
                    let mut edges = source.edges();
                    let dirty = pages
                        .into_iter()
                        .map(|run| source.blocks_of_pages(ledger, run, shared.page));
                    edges.extend(dirty);
                    edges.sort_unstable_by_key(|run| run.start);
                    for run in edges {
                        match blocks.last_mut() {
                            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                            _ => blocks.push(run),
                        }
                    }
                    parts.push((data, blocks));
                }
            }
        }
        let copied: usize = parts
            .iter()
            .flat_map(|(data, runs)| {
                runs.iter()
                    .map(|run| shared.sources[*data].len_of(run.clone()))
            })
            .sum();
        total += copied;
        job.point.total_bytes.store(total as u64, Ordering::Relaxed);
        // What was taken is known before anything can fail.
        *job.taken.lock() = parts
            .iter()
            .flat_map(|(data, runs)| runs.iter().map(|run| (*data, run.clone())))
            .collect();
        for (data, runs) in &parts {
            if shared.sources[*data].own.is_some() && !runs.is_empty() {
                shared.sources[*data].still_there()?;
            }
        }
        let mut next = || {
            let chunk = shared.staging.take(&|| job.is_cancelled());
            chunk.map(Buffer::Chunk)
        };
        if copied > shared.options.staging / 2 {
            // It will need the saver's help to get room.
            shared.copying.store(false, Ordering::Release);
            hand_over();
            return copy_parts(shared, job, parts, &mut next);
        }
        if copied < BY_TWO {
            return copy_parts(shared, job, parts, &mut next);
        }
        let (first, second) = halves(parts, copied / 2, |data, run| {
            shared.sources[data].len_of(run)
        });
        job.ask_for_help(second);
        hand_over();
        let copied = copy_parts(shared, job, first, &mut next);
        let left = job.end_help()?;
        copied?;
        copy_parts(shared, job, left, &mut next)
    }

    /// The points that are finished, oldest first.
    pub fn points(&self) -> Vec<PointSummary> {
        self.shared.state.lock().points.clone()
    }

    /// Waits until everything asked for is done; fails with what failed meanwhile, once. `None`: it is not
    /// done after `at_most`.
    pub fn wait(&self, at_most: Duration) -> Option<Result<(), Error>> {
        if self.generation != generation() {
            return Some(Err(Error::Forked));
        }
        let until = Instant::now() + at_most.min(Duration::from_secs(1 << 30));
        let mut state = self.shared.state.lock();
        loop {
            // A thread that the disk does not let go of has nothing to wait for.
            let stuck = state.active.is_empty()
                && state.busy
                && self.shared.idle_for() > self.shared.options.timeout;
            if (state.queue.is_empty() && !state.busy && state.active.is_empty())
                || state.ended
                || stuck
            {
                return Some(state.failed.take().map_or(Ok(()), Err));
            }
            if Instant::now() >= until {
                return None;
            }
            let step = (Instant::now() + Duration::from_millis(100)).min(until);
            self.shared.changed.wait_until(&mut state, step);
        }
    }

    /// Asks for all but the newest `keep` points to be dropped; [`Checkpointer::wait`] waits for it.
    pub fn prune(&self, keep: usize) -> Result<(), Error> {
        self.check()?;
        self.shared
            .state
            .lock()
            .queue
            .push_back(Command::Prune(keep));
        self.shared.changed.notify_all();
        Ok(())
    }

    /// What `save` keeps at most.
    pub fn max_to_keep(&self) -> Option<usize> {
        self.shared.options.max_to_keep
    }

    /// Nothing new is taken. What is under way is finished by the saver; wait for it first.
    pub fn close(&self) {
        if self.generation != generation() {
            return;
        }
        let mut state = self.shared.state.lock();
        state.closing = true;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// True once the threads have ended.
    pub fn ended(&self, at_most: Duration) -> bool {
        let until = Instant::now() + at_most;
        let mut state = self.shared.state.lock();
        while !state.ended
            && !self
                .shared
                .changed
                .wait_until(&mut state, until)
                .timed_out()
        {}
        if state.ended {
            for group in &self.shared.groups {
                if let Some(guard) = group.memory.guard() {
                    guard.unsubscribe(group.consumer);
                }
            }
        }
        state.ended
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        if self.generation != generation() {
            // The threads are the parent's, and so is what they share.
            std::mem::forget(self.shared.clone());
            return;
        }
        self.close();
    }
}

impl Shared {
    fn method(&self) -> Vec<(String, &'static str)> {
        self.arrays
            .iter()
            .map(|(name, _, data)| {
                let way = match &self.sources[*data].way {
                    Way::Copied => "copied",
                    Way::Silent(_) => "tracked",
                    Way::Guarded(_) => "guarded",
                };
                (name.clone(), way)
            })
            .collect()
    }
}

/// Parts cut in two after about `first` bytes.
fn halves(
    parts: Parts,
    first: usize,
    len: impl Fn(usize, Range<usize>) -> usize,
) -> (Parts, Parts) {
    let (mut one, mut two, mut sum) = (Parts::new(), Parts::new(), 0);
    for (data, runs) in parts {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for run in runs {
            let bytes = len(data, run.clone());
            if sum + bytes <= first {
                here.push(run);
            } else if sum < first && run.len() > 1 {
                let blocks = (run.len() * (first - sum) / bytes).clamp(1, run.len() - 1);
                here.push(run.start..run.start + blocks);
                there.push(run.start + blocks..run.end);
            } else {
                there.push(run);
            }
            sum += bytes;
        }
        for (half, runs) in [(&mut one, here), (&mut two, there)] {
            if !runs.is_empty() {
                half.push((data, runs));
            }
        }
    }
    (one, two)
}

/// How an array is followed.
fn source(
    array: &Array,
    options: &Options,
    page: usize,
    number: usize,
    groups: &mut Vec<Group>,
) -> Result<Source, Error> {
    let block = match options.compress {
        Some(_) => COMPRESSED_BLOCK,
        None => PLAIN_BLOCK,
    };
    let own = own_memory(array.start, array.nbytes);
    let mut source = Source {
        start: array.start,
        nbytes: array.nbytes,
        lead: array.start % block,
        block,
        way: Way::Copied,
        own: own.clone(),
        name: array.name.clone(),
    };
    if array.always_copy {
        return Ok(source);
    }
    let whole = array.start.next_multiple_of(page)..(array.start + array.nbytes) / page * page;
    if let Some(own) = own {
        if own.guard().is_some() {
            let at = groups
                .iter()
                .position(|group| Arc::ptr_eq(&group.memory, &own));
            let at = at.unwrap_or_else(|| {
                groups.push(Group {
                    consumer: own.guard().map_or(0, |guard| guard.subscribe()),
                    memory: own,
                    arrays: Vec::new(),
                });
                groups.len() - 1
            });
            groups[at].arrays.push(number);
            source.way = Way::Guarded(at);
        } else if whole.start < whole.end {
            source.way = Way::Silent(Ledger::open(whole.start, whole.len())?);
        }
        return Ok(source);
    }
    if array.nbytes < COPIED_BELOW || whole.start >= whole.end {
        return Ok(source);
    }
    let refused = |why: String| {
        Error::Invalid(format!(
            "array {:?} cannot be tracked: {why}. Name it in always_copy to have it copied at every cut",
            array.name
        ))
    };
    trackable(whole.clone()).map_err(|why| refused(why.to_string()))?;
    let ledger = Ledger::open(whole.start, whole.len()).map_err(|why| refused(why.to_string()))?;
    source.way = Way::Silent(ledger);
    Ok(source)
}

/// The index of each array as the last point has it, where the arrays are laid out as they were.
fn carried_on(
    path: &std::path::Path,
    manifest: &Manifest,
    named: &[(String, String, usize)],
    sources: &[Source],
) -> Vec<DataIndex> {
    let mut index: Vec<DataIndex> = sources
        .iter()
        .map(|source| DataIndex::new(source.blocks()))
        .collect();
    let Some(last) = manifest.points.last() else {
        return index;
    };
    // A point that cannot be read is verify's business; everything is saved anew.
    let Ok(point) = OpenPoint::of(path, manifest.identity, last.clone()) else {
        return index;
    };
    for array in point.arrays() {
        let record = &point.data()[array.data];
        let Some((_, _, data)) = named.iter().find(|(name, _, data)| {
            let source = &sources[*data];
            *name == array.name && same_layout(record, source.nbytes, source.lead, source.block)
        }) else {
            continue;
        };
        let Ok(reader) = point.reader(array.data) else {
            continue;
        };
        let mut entries = Vec::with_capacity(record.blocks());
        let read = (0..record.leaves()).try_for_each(|leaf| {
            entries.extend_from_slice(reader.leaf(leaf)?);
            Ok::<(), Error>(())
        });
        if read.is_ok() {
            index[*data] = DataIndex::from_point(entries, reader.leaf_entries().to_vec());
        }
    }
    index
}

fn identity() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    crate::entry::hash(format!("{now} {}", std::process::id()).as_bytes())
}

fn page_size() -> usize {
    // SAFETY: sysconf takes a number; a page size exists on every Linux.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let _blocked = userfault_engine::BlockedSignals::all();
    std::thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(|_| ())
        .map_err(|error| Error::Memory(format!("no thread could be started: {error}")))
}
