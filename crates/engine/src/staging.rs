//! Buffers between a store and memory that others may see.
//!
//! Reads land here before they are copied into place, so that nobody sees half a block, and bytes of
//! mapped blocks are copied here before they are written, so that a checksum or a compressed block
//! cannot tear. What a program gives to `pwrite` passes through here, too.
//!
//! Buffers are memory: they are charged to the process's limit from when they are made until they are gone.
//! A few are kept on a shelf when they are not lent; the one that came back last, which is still in the
//! processor's cache, goes out first. A call of a store that does not come back keeps its buffer.
//!
//! Lock: the shelf is a leaf.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::lock::Mutex;

/// The part of the limit that may lie on the shelf, one in so many, and its bounds in bytes.
const SHELF_SHARE: u64 = 16;
const SHELF: (u64, u64) = (256 << 10, 16 << 20);

/// The buffers of an engine.
#[derive(Default)]
pub(crate) struct Staging {
    shelf: Mutex<Vec<Buffer>>,
    /// Bytes of all buffers, lent or not.
    bytes: AtomicU64,
}

impl Staging {
    /// Bytes of all buffers, lent or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts memory that the handlers of SIGBUS use as buffers of their own from now on.
    pub(crate) fn grown(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn take(&self, len: usize) -> Option<Buffer> {
        let mut shelf = self.shelf.lock();
        let fits = |buffer: &Buffer| buffer.len() >= len;
        let last = shelf.iter().rposition(fits)?;
        Some(shelf.remove(last))
    }

    /// Puts a buffer on the shelf, if there is place for it. `place` is asked only if the least would not do.
    fn put(&self, buffer: Buffer, place: impl FnOnce() -> u64) -> Option<Buffer> {
        let mut shelf = self.shelf.lock();
        let there: usize = shelf.iter().map(|buffer| buffer.len()).sum();
        let all = (there + buffer.len()) as u64;
        if all > SHELF.0 && all > place() {
            return Some(buffer);
        }
        shelf.push(buffer);
        None
    }

    /// Takes off the shelf what there is no place for any more, the oldest first.
    fn take_beyond(&self, place: u64) -> Vec<Buffer> {
        let mut shelf = self.shelf.lock();
        let mut beyond = Vec::new();
        let mut there: u64 = shelf.iter().map(|buffer| buffer.len() as u64).sum();
        while there > place {
            let oldest = shelf.remove(0);
            there -= oldest.len() as u64;
            beyond.push(oldest);
        }
        beyond
    }
}

/// Bytes that may lie on the shelf.
fn place(engine: &Engine) -> u64 {
    (engine.pool.figures().limit / SHELF_SHARE).clamp(SHELF.0, SHELF.1)
}

fn let_go(engine: &Engine, buffer: Buffer) {
    let bytes = buffer.len() as u64;
    drop(buffer);
    engine.staging.bytes.fetch_sub(bytes, Ordering::Relaxed);
    engine.pool.discharge(bytes);
}

/// To be called when the limit has become smaller.
pub(crate) fn shrink(engine: &Engine) {
    // What is charged raises a limit that is too small for it: each buffer that goes may leave less place.
    loop {
        let beyond = engine.staging.take_beyond(place(engine));
        if beyond.is_empty() {
            return;
        }
        for buffer in beyond {
            let_go(engine, buffer);
        }
    }
}

/// A buffer that is lent. Its content is whatever was there.
pub(crate) struct Lent<'a> {
    engine: &'a Engine,
    buffer: Option<Buffer>,
    len: usize,
}

/// Lends `len` bytes, aligned to 4096.
pub(crate) fn lend(engine: &Engine, len: usize) -> Lent<'_> {
    let buffer = engine.staging.take(len).unwrap_or_else(|| {
        let buffer = Buffer::new(len);
        let bytes = buffer.len() as u64;
        engine.staging.bytes.fetch_add(bytes, Ordering::Relaxed);
        engine.pool.charge(bytes);
        buffer
    });
    Lent {
        engine,
        buffer: Some(buffer),
        len,
    }
}

/// Lends `len` bytes for the time of a call.
pub(crate) fn with<R>(engine: &Engine, len: usize, use_it: impl FnOnce(&mut [u8]) -> R) -> R {
    use_it(&mut lend(engine, len))
}

impl Deref for Lent<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let buffer = self.buffer.as_ref().expect("lent");
        &buffer[..self.len]
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        let buffer = self.buffer.as_mut().expect("lent");
        &mut buffer[..self.len]
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let engine = self.engine;
        let buffer = self.buffer.take().expect("lent");
        if let Some(gone) = engine.staging.put(buffer, || place(engine)) {
            let_go(engine, gone);
        }
    }
}
