//! 2Q (Johnson and Shasha, VLDB 1994), the full version: a quarter for new blocks, ghosts for half the memory.

use super::lists::Lists;
use crate::{Memory, Touch};

const IN: usize = 0;
const MAIN: usize = 1;
const GHOSTS: usize = 2;

pub struct TwoQueues {
    lists: Lists,
    capacity: usize,
}

impl TwoQueues {
    pub fn new(blocks: usize, capacity: usize) -> TwoQueues {
        TwoQueues {
            lists: Lists::new(3, blocks),
            capacity,
        }
    }

    fn make_room(&mut self) {
        if self.lists.len(IN) + self.lists.len(MAIN) < self.capacity {
            return;
        }
        if self.lists.len(IN) > self.capacity / 4 || self.lists.len(MAIN) == 0 {
            let block = self.lists.pop(IN).expect("the memory is full");
            self.lists.push(GHOSTS, block);
            if self.lists.len(GHOSTS) > self.capacity / 2 {
                self.lists.pop(GHOSTS);
            }
        } else {
            self.lists.pop(MAIN);
        }
    }
}

impl Memory for TwoQueues {
    fn touch(&mut self, block: u32) -> Touch {
        match self.lists.of(block) {
            Some(IN) => Touch::Hit,
            Some(MAIN) => {
                self.lists.push(MAIN, block);
                Touch::Hit
            }
            Some(_) => {
                self.lists.remove(block);
                self.make_room();
                self.lists.push(MAIN, block);
                Touch::Miss
            }
            None => {
                self.make_room();
                self.lists.push(IN, block);
                Touch::Miss
            }
        }
    }
}
