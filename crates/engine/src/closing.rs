//! Closing a region: what was written until the last moment is stored, then nobody can touch it any more.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::block::State;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::record;
use crate::policy::Queue;
use crate::region::{Region, SEALED};
use crate::{Access, clean, fork, signals};

impl Region {
    /// Flushes, then gives the memory up: a later touch is SIGSEGV. After an error the region is open as
    /// before, and the data is there. Closing again does nothing.
    pub fn close(&self) -> Result<(), Error> {
        let _shield = signals::shield();
        let engine = match self.engine() {
            Ok(engine) => engine,
            // In a forked child there is nothing to close, and the second close does nothing.
            Err(_) => return Ok(()),
        };
        let body = &self.body;
        if body.access == Access::Private {
            self.abandon();
            return Ok(());
        }
        clean::flush(engine, body, 0..body.all_blocks())?;
        {
            let mut table = body.lock();
            if table.closed {
                return Ok(());
            }
            table.closed = true;
        }
        let mut last = Ok(());
        if !self.wait_for_owners(body.patience() + Duration::from_secs(1)) {
            last = Err(self.still_owned());
        }
        // From here on nobody maps anything. What was written since the flush is still caught: unmap,
        // gather the evidence, write. A thread that touches meanwhile sleeps until the seal.
        let last = last
            .and_then(|()| self.gather())
            .and_then(|()| clean::flush(engine, body, 0..body.all_blocks()));
        if let Err(error) = last {
            body.lock().closed = false;
            for block in 0..body.all_blocks() {
                if body.lock().state(block) == State::Resting {
                    engine.seat(body, block, Queue::Resting);
                }
                engine.wake(body, block);
            }
            return Err(error);
        }
        for block in 0..body.all_blocks() {
            if engine.hashing && body.lock().state(block) == State::Resting {
                engine.check_content(body, block);
            }
        }
        self.seal(engine);
        Ok(())
    }

    /// Gives the memory up without writing anything back.
    pub fn abandon(&self) {
        let _shield = signals::shield();
        let Ok(engine) = self.engine() else { return };
        {
            let mut table = self.body.lock();
            if table.closed {
                return;
            }
            table.closed = true;
        }
        self.seal(engine);
    }

    /// Waits until nobody owns a block. False if somebody still does after so long.
    fn wait_for_owners(&self, at_most: Duration) -> bool {
        let began = Instant::now();
        let mut table = self.body.lock();
        while table.in_use() && began.elapsed() < at_most {
            self.body.sleep(&mut table, Duration::from_millis(50));
        }
        !table.in_use()
    }

    /// The error of a close that found a block whose owner does not come back.
    fn still_owned(&self) -> Error {
        let table = self.body.lock();
        let block = (0..self.body.all_blocks()).find(|block| table.state(*block).exclusive());
        drop(table);
        self.body.block_stuck(block.unwrap_or(0))
    }

    /// Unmaps everything and gathers the evidence.
    fn gather(&self) -> Result<(), Error> {
        let body = &self.body;
        let Some(engine) = Engine::existing() else {
            return Err(Error::Forked);
        };
        if !body.memory.shared() {
            return Ok(());
        }
        for block in 0..body.all_blocks() {
            {
                // Nobody maps a block any more, but the drain may be cleaning this one.
                let (mut table, mut since) = (body.lock(), None);
                while table.state(block).exclusive() {
                    body.await_owner(&mut table, block, &mut since)?;
                }
                if !table.claim_for_close(block) {
                    continue;
                }
            }
            let zapped = body.memory.zap(body.start(block), body.block_len(block));
            let harvest = engine.harvest_zapped(body, body.pages(block));
            let mut table = body.lock();
            record(&mut table, &harvest);
            let state = match zapped {
                Ok(()) => State::Resting,
                Err(_) => State::Resident,
            };
            let _ = body.release(&mut table, block, state);
            if zapped.is_err() {
                return Err(Error::last_os(
                    "madvise",
                    "the program changed the region's mapping itself",
                ));
            }
        }
        Ok(())
    }

    fn seal(&self, engine: &'static Engine) {
        let body = &self.body;
        body.lock().sealed = true;
        self.wait_for_owners(body.retry_for + Duration::from_secs(2));
        body.memory.seal();
        // Sleepers find PROT_NONE now, and get SIGSEGV instead of sleeping on.
        let _ = engine
            .uffd_of(body)
            .wake(body.memory.main(), body.memory.len());
        if let (Some(_), Some(inline)) = (&body.doors, engine.inline()) {
            inline.dismiss(body);
        }
        engine.dismiss(body);
        engine.pool_of(body).forget(body.id);
        engine.pool.dismiss(body.block as u64);
        let bytes = body.in_memory();
        body.given_back.store(bytes, Ordering::Release);
        engine.give_back(body, bytes);
        let idle = {
            let mut table = body.lock();
            table.forget_spans();
            table.quiet()
        };
        engine.settle_tables(body);
        if idle {
            engine.charge(body, -body.store_mapping.end());
            body.memory.drop_view();
            body.view_gone.store(true, Ordering::Release);
            let mut gone = self.kept();
            gone.remove(0);
            fork::forget(&gone);
        }
        // Otherwise a call of the store that has not come back may still use the view: it goes with the body.
        self.state.store(SEALED, Ordering::Release);
    }
}
