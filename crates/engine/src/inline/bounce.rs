//! Buffers between a file and memory that others may see, which are there before a handler needs them.
//!
//! The address space of all of them is taken at once; memory they take when they are first used, as much as
//! the blocks that pass through them are long. The lowest free one is taken, so that few are hot.
//!
//! Unsafe: maps memory and hands out slices of it, each to one borrower.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::body::COPY_LIMIT;
use crate::error::Error;

const BUFFERS: usize = 64;

/// The buffers.
pub(super) struct Bounce {
    base: usize,
    /// A bit for each buffer that is lent.
    lent: AtomicU64,
    /// The longest use of each, bytes.
    used: [AtomicUsize; BUFFERS],
}

/// A buffer, until it is dropped.
pub(super) struct Lent<'a> {
    bounce: &'a Bounce,
    index: usize,
    len: usize,
}

impl Bounce {
    pub(super) fn new() -> Result<Bounce, Error> {
        // SAFETY: a new mapping, of this value alone; it is never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BUFFERS * COPY_LIMIT,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Error::last_os(
                "mmap of the handler's buffers",
                "see ulimit -v",
            ));
        }
        // A buffer costs what is used of it, not 2 MiB at the first touch.
        // SAFETY: the mapping made above.
        unsafe { libc::madvise(base, BUFFERS * COPY_LIMIT, libc::MADV_NOHUGEPAGE) };
        Ok(Bounce {
            base: base as usize,
            lent: AtomicU64::new(0),
            used: [const { AtomicUsize::new(0) }; BUFFERS],
        })
    }

    /// A buffer of `len` bytes, aligned to a page; `None` if all are lent. `grown` is told of memory that is
    /// used for the first time, in bytes: it stays.
    pub(super) fn take(&self, len: usize, grown: impl FnOnce(u64)) -> Option<Lent<'_>> {
        debug_assert!(len <= COPY_LIMIT);
        let mut lent = self.lent.load(Ordering::Relaxed);
        loop {
            let index = lent.trailing_ones() as usize;
            if index >= BUFFERS {
                return None;
            }
            match self.lent.compare_exchange_weak(
                lent,
                lent | 1 << index,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    let before = self.used[index].fetch_max(len, Ordering::Relaxed);
                    if len > before {
                        grown((len - before) as u64);
                    }
                    return Some(Lent {
                        bounce: self,
                        index,
                        len,
                    });
                }
                Err(now) => lent = now,
            }
        }
    }
}

impl Lent<'_> {
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        let start = self.bounce.base + self.index * COPY_LIMIT;
        // SAFETY: the bit in `lent` is set by this value alone, so nobody else has the buffer, and it is
        // as long as a block may be.
        unsafe { std::slice::from_raw_parts_mut(start as *mut u8, self.len) }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.bounce
            .lent
            .fetch_and(!(1 << self.index), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_lent_to_one_at_a_time_and_comes_back() {
        let bounce = Bounce::new().unwrap();
        let mut all: Vec<_> = (0..BUFFERS)
            .map(|_| bounce.take(4096, |_| {}).unwrap())
            .collect();
        assert!(bounce.take(4096, |_| {}).is_none());
        for (index, lent) in all.iter_mut().enumerate() {
            lent.bytes().fill(index as u8);
        }
        for (index, lent) in all.iter_mut().enumerate() {
            assert!(lent.bytes().iter().all(|byte| *byte == index as u8));
        }
        drop(all.swap_remove(5));
        let mut grown = 0;
        assert!(bounce.take(1 << 20, |bytes| grown = bytes).is_some());
        assert_eq!(grown, (1 << 20) - 4096, "what is used more than before");
    }
}
