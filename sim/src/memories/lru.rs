//! The least recently used leaves.

use super::lists::Lists;
use crate::{Memory, Touch};

pub struct Lru {
    lists: Lists,
    capacity: usize,
}

impl Lru {
    pub fn new(blocks: usize, capacity: usize) -> Lru {
        Lru {
            lists: Lists::new(1, blocks),
            capacity,
        }
    }
}

impl Memory for Lru {
    fn touch(&mut self, block: u32) -> Touch {
        let there = self.lists.of(block).is_some();
        if !there && self.lists.len(0) >= self.capacity {
            self.lists.pop(0);
        }
        self.lists.push(0, block);
        if there { Touch::Hit } else { Touch::Miss }
    }
}
