//! Read-ahead: noticing that a thread walks, and bringing in what it will touch next.
//!
//! Each touching thread may walk in several places at once (a merge reads two runs). A walk is seen by its
//! faults alone: what was brought in ahead raises none, so the next fault of a walk comes where the last window
//! ended, and asks for a window twice as long. Who walks faster than the store reads touches blocks that are
//! still on their way: such a touch in the second half of a window asks for the next one at once, so that the
//! store has something to do all the time. A fault anywhere else costs nothing but a look
//! at a few entries; a walk that stops is forgotten when its entry is needed. Forward, backward and strided
//! walks are one rule: the step between the first two faults.
//!
//! Whether it pays is seen by the same faults: a window was worth bringing in if the walk went on behind it. Where
//! more of them are left behind than followed, a walk has to be longer before it is believed, so that a program
//! that jumps after every few blocks reads next to nothing in vain; the first long walk changes that again.
//!
//! Nothing here touches memory or the kernel: [`Walks::fault`] is a pure function of what it has seen.

use std::ops::Range;

/// Walks that are remembered for a region.
const WALKS: usize = 16;

/// The longest step between two touches of a walk, blocks.
const LONGEST_STEP: i64 = 32;

/// What is kept of how many windows were followed, less those left behind: it begins at the most, so that a few
/// that are left behind do not yet tell.
const CREDIT: i32 = 4;

/// Steps that a walk takes before its first window where windows do not pay; else it is one.
const STEPS_TO_BELIEVE: u32 = 8;

/// Bytes that are brought in ahead at most, whatever the block.
pub const LONGEST_WINDOW: u64 = 16 << 20;

/// The share of the pool's limit that one window may take.
pub const WINDOW_SHARE: u64 = 16;

/// What the program says of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Walks are noticed.
    Normal,
    /// It will be walked: the first window is the longest.
    Sequential,
    /// It will not be walked: nothing is brought in ahead.
    Random,
}

#[derive(Debug, Clone, Copy, Default)]
struct Walk {
    thread: u32,
    /// The last fault, or the last block of the window that it asked for.
    last: i64,
    /// 0: only one fault was seen.
    step: i64,
    /// The window that was asked for last; 0 if none was.
    window: u32,
    /// Blocks up to `last` that were asked for: the window, what was left of the one before, and the block
    /// whose touch asked.
    asked: u32,
    /// Steps that were seen one after the other, before the first window.
    steps: u32,
    /// When it was seen last, by the count of faults.
    seen: u64,
}

impl Walk {
    /// If `block` was asked for, how many blocks beyond it were.
    fn asked_beyond(&self, block: i64) -> Option<u32> {
        let back = self.last - block;
        (self.window > 0 && back % self.step == 0)
            .then(|| back / self.step)
            .filter(|beyond| (0..i64::from(self.asked)).contains(beyond))
            .map(|beyond| beyond as u32)
    }

    /// Asks for the next window, `left` blocks of the last being still on their way. `None`: not even one block may be
    /// brought in ahead.
    fn ask(&mut self, left: u32, longest: u32, advice: Advice) -> Option<Window> {
        if longest == 0 {
            return None;
        }
        self.window = match advice {
            Advice::Sequential => longest,
            _ => (self.window * 2).clamp(2, longest.max(2)).min(longest),
        };
        let first = self.last + self.step;
        self.last += self.step * i64::from(self.window);
        self.asked = left + self.window + 1;
        Some(Window {
            first,
            step: self.step,
            count: self.window,
        })
    }
}

/// The walks in a region.
#[derive(Debug)]
pub struct Walks {
    walks: [Walk; WALKS],
    faults: u64,
    credit: i32,
}

impl Default for Walks {
    fn default() -> Walks {
        Walks {
            walks: Default::default(),
            faults: 0,
            credit: CREDIT,
        }
    }
}

/// What to bring in: `count` blocks from `first` on, `step` apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first block.
    pub first: i64,
    /// From one block to the next.
    pub step: i64,
    /// How many.
    pub count: u32,
}

impl Window {
    /// The last block; the first if there are none.
    pub fn last(self) -> i64 {
        self.first + self.step * i64::from(self.count.max(1) - 1)
    }

    /// From its lowest block to its highest, of a region of so many.
    pub fn blocks(self, all: u32) -> Range<u32> {
        let within = |block: i64| block.clamp(0, i64::from(all)) as u32;
        within(self.first.min(self.last()))..within(self.first.max(self.last()) + 1)
    }
}

impl Walks {
    /// Notes a touch by `thread` of `block`, which is absent or on its way. `longest` is the longest window, in
    /// blocks; it is asked only for a walk that goes on.
    pub fn fault(
        &mut self,
        thread: u32,
        block: u32,
        longest: impl FnOnce() -> u32,
        advice: Advice,
    ) -> Option<Window> {
        if advice == Advice::Random {
            return None;
        }
        self.faults += 1;
        let block = i64::from(block);
        let mine = |walk: &&mut Walk| walk.seen > 0 && walk.thread == thread;
        if let Some(walk) = self
            .walks
            .iter_mut()
            .filter(mine)
            .find(|walk| walk.step != 0 && walk.last + walk.step == block)
        {
            if walk.window > 0 {
                self.credit = (self.credit + 1).min(CREDIT);
            }
            walk.seen = self.faults;
            walk.steps = walk.steps.saturating_add(1);
            if self.credit < 0 && walk.steps < STEPS_TO_BELIEVE && advice != Advice::Sequential {
                walk.last = block;
                return None;
            }
            walk.last = block;
            return walk.ask(0, longest(), advice);
        }
        // It is touched before it came.
        if let Some((walk, beyond)) = self
            .walks
            .iter_mut()
            .filter(mine)
            .find_map(|walk| walk.asked_beyond(block).map(|beyond| (walk, beyond)))
        {
            walk.seen = self.faults;
            if beyond >= walk.window.div_ceil(2) {
                return None;
            }
            self.credit = (self.credit + 1).min(CREDIT);
            return walk.ask(beyond, longest(), advice);
        }
        // It was noted already.
        if self
            .walks
            .iter_mut()
            .filter(mine)
            .any(|walk| walk.last == block)
        {
            return None;
        }
        // Close to where this thread was last: the beginning of a walk, perhaps.
        let near = self
            .walks
            .iter_mut()
            .filter(mine)
            .filter(|walk| (walk.last - block).abs() <= LONGEST_STEP)
            .max_by_key(|walk| walk.seen);
        let seen = self.faults;
        let (walk, step) = if let Some(walk) = near {
            let step = block - walk.last;
            (walk, step)
        } else {
            let oldest = self.walks.iter_mut().min_by_key(|walk| walk.seen)?;
            (oldest, i64::from(advice == Advice::Sequential))
        };
        if walk.window > 0 {
            self.credit = (self.credit - 1).max(-CREDIT);
        }
        *walk = Walk {
            thread,
            last: block,
            step,
            window: 0,
            asked: 0,
            steps: 0,
            seen,
        };
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks over `blocks`, faulting only where nothing was brought in; returns the faults.
    fn faults(walks: &mut Walks, thread: u32, blocks: impl Iterator<Item = u32>) -> usize {
        let mut there = std::collections::HashSet::new();
        let mut faults = 0;
        for block in blocks {
            if there.insert(i64::from(block)) {
                faults += 1;
                if let Some(window) = walks.fault(thread, block, || 16, Advice::Normal) {
                    there.extend(
                        (0..i64::from(window.count)).map(|n| window.first + n * window.step),
                    );
                }
            }
        }
        faults
    }

    #[test]
    fn forward_backward_and_strided_walks_fault_once_a_window() {
        for step in [1i64, -1, 3, -7] {
            let blocks = (0..1000i64).map(|n| (20_000 + n * step) as u32);
            let count = faults(&mut Walks::default(), 1, blocks);
            assert!(count < 1000 / 16 + 8, "step {step}: {count} faults");
        }
    }

    #[test]
    fn two_walks_of_one_thread_and_one_of_another_do_not_disturb_each_other() {
        let mut walks = Walks::default();
        let merged = (0..2000u32).map(|n| if n % 2 == 0 { n / 2 } else { 500_000 + n / 2 });
        assert!(faults(&mut walks, 1, merged) < 2 * (1000 / 16 + 8));
        assert!(faults(&mut walks, 2, (0..1000u32).map(|n| 90_000 + n)) < 1000 / 16 + 8);
    }

    #[test]
    fn random_touches_bring_in_next_to_nothing() {
        let mut walks = Walks::default();
        let mut seed = 7u64;
        let mut brought = 0;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let block = (seed >> 40) as u32 % 100_000;
            brought += walks
                .fault(1, block, || 16, Advice::Normal)
                .map_or(0, |window| window.count);
        }
        assert!(brought < 100, "{brought} blocks");
    }

    /// Blocks that are brought in for runs of so many blocks at random places, all of them touched.
    fn brought(walks: &mut Walks, runs: u32, length: u32, advice: Advice) -> u32 {
        let mut brought = 0;
        for run in 0..runs {
            let start = run.wrapping_mul(2_654_435_761) >> 8;
            let mut there = 0..0;
            for block in start..start + length {
                if !there.contains(&block)
                    && let Some(window) = walks.fault(1, block, || 16, advice)
                {
                    brought += window.count;
                    there = window.first as u32..window.first as u32 + window.count;
                }
            }
        }
        brought
    }

    #[test]
    fn what_is_left_behind_again_and_again_is_not_brought_in_any_more() {
        let mut walks = Walks::default();
        let (first, later) = (
            brought(&mut walks, 100, 3, Advice::Normal),
            brought(&mut walks, 1000, 3, Advice::Normal),
        );
        assert!(first > 0, "three in a row looked like a walk");
        assert_eq!(later, 0);
        // Who walks far is believed again, and goes on to be.
        let walked = brought(&mut walks, 1, 2000, Advice::Normal);
        assert!(walked > 1850, "{walked}");
        let many = brought(&mut walks, 100, 200, Advice::Normal);
        assert!(many > 100 * 180, "{many}");
        // Advice needs no belief.
        let (mut doubted, mut advised) = (Walks::default(), Walks::default());
        brought(&mut doubted, 100, 3, Advice::Normal);
        assert_eq!(
            brought(&mut doubted, 10, 20, Advice::Sequential),
            brought(&mut advised, 10, 20, Advice::Sequential)
        );
    }

    #[test]
    fn who_overtakes_the_store_has_the_next_window_asked_for_in_the_middle_of_the_last() {
        for step in [1i64, -1, 5] {
            let mut walks = Walks::default();
            let place = |n: i64| (10_000 + n * step) as u32;
            // How many blocks beyond the touched one are asked for: none is ever there when it is touched.
            let mut beyond = 0i64;
            let mut windows = 0;
            for n in 0..400 {
                let asked = walks.fault(1, place(n), || 16, Advice::Normal);
                // Nor does a second look at the same touch change anything.
                assert_eq!(walks.fault(1, place(n), || 16, Advice::Normal), None);
                beyond = (beyond - 1).max(0);
                if let Some(asked) = asked {
                    assert_eq!(asked.step, step);
                    // Right behind what was asked for before.
                    assert_eq!(asked.first, i64::from(place(n + beyond + 1)));
                    beyond += i64::from(asked.count);
                    windows += 1;
                }
                if n > 30 {
                    assert!((8..=24).contains(&beyond), "{beyond} beyond {n}");
                }
            }
            assert!(windows < 400 / 16 + 8, "{windows}");
        }
    }

    #[test]
    fn a_first_touch_that_is_noted_twice_is_one_touch() {
        let mut walks = Walks::default();
        assert_eq!(walks.fault(1, 7, || 16, Advice::Normal), None);
        assert_eq!(walks.fault(1, 7, || 16, Advice::Normal), None);
        assert_eq!(walks.walks.iter().filter(|walk| walk.seen > 0).count(), 1);
    }

    #[test]
    fn advice_is_followed() {
        let mut walks = Walks::default();
        assert!((0..100).all(|block| walks.fault(1, block, || 16, Advice::Random).is_none()));
        walks.fault(1, 0, || 16, Advice::Sequential);
        assert_eq!(
            walks
                .fault(1, 1, || 16, Advice::Sequential)
                .map(|window| window.count),
            Some(16)
        );
    }
}
