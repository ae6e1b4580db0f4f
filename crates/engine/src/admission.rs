//! How many fills of a region are under way at once, and who of those that wait is next.
//!
//! Ordinarily the door is wide: a fill waits only while so many are under way that a store which is slow or hangs
//! would take the threads of other stores, and who came first is next.
//!
//! When memory is *short*, that is, full (by the region's limit or the process's, a control group or the kernel) and
//! with fewer than eight blocks for each thread that faults, that order is
//! the worst: each thread is given a block in turn, and what it was given before leaves to make room
//! for the others, so all of them read the same blocks again and again (thrashing; Denning, "The Working Set Model
//! for Program Behavior", 1968). Then the door is *narrow*, and who came last is next: that is a thread which ran a
//! moment ago, so its other blocks are still there. Few threads run on with all they need, and the rest
//! wait. Of [`TURNS`] turns one goes to whoever has waited for the longest, so that everybody gets on.
//!
//! A sort of 1 GiB by 128 threads in 128 blocks of 2 MiB (`make bench ARGS=sort-tmpfs-128`) reads 12 to 16 GB in turn
//! and 6.5 to 6.8 this way; two threads read 4.4. The last alone through a wide door is no better (16 GB), and first
//! come first through a narrow one hardly (12). Eight blocks a thread, and not four: with 256 blocks of 1 MiB the
//! same sort reads 6.4 GB instead of 8.4.
//!
//! A narrow door must not starve a store that is slow: the longer fills take, the wider it is.

use std::collections::VecDeque;
use std::time::Duration;

/// Fills of one region at once that threads wait for. The others wait, so that a store that is slow or hangs does
/// not take every thread from the regions of other stores.
pub(crate) const MOST_FILLS: usize = 32;

/// A narrow door lets in as many fills for each processor: one is read while another one's room is made.
const NARROW_PER_PROCESSOR: usize = 2;

/// The least that a narrow door lets in.
const NARROWEST: usize = 4;

/// One more is let in through a narrow door for each time that a fill takes so long.
const SLOW: Duration = Duration::from_millis(4);

/// While memory is short, one turn in so many goes to the oldest.
const TURNS: u32 = 32;

/// The weight of a new observation is one in `1 << MEMORY`.
const MEMORY: u32 = 3;

/// How many are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Door {
    /// Fills under way.
    most: usize,
    /// Those of them that threads wait for, and not only the kernel.
    waited_for: usize,
    /// Memory is short.
    narrow: bool,
}

impl Door {
    /// The door of an ordinary day; `most` fills may be under way if the kernel reads for the greater part.
    pub(crate) fn wide(most: usize) -> Door {
        Door {
            most,
            waited_for: MOST_FILLS.min(most),
            narrow: false,
        }
    }

    /// True if memory is short.
    pub(crate) fn is_narrow(self) -> bool {
        self.narrow
    }
}

/// The fills of a region. A fill that waits is a `F`.
#[derive(Debug)]
pub(crate) struct Admission<F> {
    /// Fills under way.
    under_way: usize,
    /// Those of them that the kernel reads: no thread waits for them.
    pub(crate) flying: usize,
    waiting: VecDeque<F>,
    /// Turns given while memory was short.
    turns: u32,
    /// How long a fill takes of late, nanoseconds.
    takes: u64,
    /// What the narrowest door lets in.
    narrowest: usize,
}

impl<F> Admission<F> {
    /// Nobody is there yet. `processors` run the threads that fill.
    pub(crate) fn new(processors: usize) -> Admission<F> {
        Admission {
            under_way: 0,
            flying: 0,
            waiting: VecDeque::new(),
            turns: 0,
            takes: 0,
            narrowest: (NARROW_PER_PROCESSOR * processors).max(NARROWEST),
        }
    }

    /// A fill is under way; it may still turn out that it has to wait.
    pub(crate) fn began(&mut self) {
        self.under_way += 1;
    }

    /// A fill is over.
    pub(crate) fn ended(&mut self) {
        debug_assert!(self.under_way > 0);
        self.under_way -= 1;
    }

    /// Notes how long a fill was under way.
    pub(crate) fn took(&mut self, time: Duration) {
        self.takes = self.takes - (self.takes >> MEMORY) + (time.as_nanos() as u64 >> MEMORY);
    }

    /// True if the fill that began last may be given to the kernel.
    pub(crate) fn may_fly(&self, door: Door) -> bool {
        self.under_way <= door.most
    }

    /// True if more are under way than the door lets in.
    pub(crate) fn is_crowded(&self, door: Door) -> bool {
        self.under_way > door.most || self.under_way - self.flying > door.waited_for
    }

    /// A fill that is not under way after all waits. There must be another under way, whose end calls it.
    pub(crate) fn wait(&mut self, fill: F) {
        self.ended();
        debug_assert!(self.under_way > 0);
        self.waiting.push_back(fill);
    }

    /// Lets the next fill in, if there is one and it has a place: it is under way from here on.
    pub(crate) fn let_in(&mut self, door: Door) -> Option<F> {
        self.began();
        let next = if self.is_crowded(door) {
            None
        } else if !door.narrow {
            self.waiting.pop_front()
        } else {
            self.turns = self.turns.wrapping_add(1);
            if self.turns.is_multiple_of(TURNS) {
                self.waiting.pop_front()
            } else {
                self.waiting.pop_back()
            }
        };
        if next.is_none() {
            self.ended();
        }
        next
    }

    /// All that wait, which will not be let in.
    pub(crate) fn dismiss(&mut self) -> VecDeque<F> {
        std::mem::take(&mut self.waiting)
    }

    /// How many wait.
    pub(crate) fn queue(&self) -> usize {
        self.waiting.len()
    }

    /// True if nobody waits, and so few are under way that any door is wide enough for one more.
    pub(crate) fn is_quiet(&self) -> bool {
        self.under_way < self.narrowest && self.waiting.is_empty()
    }

    /// The door while memory is short, where it would be `wide` otherwise.
    pub(crate) fn narrow(&self, wide: Door) -> Door {
        let slow = (self.takes / SLOW.as_nanos() as u64) as usize;
        let most = self.narrowest.max(slow).min(wide.waited_for);
        Door {
            most,
            waited_for: most,
            narrow: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Door = Door {
        most: 96,
        waited_for: MOST_FILLS,
        narrow: false,
    };

    /// Fills that nobody but their number tells apart, of which the first `under_way` are under way.
    fn full(under_way: usize, waiting: usize) -> Admission<usize> {
        let mut fills = Admission::new(2);
        for _ in 0..under_way {
            fills.began();
        }
        for number in 0..waiting {
            fills.began();
            fills.wait(number);
        }
        fills
    }

    /// Ends a fill and lets in whom the door allows.
    fn next(fills: &mut Admission<usize>, door: Door) -> Vec<usize> {
        fills.ended();
        std::iter::from_fn(|| fills.let_in(door)).collect()
    }

    #[test]
    fn through_a_wide_door_who_came_first_is_next() {
        let mut fills = full(MOST_FILLS, 3);
        assert!(!fills.is_crowded(WIDE));
        for number in 0..3 {
            assert_eq!(next(&mut fills, WIDE), [number]);
        }
        assert_eq!(next(&mut fills, WIDE), [0; 0]);
    }

    #[test]
    fn what_the_kernel_reads_takes_no_place_of_those_that_threads_wait_for() {
        let mut fills = full(MOST_FILLS, 0);
        fills.flying = 10;
        for _ in 0..10 {
            fills.began();
            assert!(fills.may_fly(WIDE) && !fills.is_crowded(WIDE));
        }
        fills.began();
        assert!(fills.is_crowded(WIDE) && fills.may_fly(WIDE));
    }

    #[test]
    fn while_memory_is_short_few_are_let_in_and_who_came_last_is_next() {
        let mut fills = full(MOST_FILLS, 10);
        let door = fills.narrow(WIDE);
        for _ in 0..MOST_FILLS - 4 {
            assert_eq!(
                next(&mut fills, door),
                [0; 0],
                "more are under way than that"
            );
        }
        for number in (0..10).rev() {
            assert_eq!(next(&mut fills, door), [number]);
        }
    }

    #[test]
    fn everybody_gets_on_while_others_come_again_and_again() {
        let mut fills = full(4, 3);
        let door = fills.narrow(WIDE);
        let mut waiting = vec![0, 1, 2];
        for _ in 0..4 * TURNS {
            let let_in = next(&mut fills, door);
            waiting.retain(|number| !let_in.contains(number));
            fills.began();
            fills.wait(100);
        }
        assert_eq!(waiting, [0; 0]);
    }

    #[test]
    fn a_narrow_door_is_wider_for_a_store_that_is_slow() {
        let mut fills = full(4, 0);
        let quick = fills.narrow(WIDE).most;
        let mut most = quick;
        for _ in 0..100 {
            fills.took(Duration::from_millis(60));
            let now = fills.narrow(WIDE).most;
            assert!(now >= most);
            most = now;
        }
        assert!((12..=15).contains(&most), "{most}");
        fills.took(Duration::from_secs(10));
        assert_eq!(fills.narrow(WIDE).most, MOST_FILLS);
        for _ in 0..100 {
            fills.took(Duration::from_micros(300));
        }
        assert_eq!(fills.narrow(WIDE).most, quick);
    }
}
