//! Bringing an absent block in, however often its store fails.
//!
//! A page must not be seen before it is whole. Small blocks are read into a buffer of the thread's own
//! and put in place by UFFDIO_COPY, which is atomic for each page; such a block is never claimed before
//! and never touched through the view while it is absent. Large blocks are claimed, read through the
//! view, and mapped by UFFDIO_CONTINUE when they are whole; a thread that touches a claimed page meanwhile
//! gets a minor fault and waits for the owner, because the region is registered for those too.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::admission::Door;
use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::error::Error;
use crate::flight::most_of_one;
use crate::halfway::Halfway;
use crate::poison;
use crate::shortage::NO_ROOM_FOR;
use crate::staging;
use crate::stats::add;
use crate::table::Table;
use crate::workers::{Lead, Task, Touch};

/// The least time that a call of a store is given, however late it begins.
const LAST_TRY: Duration = Duration::from_millis(100);

/// The first and the longest pause between two tries of a read.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// A fill under way. Its block is in state Filling, and whoever holds this owns it.
#[derive(Debug)]
pub(crate) struct Filling {
    pub(crate) body: Arc<Body>,
    pub(crate) block: u32,
    /// The thread that asked, 0 if none sleeps on it.
    pub(crate) thread: u32,
    /// The page that it asked for in order to write it.
    written: Option<usize>,
    pub(crate) began: Instant,
    /// Tries of the read so far.
    tries: u32,
    /// Since when it waits for memory.
    no_room_since: Option<Instant>,
    /// What the kernel said when it refused memory that the limit allows.
    refused: Option<io::Error>,
    /// Nobody has asked for it yet: it is left out when it does not come at once.
    ahead: bool,
    /// It has waited and was let in: its place is counted already.
    let_in: bool,
    /// When this try was let in.
    entered: Instant,
}

/// How a try ended.
pub(crate) enum Tried {
    /// Everything that could be done was done by then.
    Mapped(Instant),
    NoRoom,
    /// The limit allows the memory, but the kernel has none: a pool of huge pages is shared with others.
    Refused(io::Error),
    Failed(io::Error),
    /// The read took too long: the clock took the block away and gave it up.
    Abandoned,
}

impl Tried {
    pub(crate) fn mapped() -> Tried {
        Tried::Mapped(Instant::now())
    }

    /// When the try ended.
    pub(crate) fn ended(&self) -> Instant {
        match self {
            Tried::Mapped(at) => *at,
            _ => Instant::now(),
        }
    }
}

impl Filling {
    pub(crate) fn new(body: Arc<Body>, block: u32, thread: u32, began: Instant) -> Filling {
        Filling {
            body,
            block,
            thread,
            written: None,
            began,
            tries: 0,
            no_room_since: None,
            refused: None,
            ahead: false,
            let_in: false,
            entered: began,
        }
    }
}

impl Filling {
    /// A fill of what a walk may touch next.
    pub(crate) fn ahead(body: Arc<Body>, block: u32) -> Filling {
        Filling {
            ahead: true,
            ..Filling::new(body, block, 0, Instant::now())
        }
    }

    /// The fill that a touch asks for.
    pub(crate) fn asked_by(touch: &Touch, body: Arc<Body>, block: u32) -> Filling {
        Filling {
            written: written(touch, &body),
            ..Filling::new(body, block, touch.thread, touch.read)
        }
    }
}

/// The page that a touch is going to write.
pub(crate) fn written(touch: &Touch, body: &Body) -> Option<usize> {
    touch
        .write
        .then(|| (touch.address - body.memory.main()) / body.memory.page())
}

impl Engine {
    /// Brings an absent block in. The block is in state Filling and belongs to `filling`.
    pub(crate) fn fill(&'static self, mut filling: Filling, lead: &mut Lead) {
        let let_in = std::mem::take(&mut filling.let_in);
        let (door, may_fly, crowded) = {
            let body = &filling.body;
            let mut table = body.lock();
            if table.closed {
                if let_in {
                    table.fills.ended();
                }
                let rest = table.fills.dismiss();
                for filling in rest.iter().chain([&filling]) {
                    let _ = body.release(&mut table, filling.block, State::Absent);
                    if filling.no_room_since.is_some() {
                        self.pool_of(body).wait(false);
                    }
                }
                return;
            }
            let door = self.door(body, &table);
            if !let_in {
                table.fills.began();
            }
            let crowded = !let_in && table.fills.is_crowded(door);
            (door, table.fills.may_fly(door), crowded)
        };
        filling.entered = Instant::now();
        let filling = if may_fly {
            let Err(filling) = self.depart(filling, lead) else {
                return;
            };
            filling
        } else {
            filling
        };
        if crowded {
            if filling.ahead && door.is_narrow() {
                return self.end_try(filling, Tried::NoRoom, lead);
            }
            let body = filling.body.clone();
            let mut table = body.lock();
            // Whoever ends next calls the next one: there must be somebody.
            if table.fills.is_crowded(door) {
                table.fills.wait(filling);
                return;
            }
        }
        let tried = filling.body.backing.fill(self, &filling, lead);
        self.end_try(filling, tried, lead);
    }

    /// Lets the next fill of a region begin.
    pub(crate) fn fill_ended(&'static self, body: &Body, table: &mut Table) {
        table.fills.ended();
        if table.fills.queue() == 0 {
            return;
        }
        let door = self.door(body, table);
        while let Some(mut next) = table.fills.let_in(door) {
            next.let_in = true;
            self.workers.submit(self, Task::Fill(next));
        }
    }

    /// How many fills of a region are let in now.
    pub(crate) fn door(&self, body: &Body, table: &Table) -> Door {
        let wide = Door::wide(most_of_one(body.block));
        if !table.fills.is_quiet() && self.is_short(body, table.fills.queue()) {
            table.fills.narrow(wide)
        } else {
            wide
        }
    }

    /// What follows from a try.
    pub(crate) fn end_try(&'static self, filling: Filling, tried: Tried, lead: &mut Lead) {
        let (entered, ended) = (filling.entered, tried.ended());
        if let Some(body) = self.follow(filling, tried, lead) {
            let mut table = body.lock();
            table.fills.took(ended - entered);
            self.fill_ended(&body, &mut table);
        }
    }

    /// What follows from a try that just ended. The region, unless the clock took the block away from it meanwhile.
    pub(crate) fn follow(
        &'static self,
        mut filling: Filling,
        tried: Tried,
        lead: &mut Lead,
    ) -> Option<Arc<Body>> {
        let (body, block) = (&filling.body, filling.block);
        let tried = match tried {
            Tried::Refused(error) => {
                self.pool.refuse(self.now_ms());
                self.make_way(body, filling.thread, lead);
                filling.refused = Some(error);
                Tried::NoRoom
            }
            tried => tried,
        };
        if filling.ahead && matches!(tried, Tried::NoRoom | Tried::Failed(_)) {
            let mut table = body.lock();
            let waited = body.release(&mut table, block, State::Absent);
            drop(table);
            // Whoever touches it asks by a fault of its own, and is told then what is wrong.
            if waited {
                self.wake(body, block);
            }
            return Some(filling.body);
        }
        match tried {
            Tried::Mapped(at) => {
                if let Some(since) = filling.no_room_since {
                    add(&body.counters.wait_ns, since.elapsed().as_nanos() as u64);
                    self.pool_of(body).wait(false);
                }
                if filling.thread != 0 {
                    body.counters
                        .latency
                        .record((at - filling.began).as_nanos() as u64);
                }
            }
            Tried::NoRoom | Tried::Refused(_) => {
                let now = Instant::now();
                if filling.no_room_since.is_none() {
                    filling.no_room_since = Some(now);
                    add(&body.counters.waits, 1);
                    self.pool_of(body).wait(true);
                }
                let waited = filling
                    .no_room_since
                    .map_or(Duration::ZERO, |since| now - since);
                if waited > NO_ROOM_FOR + body.retry_for {
                    self.pool_of(body).wait(false);
                    let cause = self.why_no_room(body, filling.refused);
                    poison::give_up(self, body, block, &cause);
                    return Some(filling.body);
                }
                self.tell_of_shortage(body, waited);
                let body = filling.body.clone();
                self.clock.defer(filling, Duration::from_millis(1));
                return Some(body);
            }
            Tried::Failed(error) => {
                let pause = PAUSES.0 * 2u32.saturating_pow(filling.tries.min(16));
                let left = body.retry_for.saturating_sub(filling.began.elapsed());
                // A try that would begin after the deadline could only be told that it is late: towards the
                // end they come closer together instead.
                let pause = pause.min(PAUSES.1).min(left / 2);
                if body.retries() && pause >= PAUSES.0 {
                    filling.tries += 1;
                    let body = filling.body.clone();
                    self.clock.defer(filling, pause);
                    return Some(body);
                }
                if filling.no_room_since.is_some() {
                    self.pool_of(body).wait(false);
                }
                poison::give_up(self, body, block, &error);
            }
            Tried::Abandoned => {
                if filling.no_room_since.is_some() {
                    self.pool_of(body).wait(false);
                }
                return None;
            }
        }
        Some(filling.body)
    }

    /// Brings a block of this process's memory in.
    pub(crate) fn fill_here(&'static self, filling: &Filling, lead: &mut Lead) -> Tried {
        if let Err(tried) = self.room_for(filling, lead) {
            return tried;
        }
        let tried = if filling.body.by_copy() {
            self.fill_by_copy(filling, lead)
        } else {
            self.fill_by_view(filling, lead)
        };
        self.settle(filling, &tried);
        tried
    }

    /// Takes the memory of a block, or says how the try ends without it.
    pub(crate) fn room_for(&'static self, filling: &Filling, lead: &mut Lead) -> Result<(), Tried> {
        let (body, block) = (&filling.body, filling.block);
        let bytes = body.block_len(block) as u64;
        if self.reserve(body, bytes).is_ok() {
            return Ok(());
        }
        // Whoever makes room may have to write, and a write may hang: the fault still has its deadline.
        lead.on_behalf = Some((body.clone(), block, self.deadline(filling)));
        let room = self.make_room(body, bytes, filling.thread, lead);
        lead.on_behalf = None;
        if std::mem::take(&mut lead.too_late) {
            if room {
                self.give_back(body, bytes);
            }
            self.came_back(body, block);
            return Err(Tried::Abandoned);
        }
        if room { Ok(()) } else { Err(Tried::NoRoom) }
    }

    /// Ends the ownership of a block that was mapped, and gives it its place; or gives back its memory.
    pub(crate) fn settle(&'static self, filling: &Filling, tried: &Tried) {
        let (body, block) = (&filling.body, filling.block);
        match tried {
            Tried::Mapped(at) => {
                let mut table = body.lock();
                let waited = self.mapped(body, &mut table, block, filling.written);
                let (memo, queues) = self.pool_of(body).brought_in(
                    table.memo(block),
                    body.seat(block),
                    body.block_len(block),
                    self.ms_at(*at),
                    filling.thread,
                );
                table.set_memo(block, memo);
                let spans = table.settle_spans();
                drop(table);
                if waited {
                    self.wake(body, block);
                }
                self.charge_tables(body, spans);
                self.presume(body, block, queues.limit);
                self.sweep_stale(body, queues);
            }
            Tried::NoRoom | Tried::Refused(_) | Tried::Failed(_) | Tried::Abandoned => {
                self.give_back(body, body.block_len(block) as u64);
            }
        }
    }

    fn fill_by_copy(&'static self, filling: &Filling, lead: &mut Lead) -> Tried {
        let (body, block) = (&filling.body, filling.block);
        staging::with(self, body.block_len(block), |buffer| {
            match self.read(filling, buffer, lead) {
                Ok(true) => self.put_in_place(filling, buffer, lead),
                Ok(false) => {
                    self.came_back(body, block);
                    Tried::Abandoned
                }
                Err(error) => Tried::Failed(error),
            }
        })
    }

    /// Copies a block that was read into place.
    pub(crate) fn put_in_place(
        &'static self,
        filling: &Filling,
        bytes: &[u8],
        lead: &mut Lead,
    ) -> Tried {
        let (body, block) = (&filling.body, filling.block);
        let mut placed = 0;
        match self
            .uncovered(body, block)
            .and_then(|()| self.map_copy(body, block, bytes, &mut placed))
        {
            Ok(()) => Tried::mapped(),
            Err(error) => self.broke_off(filling, bytes, placed, error, lead),
        }
    }

    /// Ends a fill of which the kernel has put the first `placed` bytes into place, and no more.
    pub(crate) fn broke_off(
        &self,
        filling: &Filling,
        bytes: &[u8],
        placed: usize,
        error: io::Error,
        lead: &mut Lead,
    ) -> Tried {
        let rest = Some(&bytes[placed..]);
        match self.end_halfway(&filling.body, filling.block, placed, rest, lead) {
            Halfway::Whole => Tried::mapped(),
            Halfway::Dropped => refused(error),
        }
    }

    fn fill_by_view(&'static self, filling: &Filling, lead: &mut Lead) -> Tried {
        let (body, block) = (&filling.body, filling.block);
        let (start, len) = (body.start(block), body.block_len(block));
        if self.fill_from_store(body, block) {
            return Tried::mapped();
        }
        if let Err(error) = body.memory.claim(start, len) {
            let _ = body.memory.punch(start, len);
            return refused(error);
        }
        let read = if self.read_from_store(body, start, len) {
            Ok(true)
        } else {
            let buffer = body.memory.owned_block(filling, start, len);
            self.read(filling, buffer, lead)
        };
        match read {
            Ok(true) => match self
                .uncovered(body, block)
                .and_then(|()| self.map_claimed(body, block))
            {
                Ok(()) => Tried::mapped(),
                // All of it is in memory, and the kernel may have mapped a part.
                Err(error) => match self.end_halfway(body, block, len, Some(&[]), lead) {
                    Halfway::Whole => Tried::mapped(),
                    Halfway::Dropped => refused(error),
                },
            },
            Ok(false) => {
                let _ = body.memory.punch(start, len);
                self.came_back(body, block);
                Tried::Abandoned
            }
            Err(error) => {
                let _ = body.memory.punch(start, len);
                Tried::Failed(error)
            }
        }
    }

    /// Takes away what lies over a block that is tried again. UFFDIO_COPY and CONTINUE replace poison by
    /// themselves.
    pub(crate) fn uncovered(&self, body: &Body, block: u32) -> io::Result<()> {
        if self.abilities.poison {
            return Ok(());
        }
        self.unbar(body, &mut body.lock(), block)
    }

    /// When a call of the store that begins now counts as lost.
    pub(crate) fn deadline(&self, filling: &Filling) -> Instant {
        (filling.began + filling.body.retry_for).max(Instant::now() + LAST_TRY)
    }

    /// Reads a block. `Ok(false)`: it took too long, and the block is no longer ours.
    pub(crate) fn read(
        &'static self,
        filling: &Filling,
        buffer: &mut [u8],
        lead: &mut Lead,
    ) -> io::Result<bool> {
        let (body, block) = (&filling.body, filling.block);
        let start = body.start(block);
        if body.read_store(start, buffer, true)? {
            self.note_content(body, block, buffer);
            return Ok(true);
        }
        lead.give_up();
        let watch = self.clock.watch(self, body, block, self.deadline(filling));
        let read = body.read_store(start, buffer, false);
        if !watch.end(body) {
            return Ok(false);
        }
        read?;
        self.note_content(body, block, buffer);
        Ok(true)
    }

    /// A read that was given up has come back: its memory may be used again.
    pub(crate) fn came_back(&self, body: &Body, block: u32) {
        let mut table = body.lock();
        table.hung.remove(&block);
        if table.state(block) == State::Poisoned && !body.by_copy() && !table.sealed {
            // Releasing the memory lifted the poison of hugetlb pages.
            let _ = self.poison(body, &mut table, block);
        }
        drop(table);
        self.note_hung(false);
        self.wake(body, block);
    }

    /// Waits until a block is in memory, bringing it in if need be, and claims it for `purpose`.
    pub(crate) fn claim_in_memory(
        &'static self,
        body: &Arc<Body>,
        block: u32,
        purpose: Purpose,
    ) -> Result<State, Error> {
        let mut since = None;
        let mut table = body.lock();
        loop {
            if table.closed {
                return Err(Error::Closed);
            }
            let state = table.state(block);
            match state {
                State::Absent => {
                    table.claim(block, Purpose::Fill);
                    drop(table);
                    self.submit_fill(body, block);
                    table = body.lock();
                }
                State::Poisoned => return Err(poison::error(&table, body, block)),
                _ if table.claim(block, purpose) => return Ok(state),
                _ => body.await_owner(&mut table, block, &mut since)?,
            }
        }
    }
}

/// The kernel refused memory that the limit allowed: wait for some. Anything else is for good.
fn refused(error: io::Error) -> Tried {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::ENOMEM | libc::EAGAIN) => Tried::Refused(error),
        _ => Tried::Failed(error),
    }
}
