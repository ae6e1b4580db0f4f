//! Second chance without access bits: the oldest is unmapped and rests in a part of the memory; a touch there is
//! a minor fault, and makes it young again.

use super::lists::Lists;
use crate::{Memory, Touch};

const MAPPED: usize = 0;
const RESTING: usize = 1;

pub struct Resting {
    lists: Lists,
    capacity: usize,
    share: usize,
}

impl Resting {
    /// `percent` of the memory may rest.
    pub fn new(blocks: usize, capacity: usize, percent: usize) -> Resting {
        Resting {
            lists: Lists::new(2, blocks),
            capacity,
            share: capacity * percent / 100,
        }
    }
}

impl Memory for Resting {
    fn touch(&mut self, block: u32) -> Touch {
        let touch = match self.lists.of(block) {
            Some(MAPPED) => return Touch::Hit,
            Some(_) => Touch::Minor,
            None => Touch::Miss,
        };
        while touch == Touch::Miss
            && self.lists.len(MAPPED) + self.lists.len(RESTING) >= self.capacity
        {
            if self.lists.len(RESTING) > self.share || self.lists.len(MAPPED) == 0 {
                self.lists.pop(RESTING);
            } else if let Some(oldest) = self.lists.pop(MAPPED) {
                self.lists.push(RESTING, oldest);
            }
        }
        self.lists.push(MAPPED, block);
        touch
    }
}
