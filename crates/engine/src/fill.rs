//! Answering a fault: what a missing or a minor fault means for a block, and how it is brought in.
//!
//! A page must not be seen before it is whole. Small blocks are read into a buffer of the thread's own
//! and put in place by UFFDIO_COPY, which is atomic for each page; such a block is never claimed before
//! and never touched through the view while it is absent. Large blocks are claimed, read through the
//! view, and mapped by UFFDIO_CONTINUE when they are whole; a thread that touches a claimed page meanwhile
//! gets a minor fault and waits for the owner, because the region is registered for those too.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::{Answer, Fault, Purpose, State, answer};
use crate::body::Body;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::error::Error;
use crate::flight::most_of_one;
use crate::halfway::Halfway;
use crate::kernel::Evidence;
use crate::poison;
use crate::policy::Queue;
use crate::protect::first_write;
use crate::readahead::{LONGEST_WINDOW, WINDOW_SHARE, Window};
use crate::shortage::NO_ROOM_FOR;
use crate::staging;
use crate::stats::add;
use crate::table::Table;
use crate::trace::Kind;
use crate::workers::{Lead, Task, Touch};

/// Runs of blocks smaller than this are announced to the store before they are read, bytes: it fetches them at
/// one go. Larger ones are worth a read of their own.
const FETCHED_BELOW: usize = 128 << 10;

/// Bytes that are pushed in one go.
const PUSHED: u64 = 4 << 20;

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
}

/// How a try ended.
pub(crate) enum Tried {
    /// Everything that could be done is done, and the block is released.
    Mapped,
    NoRoom,
    /// The limit allows the memory, but the kernel has none: a pool of huge pages is shared with others.
    Refused(io::Error),
    Failed(io::Error),
    /// The read took too long: the clock took the block away and gave it up.
    Abandoned,
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
        }
    }
}

impl Filling {
    /// The fill that a touch asks for.
    fn asked_by(touch: &Touch, body: Arc<Body>, block: u32) -> Filling {
        Filling {
            written: written(touch, &body),
            ..Filling::new(body, block, touch.thread, touch.read)
        }
    }
}

/// The page that a touch is going to write.
fn written(touch: &Touch, body: &Body) -> Option<usize> {
    touch
        .write
        .then(|| (touch.address - body.memory.main()) / body.memory.page())
}

impl Engine {
    /// Does a task.
    pub(crate) fn perform(&'static self, task: Task, lead: &mut Lead) {
        match task {
            Task::Touch(touch) => self.answer(&touch, lead),
            Task::Fill(filling) => self.fill(filling, lead),
            Task::Ahead(body, window) => self.bring_in_ahead(&body, window, lead),
            Task::Push(body, from) => self.push(body, from, lead),
            Task::Land(place, result) => self.land(place, result, lead),
            Task::Halfway(left) => self.end_for_handler(&left, lead),
        }
    }

    /// Answers one fault.
    pub(crate) fn answer(&'static self, touch: &Touch, lead: &mut Lead) {
        if touch.process != 0 {
            return self.answer_served(touch, lead);
        }
        let Some(body) = self.at(touch.address) else {
            if let Some(memory) = self.tracked.own(touch.address, 1)
                && let Some(guard) = memory.guard()
            {
                return guard.first_write(touch.address, lead);
            }
            // The region has been closed since: whoever sleeps there finds PROT_NONE.
            let page = touch.address & !(crate::memory::small_page() - 1);
            let _ = self.uffd.wake(page, crate::memory::small_page());
            return;
        };
        let offset = touch.address - body.memory.main();
        let mut block = (offset / body.block) as u32;
        if put_back(Defect::BlocksOfAddressZero) {
            block = (touch.address / body.block - body.memory.main() / body.block) as u32;
        }
        let counters = &body.counters;
        add(
            match touch.fault {
                Fault::Missing => &counters.faults_missing,
                Fault::Minor => &counters.faults_minor,
                Fault::WriteProtect => &counters.faults_write_protect,
            },
            1,
        );
        let mut table = body.lock();
        if table.closed {
            // Close wakes every sleeper at its end.
            return;
        }
        // The page table is asked under the lock: a block that changes hands meanwhile would make the
        // answer worthless. This happens only for stale messages and foreign unmapping.
        let answer = answer(table.state(block), touch.fault, || {
            self.present(touch.address)
        });
        match answer {
            Answer::Wait => {
                if table.wait(block) {
                    self.clock.watch_sleepers(&body, block);
                }
                add(&counters.waits, 1);
                let on_its_way = table.state(block) == State::Filling;
                drop(table);
                if on_its_way && !touch.noted && touch.fault != Fault::WriteProtect {
                    self.look_ahead(&body, block, touch.thread);
                }
            }
            Answer::Wake => {
                drop(table);
                self.wake(&body, block);
            }
            Answer::Fill => {
                table.claim(block, Purpose::Fill);
                drop(table);
                self.trace(Kind::Missing, &body, block, touch.thread);
                if !touch.noted {
                    self.look_ahead(&body, block, touch.thread);
                }
                self.fill(Filling::asked_by(touch, body, block), lead);
            }
            Answer::Map => {
                table.claim(block, Purpose::Map);
                drop(table);
                self.trace(Kind::Rested, &body, block, touch.thread);
                self.map_resting(&body, block, touch);
            }
            Answer::MapDirty => {
                table.claim(block, Purpose::Refill);
                if self.evidence(&body) == Evidence::Kernel {
                    table.mark_dirty(body.pages(block));
                }
                drop(table);
                self.map_in_memory(&body, block);
            }
            Answer::Refill => {
                table.claim(block, Purpose::Refill);
                if body.memory.shared() {
                    // The program gave the page back (MADV_REMOVE): it is zeros from here on. Or the message
                    // is older than the fill, and the program unmapped the page since: so the whole block
                    // is dirty, as its other pages may be mapped anew now, too.
                    if body.writable() {
                        table.mark_dirty(body.pages(block));
                    }
                    drop(table);
                    self.map_in_memory(&body, block);
                } else {
                    drop(table);
                    // The program threw a page away: the block is read again, as if it had been evicted.
                    let len = body.block_len(block);
                    let _ = body.memory.zap(body.start(block), len);
                    self.give_back(&body, len as u64);
                    self.fill(Filling::asked_by(touch, body, block), lead);
                }
            }
            Answer::Poison => {
                let _ = self.poison(&body, &mut table, block);
                drop(table);
                self.wake(&body, block);
            }
            Answer::Unprotect => {
                let page = offset / body.memory.page();
                let memory = self.protection(&body);
                if !first_write(&memory, &mut table, page, body.pages(block)) {
                    self.wake(&body, block);
                }
                drop(table);
                self.trace(Kind::Write, &body, block, touch.thread);
                body.counters
                    .latency
                    .record(touch.read.elapsed().as_nanos() as u64);
            }
        }
    }

    /// A resting block is touched again: map it, and remember that it is hot.
    fn map_resting(&self, body: &Arc<Body>, block: u32, touch: &Touch) {
        self.map_pages(body, block);
        let mut table = body.lock();
        let memo = self.pool_of(body).came_back(table.memo(block));
        table.set_memo(block, memo);
        let waited = self.mapped(body, &mut table, block, written(touch, body));
        drop(table);
        add(&body.counters.hits, 1);
        self.seat(body, block, Queue::Mapped(memo.rank()));
        self.pool_of(body)
            .given(touch.thread, body.seat(block), self.now_ms());
        if waited {
            self.wake(body, block);
        }
        body.counters
            .latency
            .record(touch.read.elapsed().as_nanos() as u64);
    }

    /// Ends the ownership of a block that was just mapped; true if its sleepers are still to be woken. Where the
    /// table holds the evidence nobody has been woken yet: whoever came to write is let through at once, since a
    /// block that left between two messages of one write would come back for ever.
    fn mapped(&self, body: &Body, table: &mut Table, block: u32, written: Option<usize>) -> bool {
        // The mapping woke those who slept on the block then. Since then the program may have unmapped the
        // page, and its next toucher may have been told to wait for us.
        let waited = body.release(table, block, State::Resident);
        if self.evidence(body) != Evidence::Table {
            return waited;
        }
        if let Some(page) = written {
            first_write(&self.protection(body), table, page, body.pages(block));
        }
        true
    }

    /// Maps a resting block that was claimed for Map, on behalf of nobody who sleeps on it.
    pub(crate) fn bring_back(&self, body: &Arc<Body>, block: u32) {
        let memo = {
            let mut table = body.lock();
            let memo = self.pool_of(body).came_back(table.memo(block));
            table.set_memo(block, memo);
            memo
        };
        self.map_in_memory(body, block);
        add(&body.counters.hits, 1);
        self.seat(body, block, Queue::Mapped(memo.rank()));
    }

    /// Maps what is missing of a resident block, whose pages are in memory.
    fn map_in_memory(&self, body: &Arc<Body>, block: u32) {
        self.map_pages(body, block);
        let mut table = body.lock();
        let _ = body.release(&mut table, block, State::Resident);
        drop(table);
        self.wake(body, block);
    }

    /// Maps the pages of an owned block that is in memory. Pages that the program gave back are zeros.
    fn map_pages(&self, body: &Body, block: u32) {
        if self.map_again(body, block).is_ok() {
            return;
        }
        let (start, len) = (body.start(block), body.block_len(block));
        let again = body
            .memory
            .claim(start, len)
            .and_then(|()| self.map_again(body, block));
        if let Err(error) = again {
            // Only a machine out of memory comes here; the touch asks again.
            crate::say::line(&format!(
                "userfault: {}: mapping offset {start} again failed: {error}",
                body.name
            ));
        }
    }

    /// Brings an absent block in. The block is in state Filling and belongs to `filling`.
    pub(crate) fn fill(&'static self, filling: Filling, lead: &mut Lead) {
        let body = filling.body.clone();
        let most = most_of_one(body.block);
        let (may_fly, crowded) = {
            let mut table = body.lock();
            if table.closed {
                let rest = std::mem::take(&mut table.fills_waiting);
                for filling in rest.iter().chain([&filling]) {
                    let _ = body.release(&mut table, filling.block, State::Absent);
                    if filling.no_room_since.is_some() {
                        self.pool_of(&body).wait(false);
                    }
                }
                return;
            }
            table.filling += 1;
            (table.filling <= most, table.is_crowded(most))
        };
        let filling = if may_fly {
            let Err(filling) = self.depart(filling, lead) else {
                return;
            };
            filling
        } else {
            filling
        };
        if crowded {
            let mut table = body.lock();
            // Whoever ends next calls the next one: there must be somebody.
            if table.is_crowded(most) {
                table.filling -= 1;
                table.fills_waiting.push_back(filling);
                return;
            }
        }
        let tried = body.backing.fill(self, &filling, lead);
        self.end_try(filling, tried, lead);
    }

    /// Lets the next fill of a region begin.
    pub(crate) fn fill_ended(&'static self, body: &Body, table: &mut Table) {
        debug_assert!(body.id > 0 && table.filling > 0);
        table.filling -= 1;
        if let Some(next) = table.fills_waiting.pop_front() {
            self.workers.submit(self, Task::Fill(next));
        }
    }

    /// What follows from a try.
    pub(crate) fn end_try(&'static self, filling: Filling, tried: Tried, lead: &mut Lead) {
        let body = filling.body.clone();
        if self.follow(filling, tried, lead) {
            self.fill_ended(&body, &mut body.lock());
        }
    }

    /// What follows from a try. False if the clock took the block away from it meanwhile.
    fn follow(&'static self, mut filling: Filling, tried: Tried, lead: &mut Lead) -> bool {
        let body = filling.body.clone();
        let block = filling.block;
        let now = Instant::now();
        let tried = match tried {
            Tried::Refused(error) => {
                self.make_way(&body, filling.thread, lead);
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
                self.wake(&body, block);
            }
            return true;
        }
        match tried {
            Tried::Mapped => {
                if let Some(since) = filling.no_room_since {
                    add(&body.counters.wait_ns, since.elapsed().as_nanos() as u64);
                    self.pool_of(&body).wait(false);
                }
                if filling.thread != 0 {
                    body.counters
                        .latency
                        .record(filling.began.elapsed().as_nanos() as u64);
                }
            }
            Tried::NoRoom | Tried::Refused(_) => {
                if filling.no_room_since.is_none() {
                    filling.no_room_since = Some(now);
                    add(&body.counters.waits, 1);
                    self.pool_of(&body).wait(true);
                }
                let waited = filling
                    .no_room_since
                    .map_or(Duration::ZERO, |since| now - since);
                if waited > NO_ROOM_FOR + body.retry_for {
                    self.pool_of(&body).wait(false);
                    let cause = self.why_no_room(&body, filling.refused);
                    poison::give_up(self, &body, block, &cause);
                    return true;
                }
                self.tell_of_shortage(&body, waited);
                self.clock.defer(filling, Duration::from_millis(1));
            }
            Tried::Failed(error) => {
                let pause = PAUSES.0 * 2u32.saturating_pow(filling.tries.min(16));
                let left = body.retry_for.saturating_sub(filling.began.elapsed());
                // A try that would begin after the deadline could only be told that it is late: towards the
                // end they come closer together instead.
                let pause = pause.min(PAUSES.1).min(left / 2);
                if body.retries() && pause >= PAUSES.0 {
                    filling.tries += 1;
                    self.clock.defer(filling, pause);
                } else {
                    if filling.no_room_since.is_some() {
                        self.pool_of(&body).wait(false);
                    }
                    poison::give_up(self, &body, block, &error);
                }
            }
            Tried::Abandoned => {
                if filling.no_room_since.is_some() {
                    self.pool_of(&body).wait(false);
                }
                return false;
            }
        }
        true
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
            Tried::Mapped => {
                let mut table = body.lock();
                let memo = self.pool_of(body).brought_in(table.memo(block));
                table.set_memo(block, memo);
                let waited = self.mapped(body, &mut table, block, filling.written);
                drop(table);
                if waited {
                    self.wake(body, block);
                }
                self.settle_tables(body);
                self.seat(body, block, Queue::Mapped(memo.rank()));
                self.pool_of(body)
                    .given(filling.thread, body.seat(block), self.now_ms());
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
            Ok(()) => Tried::Mapped,
            Err(error) => {
                let rest = Some(&bytes[placed..]);
                match self.end_halfway(body, block, placed, rest, lead) {
                    Halfway::Whole => Tried::Mapped,
                    Halfway::Dropped => refused(error),
                }
            }
        }
    }

    fn fill_by_view(&'static self, filling: &Filling, lead: &mut Lead) -> Tried {
        let (body, block) = (&filling.body, filling.block);
        let (start, len) = (body.start(block), body.block_len(block));
        if let Err(error) = body.memory.claim(start, len) {
            let _ = body.memory.punch(start, len);
            return refused(error);
        }
        let buffer = body.memory.owned_block(filling, start, len);
        match self.read(filling, buffer, lead) {
            Ok(true) => match self
                .uncovered(body, block)
                .and_then(|()| self.map_claimed(body, block))
            {
                Ok(()) => Tried::Mapped,
                // All of it is in memory, and the kernel may have mapped a part.
                Err(error) => match self.end_halfway(body, block, len, Some(&[]), lead) {
                    Halfway::Whole => Tried::Mapped,
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
    fn uncovered(&self, body: &Body, block: u32) -> io::Result<()> {
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

    /// Asks for what the walk of `thread` will touch next, if its fault on `block` belongs to one.
    pub(crate) fn look_ahead(&'static self, body: &Arc<Body>, block: u32, thread: u32) {
        let limit = self.pool_of(body).figures().limit;
        let window = body.walked(thread, block, longest_window(body, limit));
        if let Some(window) = window {
            self.submit_ahead(body, window);
        }
    }

    /// Has a window brought in.
    pub(crate) fn submit_ahead(&'static self, body: &Arc<Body>, window: Window) {
        // A run of small blocks is fetched at one go, and then taken apart.
        if window.count < 2 || (window.step.abs() == 1 && body.block < FETCHED_BELOW) {
            self.workers.submit(self, Task::Ahead(body.clone(), window));
            return;
        }
        // Two readers keep a store busy while the walker computes; more would only take its processor.
        for half in 0..2 {
            let part = Window {
                first: window.first + half * window.step,
                step: window.step * 2,
                count: (window.count + 1 - half as u32) / 2,
            };
            self.workers.submit(self, Task::Ahead(body.clone(), part));
        }
    }

    /// Brings in a window of what is absent from a block on, and goes on behind whatever else is to be done.
    fn push(&'static self, body: Arc<Body>, from: u32, lead: &mut Lead) {
        let count = (PUSHED / body.block as u64).max(1) as u32;
        let window = Window {
            first: i64::from(from),
            step: 1,
            count,
        };
        self.bring_in_ahead(&body, window, lead);
        let next = from.saturating_add(count);
        if next < body.all_blocks() && !body.lock().closed {
            self.workers.submit(self, Task::Push(body, next));
        }
    }

    fn bring_in_ahead(&'static self, body: &Arc<Body>, window: Window, lead: &mut Lead) {
        let last = window.first + window.step * i64::from(window.count.max(1) - 1);
        let blocks = window.first.min(last).max(0)
            ..(window.first.max(last) + 1).min(i64::from(body.all_blocks()));
        if window.step.abs() != 1 || body.block >= FETCHED_BELOW || blocks.is_empty() {
            return self.bring_in_each(body, window, lead);
        }
        let offset = body.store_offset + body.start(blocks.start as u32) as u64;
        let len = (blocks.end - blocks.start) as u64 * body.block as u64;
        let fetched = body.store.0.will_read(offset, len);
        self.bring_in_each(body, window, lead);
        if fetched {
            body.store.0.was_read(offset, len);
        }
    }

    fn bring_in_each(&'static self, body: &Arc<Body>, window: Window, lead: &mut Lead) {
        for index in 0..i64::from(window.count) {
            let Ok(block) = u32::try_from(window.first + index * window.step) else {
                return;
            };
            if block >= body.all_blocks() {
                return;
            }
            let claimed = {
                let mut table = body.lock();
                table.state(block) == State::Absent && table.claim(block, Purpose::Fill)
            };
            if claimed {
                self.trace(Kind::Ahead, body, block, 0);
                let filling = Filling {
                    ahead: true,
                    ..Filling::new(body.clone(), block, 0, Instant::now())
                };
                self.fill(filling, lead);
            }
        }
    }

    /// Asks for a block on behalf of nobody who sleeps on it. The block must have been claimed for Fill.
    pub(crate) fn submit_fill(&'static self, body: &Arc<Body>, block: u32) {
        self.trace(Kind::Ahead, body, block, 0);
        let filling = Filling::new(body.clone(), block, 0, Instant::now());
        self.workers.submit(self, Task::Fill(filling));
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

/// The longest window that a limit of so many bytes allows, in blocks.
pub(crate) fn longest_window(body: &Body, limit: u64) -> u32 {
    ((limit / WINDOW_SHARE).min(LONGEST_WINDOW) / body.block as u64) as u32
}

/// The kernel refused memory that the limit allowed: wait for some. Anything else is for good.
fn refused(error: io::Error) -> Tried {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::ENOMEM | libc::EAGAIN) => Tried::Refused(error),
        _ => Tried::Failed(error),
    }
}
