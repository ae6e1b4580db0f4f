//! What the touching thread does itself.
//!
//! Everything in this file runs in the handler of SIGBUS, under the rules of [`inline`](super). The steps are
//! those of an ordinary fill, and so are their order and their owner: take room, claim the block, read it,
//! put it in place, let go. A step that does not work at once is undone, and all of it is handed over.
//!
//! Unsafe: fills of user memory. What keeps them sound is what keeps the ordinary ones sound: the block is in
//! state Filling and belongs to this thread.

use std::time::{Duration, Instant};

use super::handover::Request;
use super::{Inline, signal};
use crate::ahead::longest_window;
use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::memory;
use crate::pool::Taken;
use crate::stats::add;
use crate::table::Table;
use crate::trace::Kind;

/// A sleeper waits so long for another toucher before it has the wait watched.
const GLANCE: Duration = Duration::from_millis(20);

/// The longest sleep at a door before the access is made again.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// How long a touch waits for room that is being made before it is handed over.
const ROOM_SOON: Duration = Duration::from_millis(4);

/// What came of a touch.
enum Touched {
    /// The block is there.
    Done,
    /// It is poisoned: the signal is meant.
    Poisoned,
    /// Poison lies over it, for its owner does not come back.
    GivenUp,
    /// Somebody owns the block, or has been asked to bring it.
    Owned,
    /// There is no room, but there will be some soon.
    NoRoom,
    /// Others have to answer it. True if its walk has been noted.
    Handed(bool),
    /// As after `Handed(true)`; it was this thread's, and others see to it that it is not any more.
    LetGo,
}

/// What came of bringing a block in.
enum Brought {
    /// All of it is mapped.
    Whole,
    /// Nothing of it is mapped or in memory.
    Nothing,
    /// So many bytes of it are in memory, and somebody may have written them.
    Halfway(usize),
}

/// Whether a block may have its memory.
enum Room {
    /// It has it, in a pool of so many bytes.
    Taken { limit: u64 },
    /// Not yet: room is being made.
    Soon,
    /// Others have to see to it.
    Not,
}

impl Room {
    fn refused(taken: &Taken) -> Room {
        if taken.soon { Room::Soon } else { Room::Not }
    }
}

/// The signal mask of the interrupted program, and that of the handler.
pub(super) trait Signals {
    /// Lets signals in: nothing is held, and what follows may last.
    fn open(&self);
    /// Blocks them again, before the next lock.
    fn close(&self);
}

impl Engine {
    /// Answers a touch in the thread that made it. True if the access should be made again; false if the
    /// signal is the program's.
    pub(super) fn touched(
        &'static self,
        inline: &'static Inline,
        body: &Body,
        address: usize,
        signals: &impl Signals,
    ) -> bool {
        let began = Instant::now();
        let Some(doors) = &body.doors else {
            return false;
        };
        let block = ((address - body.memory.main()) / body.block) as u32;
        let thread = signal::this_thread();
        let (mut asked, mut was_mine, mut patience) = (false, false, GLANCE);
        while began.elapsed() < LONGEST_SLEEP {
            // Before the block is looked at: what changes from here on ends a sleep at once.
            let seen = doors.seen(block);
            let rounds = inline.headroom.rounds();
            let noted = match self.answer_in_handler(inline, body, block, address, thread) {
                Touched::Done => {
                    body.counters
                        .latency
                        .record(began.elapsed().as_nanos() as u64);
                    return true;
                }
                Touched::GivenUp if was_mine => {
                    // This thread has come back, and that is being said.
                    signals.open();
                    doors.sleep(block, seen, GLANCE);
                    signals.close();
                    continue;
                }
                Touched::Poisoned | Touched::GivenUp => return false,
                Touched::Owned => {
                    signals.open();
                    let late = doors.sleep(block, seen, patience);
                    signals.close();
                    if !late || asked {
                        continue;
                    }
                    // Whoever has it takes long: somebody should look at the time.
                    false
                }
                Touched::NoRoom if began.elapsed() < ROOM_SOON => {
                    signals.open();
                    inline.headroom.sleep(rounds, ROOM_SOON);
                    signals.close();
                    continue;
                }
                Touched::NoRoom => true,
                // The block has come meanwhile.
                Touched::Handed(_) if asked => return true,
                Touched::Handed(noted) => noted,
                Touched::LetGo => {
                    was_mine = true;
                    true
                }
            };
            (asked, patience) = (true, LONGEST_SLEEP);
            self.ask(body, block);
            inline.handover.send(Request::touch(address, thread, noted));
            signals.open();
            doors.sleep(block, seen, LONGEST_SLEEP);
            signals.close();
        }
        true
    }

    /// Notes that a block has been asked for, so that nobody asks again before it is answered.
    fn ask(&self, body: &Body, block: u32) {
        body.lock_in_handler().ask(block);
    }

    fn answer_in_handler(
        &'static self,
        inline: &'static Inline,
        body: &Body,
        block: u32,
        address: usize,
        thread: u32,
    ) -> Touched {
        let mut table = body.lock_in_handler();
        if table.closed || table.is_asked(block) {
            return Touched::Owned;
        }
        match table.state(block) {
            State::Absent if !self.watched() && table.claim_in_handler(block, Purpose::Fill) => {
                drop(table);
                self.fill_in_handler(inline, body, block, address, thread)
            }
            State::Resting if !self.watched() && table.claim_in_handler(block, Purpose::Map) => {
                drop(table);
                self.map_in_handler(body, block, thread)
            }
            State::Poisoned => Touched::Poisoned,
            state if state.exclusive() => {
                if table.is_given_up(block) {
                    Touched::GivenUp
                } else {
                    Touched::Owned
                }
            }
            _ => Touched::Handed(false),
        }
    }

    /// True if every fill is looked at in ways that a handler may not.
    fn watched(&self) -> bool {
        self.hashing
    }

    /// A resting block is touched again.
    fn map_in_handler(&'static self, body: &Body, block: u32, thread: u32) -> Touched {
        if !self.seat_promised(body, thread) {
            self.let_go_in_handler(body, block, State::Resting);
            return Touched::Handed(false);
        }
        if !self.continue_bare(body, body.start(block), body.block_len(block)) {
            self.pool_of(body).give_back_in_handler(0, true);
            self.let_go_in_handler(body, block, State::Resting);
            return Touched::Handed(false);
        }
        self.trace(Kind::Rested, body, block, thread);
        add(&body.counters.faults_minor, 1);
        add(&body.counters.hits, 1);
        self.mapped_in_handler(&mut body.lock_in_handler(), body, block, thread, true);
        Touched::Done
    }

    /// Ends ownership of a block that has been mapped, and gives it its place.
    pub(super) fn mapped_in_handler(
        &self,
        table: &mut Table,
        body: &Body,
        block: u32,
        thread: u32,
        rested: bool,
    ) {
        // Under the table's lock: nobody finds the entry of a block that is not released yet.
        let memo = self.pool_of(body).seat_in_handler(
            table.memo(block),
            rested,
            body.seat(block),
            body.block_len(block),
            self.now_ms(),
            thread,
        );
        table.set_memo(block, memo);
        // Sleepers, too: they touch again and find it there.
        let _ = body.release(table, block, State::Resident);
    }

    fn fill_in_handler(
        &'static self,
        inline: &'static Inline,
        body: &Body,
        block: u32,
        address: usize,
        thread: u32,
    ) -> Touched {
        let bytes = body.block_len(block) as u64;
        let limit = match self.take_room_in_handler(inline, body, bytes, thread) {
            Room::Taken { limit } => limit,
            refused => {
                self.let_go_in_handler(body, block, State::Absent);
                return match refused {
                    Room::Soon => Touched::NoRoom,
                    _ => Touched::Handed(false),
                };
            }
        };
        if let Some(window) = body.walked_in_handler(thread, block, || longest_window(body, limit))
        {
            let before = window.first - window.step;
            if (0..i64::from(body.all_blocks())).contains(&before) {
                let before = body.memory.main() + before as usize * body.block;
                inline
                    .handover
                    .send(Request::ahead(before, thread, window.step, window.count));
            }
        }
        let left = |placed| {
            inline
                .handover
                .send(Request::halfway(address, thread, placed));
            Touched::LetGo
        };
        match self.bring_in(inline, body, block) {
            Brought::Whole => {}
            Brought::Nothing => return self.undone_in_handler(inline, body, block, address),
            Brought::Halfway(placed) => return left(placed),
        }
        let spans = {
            let mut table = body.lock_in_handler();
            if table.is_given_up(block) {
                drop(table);
                if body.writable() {
                    // It may have been written since it was mapped.
                    return left(body.block_len(block));
                }
                self.release_memory(body, block);
                return self.undone_in_handler(inline, body, block, address);
            }
            self.mapped_in_handler(&mut table, body, block, thread, false);
            table.settle_spans()
        };
        self.presume(body, block, limit);
        // Only now: what is handed over is noted by whoever answers it.
        self.trace(Kind::Missing, body, block, thread);
        add(&body.counters.faults_missing, 1);
        self.settle_in_handler(body, spans);
        Touched::Done
    }

    /// Ends a fill that came to nothing. While it went on, its sleepers may have been given up: what was noted
    /// of that is memory of the allocator's, and others take it away.
    fn undone_in_handler(
        &self,
        inline: &Inline,
        body: &Body,
        block: u32,
        address: usize,
    ) -> Touched {
        self.give_back_in_handler(body, body.block_len(block) as u64);
        let mut table = body.lock_in_handler();
        if table.is_given_up(block) {
            drop(table);
            inline.handover.send(Request::let_go(address));
            return Touched::LetGo;
        }
        let _ = body.release(&mut table, block, State::Absent);
        Touched::Handed(true)
    }

    fn release_memory(&self, body: &Body, block: u32) {
        let (start, len) = (body.start(block), body.block_len(block));
        let _ = body.memory.zap(start, len);
        let _ = body.memory.punch(start, len);
    }

    /// Reads a block and maps it.
    fn bring_in(&self, inline: &Inline, body: &Body, block: u32) -> Brought {
        let (start, len) = (body.start(block), body.block_len(block));
        let mut placed = 0;
        if body.by_copy() {
            let grown = |bytes| {
                self.staging.grown(bytes);
                self.pool.charge_in_handler(bytes as i64);
            };
            let Some(mut buffer) = inline.bounce.take(len, grown) else {
                return Brought::Nothing;
            };
            if !body.read_bare(start, buffer.bytes()) {
                return Brought::Nothing;
            }
            match self.copy_bare(body, block, buffer.bytes()) {
                Ok(()) => return Brought::Whole,
                Err(before) => placed = before,
            }
        } else if body.memory.claim(start, len).is_ok() {
            // SAFETY: the block is in state Filling and this thread's, its pages are claimed, and none of
            // them is mapped for the user.
            let bytes = unsafe { body.memory.owned(start, len) };
            if body.read_bare(start, bytes) {
                if self.map_claimed_bare(body, block) {
                    return Brought::Whole;
                }
                placed = len;
            }
        }
        if placed > 0 && body.writable() {
            return Brought::Halfway(placed);
        }
        self.release_memory(body, block);
        Brought::Nothing
    }

    fn let_go_in_handler(&self, body: &Body, block: u32, state: State) {
        let mut table = body.lock_in_handler();
        let _ = body.release(&mut table, block, state);
    }

    /// Room for a block, and a place in its pool's queue, if there is some without evicting.
    fn take_room_in_handler(
        &self,
        inline: &'static Inline,
        body: &Body,
        bytes: u64,
        thread: u32,
    ) -> Room {
        let own = body.own_pool.as_deref();
        let mut limit = None;
        if let Some(own) = own {
            let taken = own.reserve_in_handler(bytes, Some(thread));
            if taken.low {
                inline.headroom.ask();
            }
            if !taken.ok {
                return Room::refused(&taken);
            }
            limit = Some(taken.limit);
        }
        let taken = self
            .pool
            .reserve_in_handler(bytes, own.is_none().then_some(thread));
        if taken.low {
            inline.headroom.ask();
        }
        if taken.ok {
            if body.memory.kind() == memory::Kind::Hugetlb || self.gate.pass_in_handler(bytes) {
                return Room::Taken {
                    limit: limit.unwrap_or(taken.limit),
                };
            }
            self.pool.give_back_in_handler(bytes, own.is_none());
        }
        if let Some(own) = own {
            own.give_back_in_handler(bytes, true);
        }
        if taken.ok {
            Room::Not
        } else {
            Room::refused(&taken)
        }
    }

    pub(super) fn give_back_in_handler(&self, body: &Body, bytes: u64) {
        if let Some(own) = body.own_pool.as_deref() {
            own.give_back_in_handler(bytes, true);
        }
        self.pool
            .give_back_in_handler(bytes, body.own_pool.is_none());
        if body.memory.kind() != memory::Kind::Hugetlb {
            self.gate.give_back(bytes);
        }
    }

    /// A place in the queue of a pool that has the block's bytes already.
    fn seat_promised(&self, body: &Body, thread: u32) -> bool {
        self.pool_of(body).reserve_in_handler(0, Some(thread)).ok
    }

    pub(super) fn settle_in_handler(&self, body: &Body, spans: i64) {
        let bytes = spans.unsigned_abs() * body.span_tables();
        if bytes == 0 {
            return;
        }
        for pool in [body.own_pool.as_deref(), Some(&*self.pool)]
            .into_iter()
            .flatten()
        {
            pool.charge_in_handler(if spans > 0 {
                bytes as i64
            } else {
                -(bytes as i64)
            });
        }
    }
}
