//! Memory that is free before it is needed.
//!
//! A handler does not evict: to choose a victim and to write it back takes more than it may do. When little is
//! left below a limit, it rings for a thread that evicts until there is some more. A toucher that finds
//! nothing all the same hands its fault over, and the fault loop makes room as for any other.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::engine::Engine;
use crate::futex;
use crate::threads;

/// The bell of the thread.
#[derive(Debug, Default)]
pub(super) struct Headroom {
    /// 1 while somebody has rung.
    bell: AtomicU32,
    /// Grows when there is more room than before.
    rounds: AtomicU32,
    sleepers: AtomicU32,
}

impl Headroom {
    /// Asks for more room. May be called in a handler, and costs next to nothing when somebody has asked.
    pub(super) fn ask(&self) {
        if self.bell.load(Ordering::Relaxed) == 0 && self.bell.swap(1, Ordering::SeqCst) == 0 {
            futex::wake(&self.bell, 1);
        }
    }
}

impl Headroom {
    /// What [`Headroom::sleep`] wants to know; to be read before room is asked for.
    pub(super) fn rounds(&self) -> u32 {
        self.rounds.load(Ordering::SeqCst)
    }

    /// Sleeps until more room has been made than at `seen`, at most `at_most`.
    pub(super) fn sleep(&self, seen: u32, at_most: Duration) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        futex::wait(&self.rounds, seen, Some(at_most));
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Tells the sleepers that there is more room.
    fn made(&self) {
        self.rounds.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex::wake(&self.rounds, i32::MAX);
        }
    }
}

/// Starts the thread.
pub(super) fn start(engine: &'static Engine) -> bool {
    threads::start("userfault-room", 128 << 10, move || {
        let inline = engine
            .inline()
            .expect("it was started by the inline source");
        loop {
            while inline.headroom.bell.load(Ordering::SeqCst) == 0 {
                futex::wait(&inline.headroom.bell, 0, None);
            }
            // Asked again while room is made: looked at again.
            inline.headroom.bell.store(0, Ordering::SeqCst);
            engine.make_room_ahead(|| inline.headroom.made());
        }
    })
}
