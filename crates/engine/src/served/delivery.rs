//! Delivering a block to served memory: its bytes, its poison, its wake-ups, where it lies now.
//!
//! Unsafe: fills the memory of another process. What keeps it sound for this one: buffers are its own. What
//! keeps it right for the other: the bytes are those that its layout says, looked up under the lock that
//! reading an event takes, in the same breath as they are put in place.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::lock::{Mutex, RwLockReadGuard};
use userfault_uffd::abi::UFFDIO_COPY_MODE_WP;
use userfault_uffd::{Fill, Filled, Outcome, fill};

use super::layout::Segment;
use super::process::{Member, Piece, Process};
use crate::backing::Backing;
use crate::block::State;
use crate::body::Body;
use crate::dirty::DirtyMap;
use crate::engine::Engine;
use crate::fill::{Filling, Tried};
use crate::staging;
use crate::stats::add;
use crate::workers::Lead;

/// The first and the longest pause before a fill that the kernel refused, because an event was on its way, is
/// tried again.
pub(super) const PAUSES: (Duration, Duration) =
    (Duration::from_micros(20), Duration::from_millis(2));

/// How often poisoning is tried again while events come, by a thread that must not wait for long.
const POISON_TRIES: u32 = 1000;

/// Memory that another process has mapped.
#[derive(Debug)]
pub(super) struct Elsewhere {
    pub(super) process: Weak<Process>,
    pub(super) owed: Arc<Mutex<DirtyMap>>,
}

/// How one try to put something in place ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    Done,
    /// Nobody was woken by it: somebody was faster, or the place is gone.
    Unwoken,
    /// An event is on its way.
    Pending,
    /// The process is gone.
    Gone,
    Failed(i32),
}

impl Put {
    pub(super) fn of(outcome: Outcome) -> Put {
        match outcome.errno {
            0 => Put::Done,
            libc::EAGAIN => Put::Pending,
            libc::ESRCH => Put::Gone,
            libc::EEXIST | libc::ENOENT | libc::EFAULT => Put::Unwoken,
            errno => Put::Failed(errno),
        }
    }
}

/// The processes of a family, as long as no event is applied.
pub(super) type Members<'a> = RwLockReadGuard<'a, std::collections::BTreeMap<u32, Member>>;

/// A copy of the pages `pages` of a block, whose bytes begin at the page `first`.
struct Delivery<'a> {
    process: &'a Process,
    owed: &'a Mutex<DirtyMap>,
    /// Whose table is told of pages that somebody else filled, if writes are tracked.
    tracked: Option<&'a Body>,
    page: usize,
    first: usize,
    bytes: &'a [u8],
    mode: u64,
}

impl Delivery<'_> {
    fn settle(&self, pages: Range<usize>) {
        if !pages.is_empty() {
            self.owed.lock().remove(pages);
            self.process.rested.store(true, Ordering::Relaxed);
        }
    }

    /// Puts a run of owed pages at an address.
    fn run(&self, address: usize, run: Range<usize>) -> Put {
        let page = self.page;
        let mut at = run.start;
        // Bytes for one call: all of it, or one page once it was seen to lie in more than one mapping.
        let mut most = run.len() * page;
        let mut put = Put::Done;
        while at < run.end {
            let len = most.min((run.end - at) * page);
            let to = address + (at - run.start) * page;
            let from = self.bytes[(at - self.first) * page..][..len]
                .as_ptr()
                .addr();
            let filled = fill::fill(len, page, Fill::Shared, |offset, len| {
                // SAFETY: the buffer is this thread's own. What the other process finds in its memory is what
                // the layout promises; the layout cannot change before the caller lets go of its lock.
                unsafe {
                    self.process
                        .uffd
                        .copy(to + offset, from + offset, len, self.mode)
                }
            });
            match filled {
                Filled::Whole { skipped } => {
                    if skipped > 0 {
                        put = Put::Unwoken;
                        if let Some(body) = self.tracked {
                            // What somebody else put there is not what the store has.
                            body.lock().mark_dirty(at..at + len / page);
                        }
                    }
                    self.settle(at..at + len / page);
                    at += len / page;
                }
                Filled::LayoutChanged { at: done }
                | Filled::Failed {
                    at: done,
                    errno: libc::EFAULT,
                } => {
                    self.settle(at..at + done / page);
                    at += done / page;
                    if most > page {
                        most = page;
                    } else {
                        // No mapping here, or none that this page is part of: nobody can be waiting for it.
                        put = Put::Unwoken;
                        at += 1;
                    }
                }
                Filled::EventPending { at: done } => {
                    self.settle(at..at + done / page);
                    return Put::Pending;
                }
                Filled::ProcessGone => return Put::Gone,
                Filled::StalePage { .. } => unreachable!("others fill the same memory"),
                Filled::Failed { at: done, errno } => {
                    self.settle(at..at + done / page);
                    return Put::Failed(errno);
                }
            }
        }
        put
    }
}

/// The owed runs of a block where they lie now: segment and pages.
fn places(
    member: &Member,
    body: &Body,
    owed: &Mutex<DirtyMap>,
    block: u32,
) -> Vec<(usize, Range<usize>)> {
    let runs = owed.lock().runs(body.pages(block));
    let mut places = Vec::new();
    let ours = |segment: &&Segment<Arc<Piece>>| std::ptr::eq(&*segment.piece.body, body);
    for segment in member.layout.all().filter(ours) {
        let piece = &segment.piece;
        let pages = piece.pages(segment);
        for run in &runs {
            let run = run.start.max(pages.start)..run.end.min(pages.end);
            if !run.is_empty() {
                places.push((piece.address(segment, run.start), run));
            }
        }
    }
    places
}

impl Elsewhere {
    /// Puts what is owed of a block in place, once.
    fn put(&self, process: &Process, body: &Body, block: u32, bytes: &[u8]) -> Put {
        let members = process.family.members.read();
        let Some(member) = members.get(&process.id) else {
            return Put::Gone;
        };
        let delivery = Delivery {
            process,
            owed: &self.owed,
            tracked: process.family.terms.track.then_some(body),
            page: body.memory.page(),
            first: body.pages(block).start,
            bytes,
            mode: if process.family.terms.track {
                UFFDIO_COPY_MODE_WP
            } else {
                0
            },
        };
        let places = places(member, body, &self.owed, block);
        // A page that is not owed any more, because somebody else delivered it, wakes nobody here.
        let put = places.iter().map(|(_, run)| run.len()).sum::<usize>();
        let mut all = if put == body.pages(block).len() {
            Put::Done
        } else {
            Put::Unwoken
        };
        for (address, run) in places {
            match delivery.run(address, run) {
                Put::Done => {}
                Put::Unwoken => all = Put::Unwoken,
                put => return put,
            }
        }
        all
    }

    /// As `put`, for as long as events come.
    fn put_after_events(
        &self,
        engine: &'static Engine,
        process: &Arc<Process>,
        body: &Body,
        block: u32,
        bytes: &[u8],
        lead: &mut Lead,
    ) -> Put {
        let mut pause = PAUSES.0;
        loop {
            match self.put(process, body, block, bytes) {
                Put::Pending => after_events(engine, process, &mut pause, lead),
                put => return put,
            }
        }
    }
}

/// Reads the events on the way, and waits a moment: the kernel goes on refusing until the thread that raised
/// an event has run again.
pub(super) fn after_events(
    engine: &'static Engine,
    process: &Arc<Process>,
    pause: &mut Duration,
    lead: &mut Lead,
) {
    add(&process.family.events.refused, 1);
    lead.give_up();
    process.drain(engine);
    std::thread::sleep(*pause);
    *pause = (*pause * 2).min(PAUSES.1);
}

impl Backing for Elsewhere {
    fn fill(&self, engine: &'static Engine, filling: &Filling, lead: &mut Lead) -> Tried {
        let (body, block) = (&filling.body, filling.block);
        let Some(process) = self.process.upgrade() else {
            body.release(&mut body.lock(), block, State::Absent);
            return Tried::mapped();
        };
        staging::with(engine, body.block_len(block), |buffer| {
            match engine.read(filling, buffer, lead) {
                Ok(true) => {}
                Ok(false) => {
                    engine.came_back(body, block);
                    return Tried::Abandoned;
                }
                Err(error) => return Tried::Failed(error),
            }
            let put = self.put_after_events(engine, &process, body, block, buffer, lead);
            if let Put::Failed(errno) = put {
                return Tried::Failed(io::Error::from_raw_os_error(errno));
            }
            let left = self.owed.lock().any(body.pages(block));
            let state = if left { State::Absent } else { State::Resident };
            let mut table = body.lock();
            let waited = body.release(&mut table, block, state);
            drop(table);
            if waited || put == Put::Unwoken {
                engine.wake(body, block);
            }
            if put == Put::Gone {
                process.retire(engine);
            }
            Tried::mapped()
        })
    }

    fn wake(&self, _engine: &Engine, body: &Body, block: u32) {
        let Some(process) = self.process.upgrade() else {
            return;
        };
        let members = process.family.members.read();
        let Some(member) = members.get(&process.id) else {
            return;
        };
        let pages = body.pages(block);
        for segment in member.layout.all() {
            let piece = &segment.piece;
            if std::ptr::eq(&*piece.body, body) {
                let theirs = piece.pages(segment);
                let (start, end) = (pages.start.max(theirs.start), pages.end.min(theirs.end));
                if start < end {
                    let at = piece.address(segment, start);
                    process.wake(at..at + (end - start) * piece.page());
                }
            }
        }
    }

    fn poison(&self, _engine: &Engine, body: &Body, block: u32) -> io::Result<()> {
        let Some(process) = self.process.upgrade() else {
            return Ok(());
        };
        let Some(engine) = Engine::existing() else {
            return Ok(());
        };
        for _ in 0..POISON_TRIES {
            let members = process.family.members.read();
            let put = match members.get(&process.id) {
                None => return Ok(()),
                Some(member) => poison_once(&process, member, body, &self.owed, block),
            };
            drop(members);
            match put {
                Put::Pending => {
                    process.drain(engine);
                    std::thread::sleep(PAUSES.0 * 10);
                }
                Put::Failed(errno) => return Err(io::Error::from_raw_os_error(errno)),
                _ => return Ok(()),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    fn forbid(&self, _body: &Body, _block: u32) -> &'static str {
        // This process can do no more, and zeros would be worse.
        "whoever touches the block waits for good"
    }
}

/// Makes touches of what is owed of a block SIGBUS.
pub(super) fn poison_once(
    process: &Process,
    member: &Member,
    body: &Body,
    owed: &Mutex<DirtyMap>,
    block: u32,
) -> Put {
    let page = body.memory.page();
    for (address, run) in places(member, body, owed, block) {
        match poison_run(process, address, run.len() * page, page) {
            Put::Done => {}
            put => return put,
        }
    }
    Put::Done
}

/// Makes touches of absent pages SIGBUS.
pub(super) fn poison_run(process: &Process, address: usize, len: usize, page: usize) -> Put {
    let mut at = 0;
    let mut most = len;
    while at < len {
        let now = most.min(len - at);
        let filled = fill::fill(now, page, Fill::Shared, |offset, len| {
            // SAFETY: a page that cannot be had is SIGBUS by the terms of `serve`.
            unsafe { process.uffd.poison(address + at + offset, len, 0) }
        });
        match filled {
            Filled::Whole { .. } => at += now,
            Filled::LayoutChanged { at: done }
            | Filled::Failed {
                at: done,
                errno: libc::EFAULT,
            } => {
                at += done;
                if most > page {
                    most = page;
                } else {
                    at += page;
                }
            }
            Filled::EventPending { .. } => return Put::Pending,
            Filled::ProcessGone => return Put::Gone,
            Filled::StalePage { .. } => unreachable!("others fill the same memory"),
            Filled::Failed { errno, .. } => return Put::Failed(errno),
        }
    }
    Put::Done
}
