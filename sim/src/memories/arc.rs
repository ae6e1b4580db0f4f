//! ARC (Megiddo and Modha, FAST 2003): recency and frequency share the memory as their ghosts advise.

use super::lists::Lists;
use crate::{Memory, Touch};

const RECENT: usize = 0;
const FREQUENT: usize = 1;
const RECENT_GHOSTS: usize = 2;
const FREQUENT_GHOSTS: usize = 3;

pub struct Arc {
    lists: Lists,
    capacity: usize,
    /// Blocks that the recent ones should have.
    target: usize,
}

impl Arc {
    pub fn new(blocks: usize, capacity: usize) -> Arc {
        Arc {
            lists: Lists::new(4, blocks),
            capacity,
            target: 0,
        }
    }

    fn replace(&mut self, for_frequent_ghost: bool) {
        let recent = self.lists.len(RECENT);
        let recent_gives =
            recent > 0 && (recent > self.target || (for_frequent_ghost && recent == self.target));
        let (from, ghosts) = if recent_gives || self.lists.len(FREQUENT) == 0 {
            (RECENT, RECENT_GHOSTS)
        } else {
            (FREQUENT, FREQUENT_GHOSTS)
        };
        if let Some(block) = self.lists.pop(from) {
            self.lists.push(ghosts, block);
        }
    }
}

impl Memory for Arc {
    fn touch(&mut self, block: u32) -> Touch {
        let len = |lists: &Lists, list| lists.len(list);
        match self.lists.of(block) {
            Some(RECENT | FREQUENT) => {
                self.lists.push(FREQUENT, block);
                return Touch::Hit;
            }
            Some(RECENT_GHOSTS) => {
                let by = len(&self.lists, FREQUENT_GHOSTS) / len(&self.lists, RECENT_GHOSTS).max(1);
                self.target = (self.target + by.max(1)).min(self.capacity);
                self.replace(false);
                self.lists.push(FREQUENT, block);
            }
            Some(_) => {
                let by = len(&self.lists, RECENT_GHOSTS) / len(&self.lists, FREQUENT_GHOSTS).max(1);
                self.target = self.target.saturating_sub(by.max(1));
                self.replace(true);
                self.lists.push(FREQUENT, block);
            }
            None => {
                let recent = len(&self.lists, RECENT) + len(&self.lists, RECENT_GHOSTS);
                let all = recent + len(&self.lists, FREQUENT) + len(&self.lists, FREQUENT_GHOSTS);
                if recent >= self.capacity {
                    if len(&self.lists, RECENT) < self.capacity {
                        self.lists.pop(RECENT_GHOSTS);
                        self.replace(false);
                    } else {
                        self.lists.pop(RECENT);
                    }
                } else if all >= self.capacity {
                    if all >= 2 * self.capacity {
                        self.lists.pop(FREQUENT_GHOSTS);
                    }
                    self.replace(false);
                }
                self.lists.push(RECENT, block);
            }
        }
        Touch::Miss
    }
}
