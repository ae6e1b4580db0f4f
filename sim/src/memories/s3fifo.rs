//! S3-FIFO (Yang et al., SOSP 2023): a small queue for new blocks, a main one with counters, and ghosts.

use std::collections::VecDeque;

use crate::{Memory, Touch};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Absent,
    Small,
    Main,
}

pub struct S3Fifo {
    place: Vec<Place>,
    touched: Vec<u8>,
    /// For each absent block, how many had left before it; 0 for never.
    left: Vec<u64>,
    leaving: u64,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    capacity: usize,
}

impl S3Fifo {
    pub fn new(blocks: usize, capacity: usize) -> S3Fifo {
        S3Fifo {
            place: vec![Place::Absent; blocks],
            touched: vec![0; blocks],
            left: vec![0; blocks],
            leaving: 0,
            small: VecDeque::new(),
            main: VecDeque::new(),
            capacity,
        }
    }

    fn small_share(&self) -> usize {
        (self.capacity / 10).max(1)
    }

    fn one_leaves(&mut self) {
        if self.small.len() > self.small_share() || self.main.is_empty() {
            let block = self.small.pop_front().expect("the memory is full");
            let at = block as usize;
            if std::mem::take(&mut self.touched[at]) > 1 {
                self.place[at] = Place::Main;
                self.main.push_back(block);
            } else {
                self.place[at] = Place::Absent;
                self.leaving += 1;
                self.left[at] = self.leaving;
            }
        } else if let Some(block) = self.main.pop_front() {
            let at = block as usize;
            if self.touched[at] > 0 {
                self.touched[at] -= 1;
                self.main.push_back(block);
            } else {
                self.place[at] = Place::Absent;
            }
        }
    }
}

impl Memory for S3Fifo {
    fn touch(&mut self, block: u32) -> Touch {
        let at = block as usize;
        if self.place[at] != Place::Absent {
            self.touched[at] = (self.touched[at] + 1).min(3);
            return Touch::Hit;
        }
        while self.small.len() + self.main.len() >= self.capacity {
            self.one_leaves();
        }
        let ghosts = (self.capacity - self.small_share().min(self.capacity)) as u64;
        let ghost = std::mem::take(&mut self.left[at]);
        self.touched[at] = 0;
        if ghost != 0 && self.leaving - ghost <= ghosts {
            self.place[at] = Place::Main;
            self.main.push_back(block);
        } else {
            self.place[at] = Place::Small;
            self.small.push_back(block);
        }
        Touch::Miss
    }
}
