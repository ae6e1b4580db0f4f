//! Where the bytes of a served process lie in its memory, as the events tell it.
//!
//! A layout is a set of segments: so many bytes at an address are so many bytes of a piece (one item of what
//! `serve` was given). REMAP moves segments, UNMAP drops them; nothing here asks the kernel.
//!
//! # Events of several threads come out of order
//! The kernel changes the memory first and queues the event afterwards, without a lock in between. Two threads
//! that change their memory at once can therefore be told of in the wrong order, and these rules make up for
//! that. They all end when the memory is at rest, that is, when a fill has succeeded: the kernel refuses every
//! fill from before a change until its last event has been read.
//!
//! * *Beneath.* One thread unmaps a place, another is given the same place by mremap(), and REMAP is read
//!   first. The place is then still occupied, which cannot be: what was there lies *beneath*, and the next
//!   UNMAP or REMAP that names the place is about that.
//! * *Vacated.* A move is told by REMAP and then by UNMAP of the old place, and another thread may have got that
//!   place in between: an UNMAP that names exactly what REMAP has just emptied is not about who is there now.
//! * *Lately.* A fork copies a mapping, another thread unmaps or moves it, and UNMAP or REMAP is read before
//!   FORK. The child still has it: so it gets, where its layout is empty, what the parent lost since the memory
//!   was last at rest. That costs nothing if it is wrong: no page is missing where nothing is mapped.

use std::collections::BTreeMap;
use std::ops::Range;

/// What has gone is kept until the memory is known to be at rest; from so many on that is asked for.
const MOST_GONE: usize = 64;

/// Bytes of a piece, at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment<T> {
    pub(crate) at: usize,
    pub(crate) len: usize,
    pub(crate) piece: T,
    /// Offset in the piece, bytes.
    pub(crate) offset: usize,
}

impl<T: Clone> Segment<T> {
    pub(crate) fn end(&self) -> usize {
        self.at + self.len
    }

    /// The part of it that lies in `range`.
    fn within(&self, range: &Range<usize>) -> Option<Segment<T>> {
        let start = self.at.max(range.start);
        let end = self.end().min(range.end);
        (start < end).then(|| Segment {
            at: start,
            len: end - start,
            piece: self.piece.clone(),
            offset: self.offset + (start - self.at),
        })
    }

    /// The parts of it that do not.
    fn without(&self, range: &Range<usize>) -> impl Iterator<Item = Segment<T>> {
        let before = self.within(&(self.at..range.start.max(self.at)));
        let after = self.within(&(range.end.min(self.end())..self.end()));
        before.into_iter().chain(after)
    }
}

/// The segments of one process.
#[derive(Debug, Clone)]
pub(crate) struct Layout<T> {
    /// What is at an address, by its start; never overlapping.
    top: BTreeMap<usize, Segment<T>>,
    /// What was there before, and has not been told to be gone.
    beneath: Vec<Segment<T>>,
    /// What has gone since the memory was last at rest.
    lately: Vec<Segment<T>>,
    /// Places that REMAP has emptied, whose UNMAP is still to come.
    vacated: Vec<Range<usize>>,
}

impl<T: Clone> Layout<T> {
    pub(crate) fn new() -> Layout<T> {
        Layout {
            top: BTreeMap::new(),
            beneath: Vec::new(),
            lately: Vec::new(),
            vacated: Vec::new(),
        }
    }

    /// Puts a segment in its place; whatever is there now lies beneath.
    pub(crate) fn put(&mut self, segment: Segment<T>) {
        let range = segment.at..segment.end();
        let covered = self.cut_top(&range);
        self.beneath.extend(covered);
        self.top.insert(segment.at, segment);
    }

    /// The segment at an address.
    pub(crate) fn find(&self, address: usize) -> Option<&Segment<T>> {
        let (_, segment) = self.top.range(..=address).next_back()?;
        (address < segment.end()).then_some(segment)
    }

    /// All segments.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Segment<T>> {
        self.top.values()
    }

    /// The parts of segments that lie in `range`, those on top only.
    pub(crate) fn in_range(&self, range: Range<usize>) -> Vec<Segment<T>> {
        let first = self
            .top
            .range(..range.start)
            .next_back()
            .map_or(range.start, |(at, _)| *at);
        self.top
            .range(first..range.end)
            .filter_map(|(_, segment)| segment.within(&range))
            .collect()
    }

    /// The memory is at rest: no event is on its way.
    pub(crate) fn at_rest(&mut self) {
        self.beneath.clear();
        self.lately.clear();
        self.vacated.clear();
    }

    /// True if so much has gone since the memory was last known to be at rest that it is worth asking.
    pub(crate) fn wants_rest(&self) -> bool {
        self.beneath.len() + self.lately.len() + self.vacated.len() > MOST_GONE
    }

    /// munmap() took a range away.
    pub(crate) fn unmap(&mut self, range: Range<usize>) {
        if let Some(index) = self.vacated.iter().position(|place| *place == range) {
            self.vacated.swap_remove(index);
            return;
        }
        let gone = self.take(&range);
        self.lately.extend(gone);
    }

    /// mremap() moved a range to `to`. The old place may stay mapped, and is empty then.
    pub(crate) fn remap(&mut self, range: Range<usize>, to: usize) {
        self.vacated.push(range.clone());
        for segment in self.take(&range) {
            let at = to + (segment.at - range.start);
            self.lately.push(segment.clone());
            self.put(Segment { at, ..segment });
        }
    }

    /// What a child has that was forked at some time since the memory was last at rest, each piece
    /// replaced by the child's own.
    pub(crate) fn fork<U: Clone>(&self, mut piece: impl FnMut(&T) -> U) -> Layout<U> {
        let mut child = Layout::new();
        for segment in self
            .lately
            .iter()
            .chain(&self.beneath)
            .chain(self.top.values())
        {
            child.put(Segment {
                at: segment.at,
                len: segment.len,
                piece: piece(&segment.piece),
                offset: segment.offset,
            });
        }
        child.beneath.clear();
        child
    }

    /// Takes out what lies in a range: where something lies beneath, that, and what is on top stays.
    fn take(&mut self, range: &Range<usize>) -> Vec<Segment<T>> {
        let mut taken = Vec::new();
        let mut left = vec![range.clone()];
        for segment in std::mem::take(&mut self.beneath) {
            // The oldest come first, and each place is left once.
            let parts: Vec<_> = left
                .iter()
                .filter_map(|part| segment.within(part))
                .collect();
            let mut rest = vec![segment];
            for part in parts {
                let hole = part.at..part.end();
                rest = rest.iter().flat_map(|one| one.without(&hole)).collect();
                left = left
                    .iter()
                    .flat_map(|one| {
                        [
                            one.start..hole.start.max(one.start).min(one.end),
                            hole.end.min(one.end).max(one.start)..one.end,
                        ]
                    })
                    .filter(|one| !one.is_empty())
                    .collect();
                taken.push(part);
            }
            self.beneath.extend(rest);
        }
        for part in left {
            taken.extend(self.cut_top(&part));
        }
        taken
    }

    /// Takes out what lies on top in a range.
    fn cut_top(&mut self, range: &Range<usize>) -> Vec<Segment<T>> {
        let starts: Vec<usize> = self
            .in_range(range.clone())
            .iter()
            .map(|part| {
                *self
                    .top
                    .range(..=part.at)
                    .next_back()
                    .expect("a part of it")
                    .0
            })
            .collect();
        let mut cut = Vec::new();
        for start in starts {
            let segment = self.top.remove(&start).expect("just found");
            cut.extend(segment.within(range));
            for rest in segment.without(range) {
                self.top.insert(rest.at, rest);
            }
        }
        cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(items: &[(usize, usize, char)]) -> Layout<char> {
        let mut layout = Layout::new();
        for &(at, len, piece) in items {
            layout.put(Segment {
                at,
                len,
                piece,
                offset: 0,
            });
        }
        layout
    }

    fn at(layout: &Layout<char>, address: usize) -> Option<(char, usize)> {
        let segment = layout.find(address)?;
        Some((segment.piece, segment.offset + (address - segment.at)))
    }

    #[test]
    fn what_is_unmapped_is_gone_and_its_neighbours_stay() {
        let mut layout = layout(&[(100, 100, 'a'), (200, 50, 'b')]);
        layout.unmap(150..210);
        assert_eq!(at(&layout, 149), Some(('a', 49)));
        assert_eq!(at(&layout, 150), None);
        assert_eq!(at(&layout, 209), None);
        assert_eq!(at(&layout, 210), Some(('b', 10)));
        assert_eq!(at(&layout, 250), None);
        assert_eq!(at(&layout, 99), None);
    }

    #[test]
    fn what_is_moved_is_found_at_its_new_place_only() {
        let mut layout = layout(&[(100, 100, 'a')]);
        layout.remap(120..140, 1000);
        assert_eq!(at(&layout, 119), Some(('a', 19)));
        assert_eq!(at(&layout, 120), None);
        assert_eq!(at(&layout, 140), Some(('a', 40)));
        assert_eq!(at(&layout, 1000), Some(('a', 20)));
        assert_eq!(at(&layout, 1019), Some(('a', 39)));
        // The kernel tells of the old place separately.
        layout.unmap(120..140);
        assert_eq!(at(&layout, 1010), Some(('a', 30)));
    }

    #[test]
    fn a_move_that_is_told_before_the_unmapping_of_its_target_survives_it() {
        let mut layout = layout(&[(100, 100, 'a'), (500, 100, 'b')]);
        layout.remap(500..600, 150);
        layout.unmap(100..200);
        assert_eq!(at(&layout, 120), None);
        assert_eq!(at(&layout, 170), Some(('b', 20)));
        assert_eq!(at(&layout, 249), Some(('b', 99)));
        layout.unmap(150..250);
        assert_eq!(at(&layout, 170), None);
    }

    #[test]
    fn two_moves_that_are_told_in_the_wrong_order_end_where_the_kernel_put_them() {
        // One thread moved a away, then another moved b to where a had been.
        let mut layout = layout(&[(100, 100, 'a'), (500, 100, 'b')]);
        layout.remap(500..600, 100);
        layout.unmap(500..600);
        layout.remap(100..200, 900);
        layout.unmap(100..200);
        assert_eq!(at(&layout, 110), Some(('b', 10)));
        assert_eq!(at(&layout, 910), Some(('a', 10)));
    }

    #[test]
    fn a_child_has_what_its_parent_lost_while_it_was_forked() {
        let mut layout = layout(&[(100, 100, 'a'), (500, 100, 'b')]);
        layout.unmap(100..200);
        layout.at_rest();
        layout.unmap(500..550);
        layout.remap(550..600, 100);
        let child = layout.fork(|piece| *piece);
        assert_eq!(at(&child, 110), Some(('b', 60)), "moved before the fork");
        assert_eq!(at(&child, 510), Some(('b', 10)), "unmapped after the fork");
        assert_eq!(at(&child, 560), Some(('b', 60)), "moved after the fork");
        assert_eq!(at(&child, 160), None, "long gone");
    }

    #[test]
    fn what_has_gone_is_not_kept_for_ever() {
        let mut layout = layout(&[(100, 10, 'a')]);
        let mut place = 100;
        while !layout.wants_rest() {
            layout.remap(place..place + 10, place + 10);
            place += 10;
        }
        assert!(place < 100 + 10 * (MOST_GONE + 2));
        layout.at_rest();
        assert!(!layout.wants_rest());
        assert_eq!(at(&layout, place + 3), Some(('a', 3)));
    }

    #[test]
    fn agrees_with_a_map_of_bytes_when_events_come_in_order() {
        let mut seed = 88_172_645_463_325_252u64;
        let mut random = |end: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 20) as usize % end
        };
        for _ in 0..300 {
            let mut layout = layout(&[(0, 40, 'a'), (40, 30, 'b')]);
            let mut bytes: Vec<Option<(char, usize)>> = (0..200)
                .map(|address| match address {
                    0..40 => Some(('a', address)),
                    40..70 => Some(('b', address - 40)),
                    _ => None,
                })
                .collect();
            for _ in 0..20 {
                let (start, len) = (random(150), 1 + random(20));
                if random(2) == 0 {
                    layout.unmap(start..start + len);
                    bytes[start..start + len].fill(None);
                } else {
                    let to = random(180);
                    if to < start + len && start < to + len {
                        continue;
                    }
                    layout.unmap(to..to + len);
                    bytes[to..to + len].fill(None);
                    layout.remap(start..start + len, to);
                    layout.unmap(start..start + len);
                    for index in 0..len {
                        bytes[to + index] = bytes[start + index].take();
                    }
                }
            }
            let found: Vec<_> = (0..200).map(|address| at(&layout, address)).collect();
            assert_eq!(found, bytes);
        }
    }
}
