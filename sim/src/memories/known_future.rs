//! What could be had by knowing the trace: the best memory that never changes, and the best of all.

use std::collections::BTreeSet;

use crate::trace::Trace;
use crate::{Memory, Touch};

/// The blocks that are touched most often, and no others.
pub struct BestStatic {
    kept: Vec<bool>,
}

impl BestStatic {
    pub fn new(trace: &Trace, capacity: usize) -> BestStatic {
        let mut counts = vec![0u64; trace.blocks];
        for &block in &trace.touches {
            counts[block as usize] += 1;
        }
        let mut order: Vec<usize> = (0..trace.blocks).collect();
        order.sort_by_key(|block| std::cmp::Reverse(counts[*block]));
        let mut kept = vec![false; trace.blocks];
        for block in order.into_iter().take(capacity) {
            kept[block] = true;
        }
        BestStatic { kept }
    }
}

impl Memory for BestStatic {
    fn touch(&mut self, block: u32) -> Touch {
        if self.kept[block as usize] {
            Touch::Hit
        } else {
            Touch::Miss
        }
    }
}

/// What is touched again last leaves (Belady 1966).
pub struct Belady {
    /// For each touch of the trace, the number of the next one of the same block.
    next: Vec<u32>,
    number: usize,
    /// The blocks in memory by their next touch.
    order: BTreeSet<(u32, u32)>,
    /// The next touch of each block in memory.
    at: Vec<Option<u32>>,
    capacity: usize,
}

impl Belady {
    pub fn new(trace: &Trace, capacity: usize) -> Belady {
        let mut soonest = vec![u32::MAX; trace.blocks];
        let mut next = vec![u32::MAX; trace.touches.len()];
        for (number, &block) in trace.touches.iter().enumerate().rev() {
            next[number] = soonest[block as usize];
            soonest[block as usize] = number as u32;
        }
        Belady {
            next,
            number: 0,
            order: BTreeSet::new(),
            at: vec![None; trace.blocks],
            capacity,
        }
    }
}

impl Memory for Belady {
    fn touch(&mut self, block: u32) -> Touch {
        let next = self.next[self.number];
        self.number += 1;
        let old = self.at[block as usize].replace(next);
        let touch = match old {
            Some(old) => {
                self.order.remove(&(old, block));
                Touch::Hit
            }
            None => {
                if self.order.len() >= self.capacity
                    && let Some((_, last)) = self.order.pop_last()
                {
                    self.at[last as usize] = None;
                }
                Touch::Miss
            }
        };
        self.order.insert((next, block));
        touch
    }
}
