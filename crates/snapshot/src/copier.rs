//! Copying blocks out of memory into batches, which the saver hashes and writes.

use std::ops::Range;

use crate::entry::{hash, is_zero};
use crate::error::Error;
use crate::source::Source;
use crate::staging::Chunk;
use crate::stream;

/// Consecutive blocks of one array in a batch.
pub struct Item {
    pub data: usize,
    pub blocks: Range<usize>,
    /// Where their bytes begin in the buffer.
    pub at: usize,
}

/// Memory that a batch lies in.
pub enum Buffer {
    /// Staging.
    Chunk(Chunk),
    /// The saver's own.
    Own(Vec<u8>),
}

impl Buffer {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Buffer::Chunk(chunk) => chunk,
            Buffer::Own(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Buffer::Chunk(chunk) => chunk,
            Buffer::Own(bytes) => bytes,
        }
    }
}

/// Copied blocks.
pub struct Batch {
    pub buffer: Buffer,
    pub items: Vec<Item>,
    /// For each block in order its hash, `None` for zeros; empty if nobody has hashed them yet.
    pub sums: Vec<Option<u64>>,
}

/// The hash of a block; `None` for zeros.
pub fn sum(content: &[u8]) -> Option<u64> {
    (!is_zero(content)).then(|| hash(content))
}

/// Fills batches with blocks.
pub struct Copier<'a> {
    sources: &'a [Source],
    /// The next buffer; `None`: give up.
    next: &'a mut dyn FnMut() -> Option<Buffer>,
    /// Takes a full batch.
    full: &'a mut dyn FnMut(Batch),
    buffer: Option<Buffer>,
    used: usize,
    items: Vec<Item>,
    /// Ranges of one array that are still to be copied, and where in the buffer: foreign ones, for which the kernel
    /// is asked, and those that go past the caches, where many at a time take less.
    ranges: Vec<(usize, usize)>,
    ranges_at: usize,
    ranges_end: usize,
    ranges_of: usize,
    /// Past the caches: nobody reads it soon.
    past_caches: bool,
    hashing: bool,
}

impl<'a> Copier<'a> {
    pub fn new(
        sources: &'a [Source],
        next: &'a mut dyn FnMut() -> Option<Buffer>,
        full: &'a mut dyn FnMut(Batch),
    ) -> Copier<'a> {
        Copier {
            sources,
            next,
            full,
            buffer: None,
            used: 0,
            items: Vec::new(),
            ranges: Vec::new(),
            ranges_at: 0,
            ranges_end: 0,
            ranges_of: 0,
            past_caches: false,
            hashing: false,
        }
    }

    /// From here on batches come with the hashes of their blocks, or do not.
    pub fn hashing(&mut self, hashing: bool) {
        self.hashing = hashing;
    }

    /// From here on our own memory is copied past the caches, or not.
    pub fn past_caches(&mut self, past: bool) {
        self.past_caches = past;
    }

    /// Copies blocks of an array; some of it may be put off until [`Copier::catch_up`] or [`Copier::send`].
    /// `Ok(false)`: there is no buffer any more, the save was given up.
    pub fn copy(&mut self, data: usize, blocks: Range<usize>) -> Result<bool, Error> {
        let source = &self.sources[data];
        let mut first = blocks.start;
        while first < blocks.end {
            if self.buffer.is_none() {
                self.buffer = (self.next)();
                let Some(buffer) = &self.buffer else {
                    return Ok(false);
                };
                debug_assert!(buffer.bytes().len() >= source.block);
            }
            let room = self.buffer.as_ref().expect("just taken").bytes().len() - self.used;
            let fits = (room / source.block).min(blocks.end - first);
            if fits == 0 {
                self.send()?;
                continue;
            }
            let part = first..first + fits;
            first = part.end;
            let (address, len, lead) = source.memory_of(part.clone());
            let at = self.used;
            if source.own.is_some() && !self.past_caches {
                let buffer = self.buffer.as_mut().expect("just taken").bytes_mut();
                buffer[at..at + lead].fill(0);
                source.copy_own(address, &mut buffer[at + lead..at + lead + len]);
            } else {
                // Whose bytes do not go right behind those of the others is copied by itself.
                if self.ranges_of != data || self.ranges_end != at + lead || lead > 0 {
                    self.catch_up()?;
                }
                if lead > 0 {
                    self.buffer.as_mut().expect("just taken").bytes_mut()[at..at + lead].fill(0);
                }
                if self.ranges.is_empty() {
                    (self.ranges_at, self.ranges_of) = (at + lead, data);
                }
                self.ranges.push((address, len));
                self.ranges_end = at + lead + len;
            }
            self.used += lead + len;
            self.items.push(Item {
                data,
                blocks: part,
                at,
            });
        }
        Ok(true)
    }

    /// Copies what has been put off.
    pub fn catch_up(&mut self) -> Result<(), Error> {
        if self.ranges.is_empty() {
            return Ok(());
        }
        let len: usize = self.ranges.iter().map(|range| range.1).sum();
        let buffer = self.buffer.as_mut().expect("ranges lie in it").bytes_mut();
        let into = &mut buffer[self.ranges_at..self.ranges_at + len];
        let source = &self.sources[self.ranges_of];
        let copied = if source.own.is_some() {
            source.stream_own(&self.ranges, into);
            Ok(())
        } else {
            source.copy_foreign(&self.ranges, into)
        };
        self.ranges.clear();
        copied
    }

    /// Hands over what there is.
    pub fn send(&mut self) -> Result<(), Error> {
        self.catch_up()?;
        self.used = 0;
        if let Some(buffer) = self.buffer.take()
            && !self.items.is_empty()
        {
            stream::done();
            let items = std::mem::take(&mut self.items);
            let mut sums = Vec::new();
            if self.hashing {
                for item in &items {
                    let source = &self.sources[item.data];
                    let mut at = item.at;
                    for block in item.blocks.clone() {
                        let len = source.len_of(block..block + 1);
                        sums.push(sum(&buffer.bytes()[at..at + len]));
                        at += len;
                    }
                }
            }
            (self.full)(Batch {
                buffer,
                items,
                sums,
            });
        }
        Ok(())
    }
}

/// An array by number, and blocks of it.
pub type Piece = (usize, Vec<Range<usize>>);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Way;
    use userfault_engine::Pages;
    use userfault_engine::tracked::Tracked;

    fn source(start: usize, own: Option<std::sync::Arc<Tracked>>) -> Source {
        Source {
            start,
            nbytes: 8 * 4096,
            lead: 0,
            block: 4096,
            way: Way::Copied,
            own,
            name: "a".into(),
            why: "copied",
        }
    }

    #[test]
    fn arrays_that_take_turns_come_out_each_as_it_is() {
        let mut foreign = vec![7u8; 9 * 4096];
        let at = (foreign.as_ptr() as usize).next_multiple_of(4096) - foreign.as_ptr() as usize;
        foreign[at + 4096..at + 2 * 4096].fill(9);
        let own = Tracked::new(8 * 4096, Pages::Small).unwrap();
        let sources = [
            source(foreign.as_ptr() as usize + at, None),
            source(own.start(), Some(own.clone())),
        ];
        let mut next = || Some(Buffer::Own(vec![1; 16 * 4096]));
        let mut batches = Vec::new();
        let mut full = |batch| batches.push(batch);
        let mut copier = Copier::new(&sources, &mut next, &mut full);
        let tasks = [
            (0, 0..1),
            (1, 0..2),
            (0, 1..2),
            (0, 2..3),
            (1, 2..3),
            (0, 1..3),
        ];
        for (data, blocks) in &tasks {
            copier.past_caches(blocks.len() == 1);
            assert!(copier.copy(*data, blocks.clone()).unwrap());
        }
        copier.send().unwrap();
        drop(copier);
        assert_eq!(batches.len(), 1);
        for (item, (data, blocks)) in batches[0].items.iter().zip(&tasks) {
            assert_eq!((item.data, &item.blocks), (*data, blocks));
            for (number, block) in blocks.clone().enumerate() {
                let from = item.at + number * 4096;
                let expected = match (data, block) {
                    (1, _) => 0,
                    (_, 1) => 9,
                    _ => 7,
                };
                let bytes = &batches[0].buffer.bytes()[from..from + 4096];
                assert!(bytes.iter().all(|byte| *byte == expected), "{data} {block}");
            }
        }
    }
}
