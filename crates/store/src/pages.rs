//! A set of pages, by page number: which differ from their home.

use std::iter;
use std::ops::Range;

/// A set of pages, by page number.
#[derive(Debug)]
pub struct PageSet {
    words: Vec<u64>,
    pages: usize,
    count: usize,
}

impl PageSet {
    /// An empty set of at most `pages` pages. Costs no memory until it is written.
    pub fn new(pages: usize) -> PageSet {
        PageSet {
            words: vec![0; pages.div_ceil(64)],
            pages,
            count: 0,
        }
    }

    /// One past the largest page number that fits.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Number of pages in the set.
    pub fn count(&self) -> usize {
        self.count
    }

    /// True if `page` is in the set.
    pub fn contains(&self, page: usize) -> bool {
        self.words[page / 64] >> (page % 64) & 1 == 1
    }

    /// Adds all pages of `range`.
    pub fn insert(&mut self, range: Range<usize>) {
        self.for_masks(range, |word, mask| {
            let added = (mask & !*word).count_ones() as isize;
            *word |= mask;
            added
        });
    }

    /// Removes all pages of `range`.
    pub fn remove(&mut self, range: Range<usize>) {
        self.for_masks(range, |word, mask| {
            let removed = (mask & *word).count_ones() as isize;
            *word &= !mask;
            -removed
        });
    }

    /// True if any page of `range` is in the set.
    pub fn any(&self, range: Range<usize>) -> bool {
        self.next(range.start, range.end).is_some()
    }

    /// The first page of the set in `from..end`.
    pub fn next(&self, from: usize, end: usize) -> Option<usize> {
        let mut page = from;
        while page < end {
            let word = self.words[page / 64] >> (page % 64);
            if word != 0 {
                let found = page + word.trailing_zeros() as usize;
                return (found < end).then_some(found);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// The runs of pages of the set in `range`, in order.
    pub fn runs(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let mut page = range.start;
        while let Some(start) = self.next(page, range.end) {
            let mut end = start + 1;
            while end < range.end && self.contains(end) {
                end += 1;
            }
            runs.push(start..end);
            page = end;
        }
        runs
    }

    fn for_masks(&mut self, range: Range<usize>, mut change: impl FnMut(&mut u64, u64) -> isize) {
        for (word, mask) in masks(range) {
            let change = change(&mut self.words[word], mask);
            self.count = self
                .count
                .checked_add_signed(change)
                .expect("count of pages");
        }
    }
}

/// A range of pages as words of 64 bits, and the bits of each.
pub(crate) fn masks(mut pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    iter::from_fn(move || {
        let (word, bit) = (pages.start / 64, pages.start % 64);
        let len = (64 - bit).min(pages.len());
        pages.start += len;
        (len > 0).then(|| (word, (u64::MAX >> (64 - len)) << bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A small deterministic generator: a failing run prints its seed.
    fn random(seed: &mut u64) -> usize {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        (*seed >> 16) as usize
    }

    #[test]
    fn agrees_with_a_plain_set() {
        for seed in 1..200u64 {
            let mut state = seed;
            let pages = 1 + random(&mut state) % 300;
            let mut map = PageSet::new(pages);
            let mut set = BTreeSet::new();
            for _ in 0..50 {
                let a = random(&mut state) % (pages + 1);
                let b = random(&mut state) % (pages + 1);
                let range = a.min(b)..a.max(b);
                if random(&mut state).is_multiple_of(2) {
                    map.insert(range.clone());
                    set.extend(range);
                } else {
                    map.remove(range.clone());
                    set.retain(|page| !range.contains(page));
                }
                assert_eq!(map.count(), set.len(), "seed {seed}");
                let from_runs: Vec<usize> = map.runs(0..pages).into_iter().flatten().collect();
                assert_eq!(
                    from_runs,
                    set.iter().copied().collect::<Vec<_>>(),
                    "seed {seed}"
                );
                assert_eq!(
                    map.any(a.min(b)..a.max(b)),
                    set.range(a.min(b)..a.max(b)).next().is_some()
                );
            }
        }
    }
}
