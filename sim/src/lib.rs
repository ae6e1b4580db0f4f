//! The simulator of residency: traces in, hit ratios out.
//!
//! A [`Memory`] of so many blocks is touched as a trace says, and every touch is a hit, a minor fault or a miss.
//! The engine's own policy is one of the [memories](memories::ALL); the others are what it is measured by.
//! `sim/README.md` says how to try another one.

pub mod made;
pub mod memories;
pub mod trace;

/// What a touch of a block found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// The block was mapped: a pager hears nothing of it.
    Hit,
    /// The block was in memory, but unmapped: a fault without a read.
    Minor,
    /// The block was absent: a fault and a read.
    Miss,
}

/// Memory of a fixed number of blocks.
pub trait Memory {
    /// Touches a block, which is in memory afterwards.
    fn touch(&mut self, block: u32) -> Touch;
}

/// How often what was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All touches.
    pub touches: u64,
    /// Faults without a read.
    pub minor: u64,
    /// Faults with a read.
    pub misses: u64,
}

impl Counts {
    /// Of 1,000 touches, how many found their block absent.
    pub fn misses_in_1000(&self) -> f64 {
        1000.0 * self.misses as f64 / self.touches.max(1) as f64
    }

    /// Of 1,000 touches, how many found their block unmapped.
    pub fn minor_in_1000(&self) -> f64 {
        1000.0 * self.minor as f64 / self.touches.max(1) as f64
    }
}

/// Touches the blocks of a trace one after the other, and counts from number `from` on: the ones before only
/// fill the memory.
pub fn replay(memory: &mut dyn Memory, blocks: &[u32], from: usize) -> Counts {
    let mut counts = Counts::default();
    for (number, &block) in blocks.iter().enumerate() {
        let touch = memory.touch(block);
        if number >= from {
            counts.touches += 1;
            counts.minor += u64::from(touch == Touch::Minor);
            counts.misses += u64::from(touch == Touch::Miss);
        }
    }
    counts
}
