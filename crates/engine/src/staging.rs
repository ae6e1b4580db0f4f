//! A buffer of a thread's own, between a store and memory that others may see.
//!
//! Reads land here before they are copied into place, so that nobody sees half a block, and bytes of
//! mapped blocks are copied here before they are written, so that a checksum or a compressed block
//! cannot tear. It is kept hot: one buffer a thread, as large as the largest block it has handled.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

const ALIGNMENT: usize = 4096;

/// Bytes held by the staging buffers of all threads.
pub static STAGED: AtomicU64 = AtomicU64::new(0);

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        STAGED.fetch_sub(self.bytes.len() as u64, Ordering::Relaxed);
    }
}

thread_local! {
    static BUFFER: RefCell<Buffer> = RefCell::new(Buffer::default());
}

/// Lends `len` bytes, aligned to 4096, of this thread's buffer. Their content is whatever was there.
///
/// # Panics
/// If it is borrowed already: a borrower never calls another.
pub fn with<R>(len: usize, use_it: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.bytes.len() < len + ALIGNMENT {
            let before = buffer.bytes.len();
            buffer.bytes = Vec::new();
            buffer.bytes = vec![0; len + ALIGNMENT];
            buffer.start = buffer.bytes.as_ptr().align_offset(ALIGNMENT);
            STAGED.fetch_add((buffer.bytes.len() - before) as u64, Ordering::Relaxed);
        }
        let start = buffer.start;
        use_it(&mut buffer.bytes[start..start + len])
    })
}
