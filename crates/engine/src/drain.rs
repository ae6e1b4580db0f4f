//! The drain: background copying of dirty blocks to their homes.
//!
//! It writes what rests dirty as soon as an eviction had to write by itself, in the order of the store,
//! so that neighbours go together and evictions find clean blocks. Everything else that is dirty is
//! written after a while ([`AGE`]), as the kernel does with the page cache. A failed write keeps its data,
//! is kept for the next flush, and is tried again. Each region's round is an errand, so that a store that is
//! slow, refuses or does not come back keeps nobody else's bytes waiting.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::lock::{Condvar, Mutex};

use crate::Access;
use crate::body::Body;
use crate::clean::{self, Which};
use crate::engine::Engine;
use crate::threads;

/// How long written bytes stay in memory alone, at most.
pub const AGE: Duration = Duration::from_secs(30);

/// When to look again at a region that could not be cleaned.
const SOON: Duration = Duration::from_millis(200);

/// How long one region's round is waited for before the next one's begins beside it.
const TURN: Duration = Duration::from_millis(500);

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
        let mut soon = false;
        loop {
            {
                let mut kicked = self.kicked.lock();
                if !*kicked {
                    let pause = if soon { SOON } else { AGE };
                    self.ring.wait_for(&mut kicked, pause);
                }
                *kicked = false;
            }
            let full = last_full.elapsed() >= AGE;
            soon = false;
            for body in engine.bodies() {
                if !body.writable() || body.lock().closed {
                    continue;
                }
                // A store that refuses is not hammered, and one that does not come back is left alone.
                if body.refuses_writes(engine.now_ms()) {
                    soon = true;
                    continue;
                }
                // Private changes need no home as long as there is room.
                let which = if full && body.access == Access::ReadWrite {
                    Which::Free
                } else {
                    Which::Resting
                };
                soon |= !round(engine, &body, which);
            }
            if full {
                last_full = Instant::now();
            }
        }
    }
}

/// Writes back what a region has to be written. False if some of it is left: the store failed, or its last
/// round is not over yet. Nobody's store is waited for longer than [`TURN`].
fn round(engine: &'static Engine, body: &Arc<Body>, which: Which) -> bool {
    if body.draining.swap(true, Ordering::Acquire) {
        return false;
    }
    let mine = body.clone();
    let done = engine.errand_for(TURN, move || {
        let blocks = 0..mine.all_blocks();
        // An error stays with the region until the next flush raises it.
        let done = clean::clean_behind(engine, &mine, blocks, which).is_ok();
        mine.draining.store(false, Ordering::Release);
        done
    });
    done.unwrap_or(false)
}
