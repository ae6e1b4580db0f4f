//! SIEVE (Zhang et al., NSDI 2024): a queue whose hand goes from old to young and takes what was not touched.

use super::lists::Lists;
use crate::{Memory, Touch};

pub struct Sieve {
    lists: Lists,
    touched: Vec<bool>,
    hand: Option<u32>,
    capacity: usize,
}

impl Sieve {
    pub fn new(blocks: usize, capacity: usize) -> Sieve {
        Sieve {
            lists: Lists::new(1, blocks),
            touched: vec![false; blocks],
            hand: None,
            capacity,
        }
    }
}

impl Memory for Sieve {
    fn touch(&mut self, block: u32) -> Touch {
        if self.lists.of(block).is_some() {
            self.touched[block as usize] = true;
            return Touch::Hit;
        }
        if self.lists.len(0) >= self.capacity {
            let oldest = |lists: &Lists| lists.first(0).expect("the memory is full");
            let mut at = self.hand.unwrap_or_else(|| oldest(&self.lists));
            while std::mem::take(&mut self.touched[at as usize]) {
                at = self.lists.after(at).unwrap_or_else(|| oldest(&self.lists));
            }
            self.hand = self.lists.after(at);
            self.lists.remove(at);
        }
        self.lists.push(0, block);
        Touch::Miss
    }
}
