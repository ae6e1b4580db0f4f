//! Which pages of an overlay have moved to scratch. It is asked without a lock, for a signal handler asks too.
//!
//! One bit a page. Whoever moves a page has written it before it sets the bit; nobody reads a page while it
//! moves, for the engine has one owner for a block at a time.
//!
//! Unsafe: takes memory that the allocator zeroed for atomic words, so that a set of pages costs nothing before it
//! is written.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::pages::masks;

const BITS: usize = 64;

/// The set of pages, by page number.
pub(crate) struct Moved {
    words: Box<[AtomicU64]>,
}

impl Moved {
    /// An empty set of at most `pages` pages.
    pub(crate) fn new(pages: usize) -> Moved {
        const { assert!(align_of::<u64>() == align_of::<AtomicU64>()) };
        let zeros = vec![0_u64; pages.div_ceil(BITS)].into_boxed_slice();
        // SAFETY: the two have the same size, alignment and values, and the box is this function's own.
        let words = unsafe { Box::from_raw(Box::into_raw(zeros) as *mut [AtomicU64]) };
        Moved { words }
    }

    /// Number of pages in the set.
    pub(crate) fn count(&self) -> usize {
        let ones = |word: &AtomicU64| word.load(Ordering::Relaxed).count_ones() as usize;
        self.words.iter().map(ones).sum()
    }

    /// Adds all pages of a range.
    pub(crate) fn insert(&self, pages: Range<usize>) {
        for (index, mask) in masks(pages) {
            self.words[index].fetch_or(mask, Ordering::Release);
        }
    }

    /// Removes all pages of a range.
    pub(crate) fn remove(&self, pages: Range<usize>) {
        for (index, mask) in masks(pages) {
            self.words[index].fetch_and(!mask, Ordering::Release);
        }
    }

    /// The run that begins at the first page of a range that is not empty: whether its pages are in the set, and
    /// where it ends.
    pub(crate) fn run(&self, pages: Range<usize>) -> (bool, usize) {
        let within = |page: usize| {
            let word = self.words[page / BITS].load(Ordering::Acquire);
            word >> (page % BITS)
        };
        let there = within(pages.start) & 1 == 1;
        let mut page = pages.start;
        while page < pages.end {
            let word = within(page);
            let same = if there {
                word.trailing_ones()
            } else {
                word.trailing_zeros()
            };
            // The bits that the shift brought in say nothing.
            let left = BITS - page % BITS;
            if (same as usize) < left {
                return (there, (page + same as usize).min(pages.end));
            }
            page += left;
        }
        (there, pages.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_agrees_with_a_vector_of_booleans() {
        const PAGES: usize = 400;
        let moved = Moved::new(PAGES);
        let mut model = [false; PAGES];
        let mut random = 1_u64;
        let mut next = |below: usize| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) as usize % below
        };
        for turn in 0..3000 {
            let start = next(PAGES);
            let pages = start..start + next(PAGES - start + 1);
            if turn % 2 == 0 {
                moved.insert(pages.clone());
                model[pages].fill(true);
            } else {
                moved.remove(pages.clone());
                model[pages].fill(false);
            }
            assert_eq!(moved.count(), model.iter().filter(|there| **there).count());
            let start = next(PAGES);
            let end = start + 1 + next(PAGES - start);
            let there = model[start];
            let until = (start..end)
                .find(|page| model[*page] != there)
                .unwrap_or(end);
            assert_eq!(moved.run(start..end), (there, until), "{start}..{end}");
        }
    }
}
