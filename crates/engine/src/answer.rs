//! What a fault means for a block, and mapping what is in memory already.

use std::sync::Arc;

use crate::block::{Answer, Fault, Purpose, State, answer};
use crate::body::Body;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::fill::{Filling, written};
use crate::kernel::Evidence;
use crate::policy::Queue;
use crate::protect::first_write;
use crate::stats::add;
use crate::table::Table;
use crate::trace::Kind;
use crate::workers::{Lead, Task, Touch};

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
        counters.faulted(touch.fault);
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
        self.seat_given(body, block, Queue::Mapped(memo.rank()), Some(touch.thread));
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
    pub(crate) fn mapped(
        &self,
        body: &Body,
        table: &mut Table,
        block: u32,
        written: Option<usize>,
    ) -> bool {
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
}
