//! The drain's way home: what is dirty in regions is written to their stores in the background.
//!
//! What rests dirty is written as soon as an eviction had to write by itself, in the order of the store,
//! so that neighbours go together and evictions find clean blocks. Everything else that is dirty is
//! written after a while ([`AGE`]), as the kernel does with the page cache. A failed write keeps its data,
//! is kept for the next flush, and is tried again. Each region's turn is an errand of its own, so that a store that is
//! slow, refuses or does not come back keeps nobody else's bytes waiting.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Access;
use crate::body::Body;
use crate::clean::{self, Which};
use crate::drain::{Next, Target};
use crate::engine::Engine;
use crate::lock::Mutex;

/// How long written bytes stay in memory alone, at most.
pub(crate) const AGE: Duration = Duration::from_secs(30);

/// When to look again at a region that could not be cleaned.
const SOON: Duration = Duration::from_millis(200);

/// How long one region's turn is waited for before the next one's begins beside it.
const TURN: Duration = Duration::from_millis(500);

/// The homes of all regions of an engine, as one target of its drain.
pub(crate) struct Homes {
    engine: &'static Engine,
    /// When all that was dirty was last written, and not only what rested.
    last_full: Mutex<Instant>,
}

impl Homes {
    pub(crate) fn of(engine: &'static Engine) -> Homes {
        Homes {
            engine,
            last_full: Mutex::new(Instant::now()),
        }
    }
}

/// Asks for a round over what rests dirty.
pub(crate) fn ask(engine: &Engine) {
    if let Some(homes) = engine.homes.get() {
        engine.drain.ask(*homes);
    }
}

impl Target for Homes {
    fn round(&self) -> Next {
        let engine = self.engine;
        let full = self.last_full.lock().elapsed() >= AGE;
        let mut soon = false;
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
            soon |= !turn(engine, &body, which);
        }
        if full {
            *self.last_full.lock() = Instant::now();
        }
        Next::In(if soon { SOON } else { AGE })
    }
}

/// Writes back what a region has to be written. False if some of it is left: the store failed, or its last
/// turn is not over yet. Nobody's store is waited for longer than [`TURN`].
fn turn(engine: &'static Engine, body: &Arc<Body>, which: Which) -> bool {
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
