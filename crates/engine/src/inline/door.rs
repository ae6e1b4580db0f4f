//! Where touching threads sleep until their block changes hands.
//!
//! A door is a word that grows whenever the block behind it has been released. A sleeper reads the word before
//! it looks at the block, so that what changes in between ends its sleep at once. Several blocks share a
//! door: who is woken for another block's sake touches again, and comes back.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::futex;

const DOORS: usize = 32;

#[derive(Debug, Default)]
struct Door {
    openings: AtomicU32,
    sleepers: AtomicU32,
}

/// The doors of a region.
#[derive(Debug, Default)]
pub(crate) struct Doors {
    doors: [Door; DOORS],
}

impl Doors {
    fn of(&self, block: u32) -> &Door {
        &self.doors[block as usize % DOORS]
    }

    /// What [`Doors::sleep`] wants to know; to be read before the block's state.
    pub(crate) fn seen(&self, block: u32) -> u32 {
        self.of(block).openings.load(Ordering::SeqCst)
    }

    /// Sleeps until the door has been opened since `seen`, at most `at_most`. True if the time is over.
    pub(crate) fn sleep(&self, block: u32, seen: u32, at_most: Duration) -> bool {
        let door = self.of(block);
        door.sleepers.fetch_add(1, Ordering::SeqCst);
        let late = futex::wait(&door.openings, seen, Some(at_most));
        door.sleepers.fetch_sub(1, Ordering::SeqCst);
        late
    }

    /// Wakes whoever sleeps for a block.
    pub(crate) fn open(&self, block: u32) {
        self.of(block).open();
    }

    /// Wakes everybody.
    pub(crate) fn open_all(&self) {
        for door in &self.doors {
            door.open();
        }
    }
}

impl Door {
    fn open(&self) {
        self.openings.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex::wake(&self.openings, i32::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_door_that_was_opened_since_it_was_looked_at_keeps_nobody() {
        let doors = Doors::default();
        let seen = doors.seen(3);
        doors.open(3);
        assert!(!doors.sleep(3, seen, Duration::from_secs(100)));
        assert!(doors.sleep(4, doors.seen(4), Duration::from_millis(1)));
    }
}
