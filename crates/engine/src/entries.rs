//! What is known of each block, one word a block.
//!
//! The words of a large region are far more than a processor's caches and its table of translations hold, and faults
//! come in any order. So there is one word for all that a fault asks of a block, and from 2 MiB of words on they lie
//! on huge pages, where the machine gives some. In ten turns with three arrays of the allocator's, sixteen threads that
//! read 4 GiB on a disk at random in blocks of 4 KiB made 1.03 times as many reads with `fault="threads"` and 1.08
//! times as many with `fault="inline"`, with 0.91 and 0.81 of the processor time for each fault, in a guest of two
//! processors, where a translation that is not at hand takes a walk through two tables.
//!
//! ```text
//!   63      48 47    40 39    32 31                            0
//!    unused     flags    state    what the policy remembers
//! ```
//!
//! Words that nobody has touched cost no memory: they begin as zeros of the kernel, which are an absent block.
//!
//! Unsafe: maps the words of a large region, and hands them out as a slice.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::block::State;
use crate::memory::HUGE;
use crate::policy::Memo;

const STATE: u32 = 32;
const FLAGS: u32 = 40;

/// The words of all blocks of a region.
#[derive(Debug)]
pub(crate) struct Entries(Words);

#[derive(Debug)]
enum Words {
    /// Less than a huge page: not worth a mapping.
    Few(Vec<u64>),
    Many(Mapping),
}

/// A mapping of words.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u64>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and no thread matters to it.
unsafe impl Send for Mapping {}

impl Entries {
    /// All blocks are absent.
    pub(crate) fn new(blocks: usize) -> Entries {
        Entries(if blocks * size_of::<u64>() < HUGE {
            Words::Few(vec![0; blocks])
        } else {
            Words::Many(Mapping::new(blocks))
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.words().len()
    }

    pub(crate) fn state(&self, block: u32) -> State {
        State::from_number((self.words()[block as usize] >> STATE) as u8)
    }

    pub(crate) fn set_state(&mut self, block: u32, state: State) {
        self.replace(block, u64::from(u8::MAX) << STATE, (state as u64) << STATE);
    }

    /// True if any of these flags is set.
    pub(crate) fn has(&self, block: u32, flags: u8) -> bool {
        (self.words()[block as usize] >> FLAGS) as u8 & flags != 0
    }

    pub(crate) fn set(&mut self, block: u32, flags: u8) {
        let flags = u64::from(flags) << FLAGS;
        self.replace(block, flags, flags);
    }

    pub(crate) fn clear(&mut self, block: u32, flags: u8) {
        self.replace(block, u64::from(flags) << FLAGS, 0);
    }

    pub(crate) fn memo(&self, block: u32) -> Memo {
        Memo::from_number(self.words()[block as usize] as u32)
    }

    pub(crate) fn set_memo(&mut self, block: u32, memo: Memo) {
        self.replace(block, u64::from(u32::MAX), u64::from(memo.number()));
    }

    fn replace(&mut self, block: u32, mask: u64, bits: u64) {
        let words: &mut [u64] = match &mut self.0 {
            Words::Few(words) => words,
            Words::Many(words) => words,
        };
        let word = &mut words[block as usize];
        *word = *word & !mask | bits;
    }

    fn words(&self) -> &[u64] {
        match &self.0 {
            Words::Few(words) => words,
            Words::Many(words) => words,
        }
    }
}

impl Mapping {
    /// As with the allocator, a program that can have no memory at all ends here.
    fn new(len: usize) -> Mapping {
        let layout = Layout::array::<u64>(len).expect("a sensible length");
        // SAFETY: a new mapping, of this value alone, at a place that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                layout.size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let Some(start) = NonNull::new(start.cast::<u64>()).filter(|_| start != libc::MAP_FAILED)
        else {
            handle_alloc_error(layout);
        };
        // A kernel without huge pages says no, and nothing is lost but time.
        // SAFETY: the mapping made above.
        unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        Mapping { start, len }
    }
}

impl Deref for Mapping {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        // SAFETY: so many words are mapped there for as long as this value lives, and they are its own.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `deref`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference into it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len * size_of::<u64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_of_one_block_changes_nothing_else_of_it_and_nothing_of_its_neighbours() {
        for blocks in [3, HUGE] {
            let mut entries = Entries::new(blocks);
            assert_eq!(entries.len(), blocks);
            let last = blocks as u32 - 1;
            for block in [0, last - 1, last] {
                assert_eq!(entries.state(block), State::Absent);
                assert_eq!(entries.memo(block), Memo::default());
                assert!(!entries.has(block, u8::MAX));
            }
            entries.set_state(last, State::Poisoned);
            entries.set(last, 0b1010);
            entries.set_memo(last, Memo::from_number(u32::MAX));
            entries.clear(last, 0b0010);
            assert_eq!(entries.state(last), State::Poisoned);
            assert!(entries.has(last, 0b1000) && !entries.has(last, 0b0111));
            assert_eq!(entries.memo(last), Memo::from_number(u32::MAX));
            entries.set_state(last, State::Resident);
            entries.set_memo(last, Memo::from_number(5));
            assert_eq!(entries.state(last), State::Resident);
            assert!(entries.has(last, 0b1000) && !entries.has(last, 0b0111));
            assert_eq!(entries.memo(last), Memo::from_number(5));
            assert_eq!(entries.state(last - 1), State::Absent);
            assert_eq!(entries.memo(last - 1), Memo::default());
            assert!(!entries.has(last - 1, u8::MAX));
        }
    }
}
