//! An array's memory: where its blocks are, which of them have changed, and copying them.
//!
//! Unsafe: copies out of our own tracked memory while the program may write to it.
//!
//! Blocks are laid so that they begin where pages of memory begin: the *image* of an array is its bytes
//! with a lead of zeros before them.
//!
//! ```text
//!   memory      |page        |page        |page        |
//!                    |array .......................|
//!   image       |lead|                             |
//!   blocks      |0           |1           |2       |
//! ```

use std::ops::Range;
use std::sync::Arc;

use userfault_engine::tracked::{Ledger, Tracked, mapped, read_foreign};

use crate::error::Error;
use crate::stream;

/// How an array's changes are found and its blocks copied.
pub enum Way {
    /// All of it is copied at every cut.
    Copied,
    /// The kernel notes writes; what was written is drained, and the rest copied at the cut.
    Silent(Ledger),
    /// Protected at the cut; a block is saved before its first write. The number of its group.
    Guarded(usize),
}

/// One array.
pub struct Source {
    /// Address of its first byte.
    pub start: usize,
    /// Its bytes, at least one.
    pub nbytes: usize,
    /// Zeros before it in its image, bytes.
    pub lead: usize,
    /// Bytes of a block.
    pub block: usize,
    /// How it is followed.
    pub way: Way,
    /// Our own memory, if it lies in such: it cannot vanish, and is read directly.
    pub own: Option<Arc<Tracked>>,
    /// For messages.
    pub name: String,
    /// The way in words, for whoever asks how the array is followed.
    pub why: &'static str,
}

impl Source {
    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        (self.lead + self.nbytes).div_ceil(self.block)
    }

    /// Bytes of some blocks of the image, with the lead.
    pub fn len_of(&self, blocks: Range<usize>) -> usize {
        (blocks.end * self.block).min(self.lead + self.nbytes) - blocks.start * self.block
    }

    /// The memory of some blocks: address, bytes, and bytes of lead before it.
    pub fn memory_of(&self, blocks: Range<usize>) -> (usize, usize, usize) {
        let lead = self.lead.saturating_sub(blocks.start * self.block);
        let from = (blocks.start * self.block).max(self.lead) - self.lead;
        let to = (blocks.end * self.block).min(self.lead + self.nbytes) - self.lead;
        (self.start + from, to - from, lead)
    }

    /// The blocks that some bytes of memory lie in.
    pub fn blocks_at(&self, address: usize, len: usize) -> Range<usize> {
        let base = self.start - self.lead;
        let from = address.max(self.start);
        let to = (address + len).min(self.start + self.nbytes);
        if from >= to {
            return 0..0;
        }
        (from - base) / self.block..(to - base).div_ceil(self.block)
    }

    /// The blocks that pages of a ledger lie in.
    pub fn blocks_of_pages(
        &self,
        ledger: &Ledger,
        pages: Range<usize>,
        page: usize,
    ) -> Range<usize> {
        self.blocks_at(ledger.start() + pages.start * page, pages.len() * page)
    }

    /// The pages of the ledger that hold some blocks.
    pub fn pages_of(&self, ledger: &Ledger, blocks: Range<usize>, page: usize) -> Range<usize> {
        let (address, len, _) = self.memory_of(blocks);
        let from = address.max(ledger.start());
        let to = (address + len).min(ledger.start() + ledger.len());
        if from >= to {
            return 0..0;
        }
        (from - ledger.start()) / page..(to - ledger.start()).div_ceil(page)
    }

    /// The blocks that are not tracked whole: ragged ends, which are copied at every cut.
    pub fn edges(&self) -> Vec<Range<usize>> {
        let Way::Silent(ledger) = &self.way else {
            return Vec::new();
        };
        let all = self.start..self.start + self.nbytes;
        let (first, last) = (ledger.start(), ledger.start() + ledger.len());
        [
            self.blocks_at(all.start, first - all.start),
            self.blocks_at(last, all.end - last),
        ]
        .into_iter()
        .filter(|blocks| !blocks.is_empty())
        .collect()
    }

    /// Copies our own memory at `address`. Bytes that threads write meanwhile come out old or new.
    pub fn copy_own(&self, address: usize, into: &mut [u8]) {
        let own = self.own.as_ref().expect("our own memory");
        assert!(address >= own.start() && address + into.len() <= own.start() + own.len());
        // SAFETY: in bounds of memory that `own` keeps mapped; racing stores of the program can only
        // change bytes of the copy, which is what the caller is told.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, into.as_mut_ptr(), into.len())
        }
    }

    /// Copies ranges of our own memory, address and bytes each, one behind the other, past the caches: see [`stream`].
    pub fn stream_own(&self, ranges: &[(usize, usize)], into: &mut [u8]) {
        let own = self.own.as_ref().expect("our own memory");
        for &(address, len) in ranges {
            assert!(address >= own.start() && address + len <= own.start() + own.len());
        }
        // SAFETY: in bounds of memory that `own` keeps mapped, and that `into` is no part of.
        unsafe { stream::copy(ranges, into) }
    }

    /// Copies ranges of memory that somebody else owns, one behind the other.
    pub fn copy_foreign(&self, ranges: &[(usize, usize)], into: &mut [u8]) -> Result<(), Error> {
        read_foreign(ranges, into).map_err(|error| {
            Error::Memory(format!(
                "array {:?} could not be read: {error}; its memory was unmapped, moved or given back while it \
                 was being saved",
                self.name
            ))
        })
    }

    /// Fails if our own memory was unmapped by the program.
    pub fn still_there(&self) -> Result<(), Error> {
        if mapped(self.start, self.nbytes) {
            return Ok(());
        }
        Err(Error::Memory(format!(
            "the memory of array {:?} was unmapped by the program",
            self.name
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(start: usize, nbytes: usize, block: usize) -> Source {
        Source {
            start,
            nbytes,
            lead: start % block,
            block,
            way: Way::Copied,
            own: None,
            name: "a".into(),
            why: "copied",
        }
    }

    #[test]
    fn blocks_begin_at_pages_and_cover_the_array_exactly() {
        for block in [4096, 65_536] {
            for start in [
                1 << 20,
                (1 << 20) + 16,
                (1 << 20) + 4095,
                (1 << 20) + 70_000,
            ] {
                for nbytes in [1, 15, 4080, 4096, 4097, 200_001] {
                    let source = source(start, nbytes, block);
                    let mut at = start;
                    for number in 0..source.blocks() {
                        let (address, len, lead) = source.memory_of(number..number + 1);
                        assert_eq!(address, at);
                        assert_eq!(lead + len, source.len_of(number..number + 1));
                        assert_eq!((address - lead) % block, 0);
                        assert_eq!(source.blocks_at(address, len), number..number + 1);
                        at += len;
                    }
                    assert_eq!(at, start + nbytes);
                    let (address, len, lead) = source.memory_of(0..source.blocks());
                    assert_eq!((address, len, lead), (start, nbytes, start % block));
                }
            }
        }
    }
}
