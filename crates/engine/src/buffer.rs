//! Memory for one buffer, whole pages of its own.
//!
//! Not from the allocator: it keeps what a thread gives back in that thread's arena, once a few large pieces have
//! come and gone, so that 20 MiB of buffers that were no longer counted were still there under a limit of 32.
//!
//! Unsafe: maps memory, hands out its bytes, and unmaps it.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// What direct I/O wants, and what a mapping begins and ends with.
const ALIGNMENT: usize = 4096;

/// Some bytes, aligned to 4096; zeros at first.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and no thread matters to it.
unsafe impl Send for Buffer {}

impl Buffer {
    /// At least `len` bytes. As with the allocator, a program that can have no memory at all ends here.
    pub(crate) fn new(len: usize) -> Buffer {
        let len = len.max(1).next_multiple_of(ALIGNMENT);
        // SAFETY: a new mapping, of this value alone, at a place that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let Some(start) = NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED)
        else {
            handle_alloc_error(Layout::from_size_align(len, ALIGNMENT).expect("a sensible length"));
        };
        // What is counted is what is used, not a huge page around it.
        // SAFETY: the mapping made above.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        Buffer { start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped there for as long as this value lives, and they are its own.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference into it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_is_as_long_as_asked_for_and_keeps_what_is_written() {
        for len in [1, 4096, 5000, 1 << 20] {
            let mut buffer = Buffer::new(len);
            assert!(buffer.len() >= len && buffer.len() < len + ALIGNMENT);
            assert_eq!(buffer.as_ptr().align_offset(ALIGNMENT), 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer[len - 1] = 7;
            assert_eq!(buffer[len - 1], 7);
        }
    }
}
