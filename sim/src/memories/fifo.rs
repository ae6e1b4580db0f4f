//! First in, first out: umap's way.

use super::lists::Lists;
use crate::{Memory, Touch};

pub struct Fifo {
    lists: Lists,
    capacity: usize,
}

impl Fifo {
    pub fn new(blocks: usize, capacity: usize) -> Fifo {
        Fifo {
            lists: Lists::new(1, blocks),
            capacity,
        }
    }
}

impl Memory for Fifo {
    fn touch(&mut self, block: u32) -> Touch {
        if self.lists.of(block).is_some() {
            return Touch::Hit;
        }
        if self.lists.len(0) >= self.capacity {
            self.lists.pop(0);
        }
        self.lists.push(0, block);
        Touch::Miss
    }
}
