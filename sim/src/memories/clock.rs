//! CLOCK: first in, first out, with another round for what was touched since: the kernel's way, roughly.

use super::lists::Lists;
use crate::{Memory, Touch};

pub struct Clock {
    lists: Lists,
    touched: Vec<bool>,
    capacity: usize,
}

impl Clock {
    pub fn new(blocks: usize, capacity: usize) -> Clock {
        Clock {
            lists: Lists::new(1, blocks),
            touched: vec![false; blocks],
            capacity,
        }
    }
}

impl Memory for Clock {
    fn touch(&mut self, block: u32) -> Touch {
        if self.lists.of(block).is_some() {
            self.touched[block as usize] = true;
            return Touch::Hit;
        }
        while self.lists.len(0) >= self.capacity {
            let oldest = self.lists.pop(0).expect("the memory is full");
            if std::mem::take(&mut self.touched[oldest as usize]) {
                self.lists.push(0, oldest);
            }
        }
        self.lists.push(0, block);
        Touch::Miss
    }
}
