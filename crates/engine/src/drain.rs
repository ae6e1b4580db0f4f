//! The drain: background copying of dirty blocks to their homes.
//!
//! It writes what rests dirty as soon as an eviction had to write by itself, in the order of the store,
//! so that neighbours go together and evictions find clean blocks. Everything else that is dirty is
//! written after a while ([`AGE`]), as the kernel does with the page cache. A failed write keeps its data,
//! is kept for the next flush, and is tried again.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::Access;
use crate::clean::{self, Which};
use crate::engine::Engine;
use crate::threads;

/// How long written bytes stay in memory alone, at most.
pub const AGE: Duration = Duration::from_secs(30);

/// The background write-back of an engine.
#[derive(Default)]
pub(crate) struct Drain {
    kicked: Mutex<bool>,
    ring: Condvar,
}

impl Drain {
    pub(crate) fn start(&self, engine: &'static Engine) -> bool {
        threads::start("userfault-drain", 256 << 10, move || {
            engine.drain.run(engine)
        })
    }

    /// Asks for a round over what rests dirty.
    pub(crate) fn kick(&self) {
        let mut kicked = self.kicked.lock();
        if !*kicked {
            *kicked = true;
            drop(kicked);
            self.ring.notify_one();
        }
    }

    fn run(&self, engine: &'static Engine) {
        let mut last_full = Instant::now();
        loop {
            {
                let mut kicked = self.kicked.lock();
                if !*kicked {
                    self.ring.wait_for(&mut kicked, AGE);
                }
                *kicked = false;
            }
            let full = last_full.elapsed() >= AGE;
            let mut failed = false;
            for body in engine.bodies() {
                if body.writable() && !body.lock().closed {
                    let blocks = body.lock().blocks() as u32;
                    // The error stays with the region until the next flush raises it.
                    // Private changes need no home as long as there is room.
                    let which = if full && body.access == Access::ReadWrite {
                        Which::All
                    } else {
                        Which::Resting
                    };
                    failed |= clean::clean_behind(engine, &body, 0..blocks, which).is_err();
                }
            }
            if full {
                last_full = Instant::now();
            }
            if failed {
                // A store that refuses is not hammered.
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}
