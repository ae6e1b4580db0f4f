//! The handle of what is served: figures, errors, what is owed, what was written, and the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::lock::Mutex;

use super::delivery::{Put, poison_run};
use super::layout::Layout;
use super::process::{Family, Piece, Process};
use super::protection::Pages;
use crate::block::State;
use crate::dirty::DirtyMap;
use crate::engine::Engine;
use crate::error::Error;
use crate::protect::protect_again;
use crate::stats::{Stats, percentiles};
use crate::table::BlockError;
use crate::workers::Task;

/// What a process is still owed, where it lies now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    /// Which process, a number of this page server's own; the one that was handed over has the least.
    pub process: u32,
    /// Address in that process.
    pub address: usize,
    /// Bytes.
    pub len: usize,
    /// Where they are in the store, bytes.
    pub store_offset: u64,
    /// Bytes of a page.
    pub page: usize,
}

/// Pages that were written since somebody last asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Which process.
    pub process: u32,
    /// Address in that process.
    pub address: usize,
    /// Bytes.
    pub len: usize,
    /// Where the store has them, bytes.
    pub store_offset: u64,
}

/// Bytes of the store that could not be had.
#[derive(Debug, Clone)]
pub struct ServedError {
    /// Where they are in the store, bytes.
    pub store_offset: u64,
    /// What happened; its offset is that in the item of the layout.
    pub error: BlockError,
}

/// Memory of other processes that this one serves, until they have ended or [`Served::close`] is called;
/// dropping this handle changes nothing.
#[derive(Debug)]
pub struct Served {
    pub(super) family: Arc<Family>,
    pub(super) generation: u32,
}

impl Served {
    fn engine(&self) -> Result<&'static Engine, Error> {
        if self.generation != crate::fork::generation() {
            return Err(Error::Forked);
        }
        Engine::existing().ok_or(Error::Forked)
    }

    /// Something of each piece, with the process that has it.
    fn each<T>(
        &self,
        mut of: impl FnMut(&Process, &Layout<Arc<Piece>>, &Arc<Piece>) -> T,
    ) -> Vec<T> {
        if self.generation != crate::fork::generation() {
            return Vec::new();
        }
        let members = self.family.members.read();
        let mut all = Vec::new();
        for member in members.values() {
            for piece in &member.pieces {
                all.push(of(&member.process, &member.layout, piece));
            }
        }
        all
    }

    fn processes_now(&self) -> Vec<Arc<Process>> {
        let members = self.family.members.read();
        members
            .values()
            .map(|member| member.process.clone())
            .collect()
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.family.terms.name
    }

    /// The living processes, by the numbers that [`Owed`] and [`Written`] have; the pid of those that are known.
    pub fn processes(&self) -> Vec<(u32, Option<u32>)> {
        if self.generation != crate::fork::generation() {
            return Vec::new();
        }
        let processes = self.processes_now();
        processes
            .iter()
            .map(|process| (process.id, process.pid))
            .collect()
    }

    /// What is still owed, by process and piece.
    pub fn owed(&self) -> Vec<Owed> {
        let owed = self.each(|process, layout, piece| {
            let mut owed = Vec::new();
            for (address, run, segment) in runs(layout, piece, &piece.owed) {
                let page = piece.page();
                owed.push(Owed {
                    process: process.id,
                    address,
                    len: run * page,
                    store_offset: piece.body.store_offset + segment,
                    page,
                });
            }
            owed
        });
        owed.into_iter().flatten().collect()
    }

    /// Bytes that are still owed, in all processes.
    pub fn owed_bytes(&self) -> u64 {
        self.owed().iter().map(|owed| owed.len as u64).sum()
    }

    /// Figures of all processes together, also of those that are gone. `regions` counts the living.
    pub fn stats(&self) -> Stats {
        let mut total = Stats::default();
        if self.generation != crate::fork::generation() {
            return total;
        }
        self.family.past.add_to(&mut total);
        let bodies = self.each(|_, _, piece| piece.body.clone());
        for body in &bodies {
            body.counters.add_to(&mut total);
        }
        let histograms: Vec<_> = bodies
            .iter()
            .map(|body| &body.counters.latency)
            .chain([&self.family.past.latency])
            .collect();
        percentiles(&histograms, &mut total);
        total.regions = self.family.members.read().len() as u64;
        total
    }

    /// The events that have been read, by name, and the fills that were refused because one was on its way.
    pub fn events(&self) -> [(&'static str, u64); 5] {
        let events = &self.family.events;
        [
            ("fork", events.forks.load(Ordering::Relaxed)),
            ("remap", events.remaps.load(Ordering::Relaxed)),
            ("remove", events.removes.load(Ordering::Relaxed)),
            ("unmap", events.unmaps.load(Ordering::Relaxed)),
            ("refused", events.refused.load(Ordering::Relaxed)),
        ]
    }

    /// What was given up and not healed; of processes that are gone, what had been given up then.
    pub fn errors(&self) -> Vec<ServedError> {
        let living = self.each(|_, _, piece| {
            let errors = piece.body.lock().errors.clone();
            errors
                .into_iter()
                .map(|error| (piece.body.store_offset, error))
                .collect()
        });
        let past = if self.generation == crate::fork::generation() {
            self.family.past_errors.lock().clone()
        } else {
            Vec::new()
        };
        let all = living
            .into_iter()
            .flat_map(|errors: Vec<_>| errors)
            .chain(past);
        all.map(|(from, error)| ServedError {
            store_offset: from + error.offset,
            error,
        })
        .collect()
    }

    /// Tries again what was given up; returns the bytes healed. Fails with the first that still cannot be had.
    pub fn heal(&self) -> Result<u64, Error> {
        let engine = self.engine()?;
        let mut healed = 0;
        for body in self.each(|_, _, piece| piece.body.clone()) {
            for block in 0..body.all_blocks() {
                if body.lock().state(block) == State::Poisoned {
                    healed += crate::poison::heal(engine, &body, block)?;
                }
            }
        }
        Ok(healed)
    }

    /// Begins to deliver what is owed, in the order of the store, one block of each piece at a time: touches
    /// never wait behind it. [`Served::owed_bytes`] tells how far it is. What cannot be read is left out.
    pub fn prefetch(&self) -> Result<(), Error> {
        let engine = self.engine()?;
        for body in self.each(|_, _, piece| piece.body.clone()) {
            engine.workers.submit(engine, Task::Push(body, 0));
        }
        Ok(())
    }

    /// Takes what may have been written since the last call (or the beginning), and protects it again: later
    /// writes are in the next answer. Pages that somebody else filled, or that were thrown away, count as written.
    ///
    /// Read the bytes after this call. Empty unless writes are tracked.
    pub fn take_written(&self) -> Result<Vec<Written>, Error> {
        let engine = self.engine()?;
        let mut all = Vec::new();
        for process in self.processes_now() {
            while let Some(written) = take_once(&process) {
                match written {
                    Ok(written) => {
                        all.extend(written);
                        break;
                    }
                    Err(taken) => {
                        all.extend(taken);
                        process.drain(engine);
                        std::thread::sleep(Duration::from_micros(100));
                    }
                }
            }
        }
        Ok(all)
    }

    /// Waits until no process is left, at most `at_most`. True if none is.
    pub fn wait(&self, at_most: Option<Duration>) -> Result<bool, Error> {
        self.engine()?;
        let until = at_most.map(|at_most| Instant::now() + at_most);
        let mut alive = self.family.alive.lock();
        while *alive {
            match until {
                None => self.family.ended.wait(&mut alive),
                Some(until) => {
                    if self.family.ended.wait_until(&mut alive, until).timed_out() {
                        return Ok(!*alive);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Stops to serve. With `poison` a later touch of what is still owed is SIGBUS; without, it waits for another
    /// server, if the process has kept a copy of its descriptor, *and reads zeros if it has not*. Closing again does
    /// nothing. Fails, and goes on serving, if the kernel cannot poison.
    pub fn close(&self, poison: bool) -> Result<(), Error> {
        let engine = match self.engine() {
            Ok(engine) => engine,
            Err(_) => return Ok(()),
        };
        loop {
            let processes = self.processes_now();
            if processes.is_empty() {
                return Ok(());
            }
            for process in processes {
                if poison {
                    poison_all(engine, &process)?;
                }
                process.retire(engine);
            }
        }
    }
}

impl Drop for Served {
    /// Serving goes on. In a forked child the descriptors were closed at the fork, and their numbers may be
    /// somebody else's by now.
    fn drop(&mut self) {
        if self.generation != crate::fork::generation() {
            std::mem::forget(self.family.clone());
        }
    }
}

/// The runs of a set of pages where they lie now: address, pages, and offset in the piece.
fn runs(
    layout: &Layout<Arc<Piece>>,
    piece: &Arc<Piece>,
    set: &Mutex<DirtyMap>,
) -> Vec<(usize, usize, u64)> {
    let mut found = Vec::new();
    let set = set.lock();
    for segment in layout
        .all()
        .filter(|segment| Arc::ptr_eq(&segment.piece, piece))
    {
        for run in set.runs(piece.pages(segment)) {
            let offset = (run.start * piece.page()) as u64;
            found.push((piece.address(segment, run.start), run.len(), offset));
        }
    }
    found
}

/// Takes what has been written in a process. `None`: it is gone. `Err`: an event is on its way, and what was taken
/// until then.
fn take_once(process: &Arc<Process>) -> Option<Result<Vec<Written>, Vec<Written>>> {
    if !process.family.terms.track {
        return None;
    }
    let members = process.family.members.read();
    let member = members.get(&process.id)?;
    let mut taken = Vec::new();
    for segment in member.layout.all() {
        let piece = &segment.piece;
        // Held over the call, so that a first write comes before both or after both.
        let mut table = piece.body.lock();
        let runs = table.home.runs(piece.pages(segment));
        let pages = Pages::of(process, segment);
        for run in runs {
            table.home.remove(run.clone());
            for kept in protect_again(&pages, [run.clone()]) {
                table.mark_dirty(kept);
            }
            match pages.refused.get() {
                Put::Pending => return Some(Err(taken)),
                Put::Gone => return None,
                _ => {}
            }
            taken.push(Written {
                process: process.id,
                address: piece.address(segment, run.start),
                len: run.len() * piece.page(),
                store_offset: piece.body.store_offset + (run.start * piece.page()) as u64,
            });
        }
    }
    Some(Ok(taken))
}

/// Poisons everything that a process is owed, and wakes who waits for it.
fn poison_owed(process: &Arc<Process>) -> Put {
    let members = process.family.members.read();
    let Some(member) = members.get(&process.id) else {
        return Put::Gone;
    };
    for piece in &member.pieces {
        for (address, run, _) in runs(&member.layout, piece, &piece.owed) {
            match poison_run(process, address, run * piece.page(), piece.page()) {
                Put::Done => {}
                put => return put,
            }
        }
    }
    for segment in member.layout.all() {
        process.wake(segment.at..segment.end());
    }
    Put::Done
}

/// Poisons everything that a process is owed, for as long as events come.
fn poison_all(engine: &'static Engine, process: &Arc<Process>) -> Result<(), Error> {
    loop {
        match poison_owed(process) {
            Put::Pending => {
                process.drain(engine);
                std::thread::sleep(Duration::from_micros(100));
            }
            Put::Failed(errno) => {
                return Err(Error::Os {
                    call: "UFFDIO_POISON",
                    errno,
                    advice: "this kernel cannot poison memory (Linux 6.6 can); stop the process, or close \
                             without poison if it has kept a copy of its userfaultfd"
                        .into(),
                });
            }
            _ => return Ok(()),
        }
    }
}
