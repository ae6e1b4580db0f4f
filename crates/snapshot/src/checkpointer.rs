//! Saving arrays, again and again, while the program goes on.
//!
//! Unsafe: asks for the page size.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use userfault_engine::elsewhere::this_thread;
use userfault_engine::lock::Mutex;
use userfault_engine::{StoodBack, generation};

use crate::codec::Compress;
use crate::drain::drain_into;
use crate::error::Error;
use crate::folder::{Fault, Folder, read_manifest};
use crate::following::{carried_on, source};
use crate::manifest::{Manifest, PointSummary};
use crate::point::Point;
use crate::saver::{self, Command, Saver};
use crate::shared::{Group, Shared, State};
use crate::source::{Source, Way};
use crate::staging::Staging;

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

/// Saves arrays into a directory.
pub struct Checkpointer {
    pub(crate) shared: Arc<Shared>,
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
        folder.remove_working_sets(|step| manifest.points.iter().any(|point| point.step == step));
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
            ..State::default()
        };
        let shared = Arc::new(Shared::new(
            options, sources, groups, named, folder, staging, page, state,
        ));
        let saver = Saver::new(shared.clone(), index, manifest, next_segment);
        let saver = Arc::new(Mutex::new(saver));
        let draining = drain_into(&shared, &saver)?;
        let (behind, watcher) = (shared.clone(), shared.clone());
        // If a thread cannot be started this ends the other one.
        let checkpointer = Checkpointer {
            shared,
            generation: generation(),
            saving: Mutex::new(()),
        };
        spawn("userfault-save", move || {
            // A cut wakes it to have help.
            let _back = StoodBack::begin();
            behind.saver.store(this_thread(), Ordering::Relaxed);
            saver::run(&saver, &behind, draining);
        })?;
        spawn("userfault-watch", move || {
            let _back = StoodBack::begin();
            watcher.watch();
        })?;
        Ok(checkpointer)
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
        shared.wanted.fetch_add(1, Ordering::Relaxed);
        let _saving = self.saving.lock();
        let result = self.cut(step, meta);
        shared.wanted.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// The points that are finished, oldest first.
    pub fn points(&self) -> Result<Vec<PointSummary>, Error> {
        if self.generation != generation() {
            return Err(Error::Forked);
        }
        Ok(self.shared.state.lock().points.clone())
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

    /// Has the kernel note the next write to every page that it tracks, as the drain and the end of a save do, and
    /// nothing else: what that alone costs the program can be measured so.
    pub fn rearm(&self) -> Result<(), Error> {
        self.check()?;
        for source in &self.shared.sources {
            if let Way::Silent(ledger) = &source.way {
                self.shared.harvest(ledger)?;
            }
        }
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
        if self.generation != generation() {
            // The threads are the parent's; a child has none.
            return true;
        }
        let until = Instant::now() + at_most;
        let mut state = self.shared.state.lock();
        while !state.ended
            && !self
                .shared
                .changed
                .wait_until(&mut state, until)
                .timed_out()
        {}
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
