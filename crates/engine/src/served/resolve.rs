//! Resolvers of served memory: what a missing, a minor and a write-protect fault mean there.
//!
//! Unsafe: fills the memory of another process. What keeps it sound for this one: buffers are its own. What
//! keeps it right for the other: the bytes are those that its layout says, looked up under the lock that
//! reading an event takes, in the same breath as they are put in place.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::lock::{Mutex, RwLockReadGuard};
use userfault_uffd::abi::{
    UFFDIO_CONTINUE_MODE_WP, UFFDIO_COPY_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP,
};
use userfault_uffd::{Fill, Filled, Outcome, fill};

use super::layout::Segment;
use super::process::{Member, Piece, Process};
use crate::backing::Backing;
use crate::block::{Answer, Fault, Purpose, State, answer};
use crate::body::Body;
use crate::dirty::DirtyMap;
use crate::engine::Engine;
use crate::fill::{Filling, Tried};
use crate::memory::{HUGE, small_page};
use crate::protect::{self, Protected};
use crate::staging;
use crate::stats::add;
use crate::workers::{Lead, Touch};

/// The first and the longest pause before a fill that the kernel refused, because an event was on its way, is
/// tried again.
const PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));

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

type Members<'a> = RwLockReadGuard<'a, std::collections::BTreeMap<u32, Member>>;

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
fn after_events(
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
            return Tried::Mapped;
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
            Tried::Mapped
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
fn poison_once(
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

/// What is to be done for a touch once the lock is let go.
enum Next {
    Nothing,
    Fill(Arc<Piece>, u32),
    Put(Put),
}

impl Engine {
    /// Answers a fault of a served process.
    pub(crate) fn answer_served(&'static self, touch: &Touch, lead: &mut Lead) {
        let Some(process) = self.peers.get(touch.process) else {
            return;
        };
        let mut pause = PAUSES.0;
        loop {
            let next = look_up(&process, &process.family.members.read(), touch);
            match next {
                Next::Nothing => return,
                Next::Fill(piece, block) => {
                    self.look_ahead(&piece.body, block, touch.thread);
                    let filling = Filling::new(piece.body.clone(), block, touch.thread, touch.read);
                    return self.fill(filling, lead);
                }
                Next::Put(Put::Done) => return,
                Next::Put(Put::Gone) => return process.retire(self),
                Next::Put(Put::Pending | Put::Unwoken) => {
                    after_events(self, &process, &mut pause, lead);
                }
                Next::Put(Put::Failed(errno)) => {
                    // Only a machine out of memory comes here. The touch sleeps, and is tried again.
                    if errno != libc::ENOMEM {
                        crate::say::line(&format!(
                            "userfault: {}: a touch of {:#x} cannot be answered: {}",
                            process.family.terms.name,
                            touch.address,
                            io::Error::from_raw_os_error(errno)
                        ));
                        return;
                    }
                    after_events(self, &process, &mut pause, lead);
                }
            }
        }
    }
}

/// What a touch means, and what can be done about it at once.
fn look_up(process: &Process, members: &Members<'_>, touch: &Touch) -> Next {
    let Some(member) = members.get(&process.id) else {
        return Next::Nothing;
    };
    let Some(segment) = member.layout.find(touch.address) else {
        // Memory that is registered and that nobody told of: it grew, or is left over from a move.
        return match touch.fault {
            Fault::WriteProtect => Next::Put(unprotect(process, touch.address, small_page())),
            _ => Next::Put(settled(process, touch, small_page())),
        };
    };
    let piece = &segment.piece;
    let body = &piece.body;
    let page = piece.page();
    let offset = segment.offset + (touch.address - segment.at);
    let block = (offset / body.block) as u32;
    let counters = &body.counters;
    counters.faulted(touch.fault);
    if touch.fault == Fault::WriteProtect {
        return Next::Put(first_write(
            process,
            segment,
            block,
            touch.address,
            offset / page,
        ));
    }
    // What the page cache holds has been delivered, by whomever.
    if touch.fault == Fault::Minor {
        piece.owed.lock().remove(offset / page..offset / page + 1);
    }
    if !piece.owed.lock().contains(offset / page) {
        return Next::Put(settled(process, touch, page));
    }
    let mut table = body.lock();
    if table.closed {
        return Next::Nothing;
    }
    match answer(table.state(block), Fault::Missing, || true) {
        Answer::Fill => {
            table.claim(block, Purpose::Fill);
            Next::Fill(piece.clone(), block)
        }
        Answer::Wait => {
            table.wait(block);
            add(&counters.waits, 1);
            Next::Nothing
        }
        Answer::Poison => {
            drop(table);
            match poison_once(process, member, body, &piece.owed, block) {
                Put::Done => {
                    wake_page(process, touch.address, page);
                    Next::Nothing
                }
                // Not to be poisoned on this kernel: it sleeps on.
                Put::Failed(_) => Next::Nothing,
                put => Next::Put(put),
            }
        }
        _ => {
            drop(table);
            wake_page(process, touch.address, page);
            Next::Nothing
        }
    }
}

fn wake_page(process: &Process, address: usize, page: usize) {
    let start = address / page * page;
    process.wake(start..start + page);
}

/// Answers a touch of a page that is not owed: it is zeros, or what the page cache holds.
fn settled(process: &Process, touch: &Touch, page: usize) -> Put {
    let put = if touch.fault == Fault::Minor {
        let mode = if process.family.terms.track {
            UFFDIO_CONTINUE_MODE_WP
        } else {
            0
        };
        let start = touch.address / page * page;
        // SAFETY: the page cache of the other process's memory holds what that process put there, or what
        // was delivered.
        Put::of(unsafe { process.uffd.continue_(start, page, mode) })
    } else {
        zeros(process, touch.address, page)
    };
    match put {
        Put::Unwoken => {
            // It is there, or the place is gone: asking again tells.
            wake_page(process, touch.address, page);
            Put::Done
        }
        Put::Done => {
            process.rested.store(true, Ordering::Relaxed);
            Put::Done
        }
        put => put,
    }
}

/// Puts a page of zeros in place.
fn zeros(process: &Process, address: usize, page: usize) -> Put {
    let track = process.family.terms.track;
    let start = address / page * page;
    if page == small_page() && !track {
        // SAFETY: a page that is not owed and missing is zeros.
        let put = Put::of(unsafe { process.uffd.zeropage(start, page, 0) });
        if put != Put::Failed(libc::EINVAL) {
            return put;
        }
        // Huge pages that nobody told of.
        return copy_zeros(process, address / HUGE * HUGE, HUGE, 0);
    }
    copy_zeros(
        process,
        start,
        page,
        if track { UFFDIO_COPY_MODE_WP } else { 0 },
    )
}

fn copy_zeros(process: &Process, start: usize, page: usize, mode: u64) -> Put {
    let engine = Engine::existing().expect("it serves");
    staging::with(engine, page, |buffer| {
        buffer.fill(0);
        // SAFETY: as for `zeros`; the buffer is this thread's own.
        Put::of(unsafe { process.uffd.copy(start, buffer.as_ptr().addr(), page, mode) })
    })
}

/// A write to a protected page: it counts as written from here on, and goes on (see `protect`).
fn first_write(
    process: &Process,
    segment: &Segment<Arc<Piece>>,
    block: u32,
    address: usize,
    page: usize,
) -> Put {
    let piece = &segment.piece;
    if !process.family.terms.track {
        return unprotect(process, address, piece.page());
    }
    let (here, whole) = (piece.pages(segment), piece.body.pages(block));
    let near = here.start.max(whole.start)..here.end.min(whole.end);
    let pages = Pages::of(process, segment);
    let lifted = protect::first_write(&pages, &mut piece.body.lock(), page, near);
    match pages.refused.get() {
        Put::Done | Put::Unwoken if !lifted => {
            wake_page(process, address, piece.page());
            Put::Done
        }
        Put::Pending | Put::Gone if !lifted => pages.refused.get(),
        _ => Put::Done,
    }
}

/// The pages of a piece, where they lie in a process: their protection can be switched.
pub(super) struct Pages<'a> {
    process: &'a Process,
    segment: &'a Segment<Arc<Piece>>,
    /// Why the last call was refused.
    pub(super) refused: Cell<Put>,
}

impl<'a> Pages<'a> {
    pub(super) fn of(process: &'a Process, segment: &'a Segment<Arc<Piece>>) -> Pages<'a> {
        Pages {
            process,
            segment,
            refused: Cell::new(Put::Done),
        }
    }

    fn switch(&self, pages: Range<usize>, mode: u64) -> bool {
        let piece = &self.segment.piece;
        let start = piece.address(self.segment, pages.start);
        let len = pages.len() * piece.page();
        let put = Put::of(self.process.uffd.writeprotect(start, len, mode));
        self.refused.set(put);
        put == Put::Done
    }
}

impl Protected for Pages<'_> {
    fn protect(&self, pages: Range<usize>) -> bool {
        self.switch(pages, UFFDIO_WRITEPROTECT_MODE_WP)
    }

    fn lift(&self, pages: Range<usize>) -> bool {
        self.switch(pages, 0)
    }
}

fn unprotect(process: &Process, address: usize, page: usize) -> Put {
    let start = address / page * page;
    match Put::of(process.uffd.writeprotect(start, page, 0)) {
        Put::Unwoken => {
            wake_page(process, address, page);
            Put::Done
        }
        put => put,
    }
}
