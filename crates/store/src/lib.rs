//! Where a block lives when it is not in memory.
//!
//! A [`Store`] is a flat, byte-addressed home. The engine reads whole blocks from it and writes dirty
//! pages back to it; it never asks a store anything else. Imports point down only: this crate knows
//! nothing of blocks, faults or regions.

//!
//! | store | its bytes |
//! |---|---|
//! | [`FileStore`] | a local file or block device, of any length |
//! | [`MemoryStore`] | a vector of this process, for tests and examples |
//! | [`ZeroStore`] | zeros, as /dev/zero has them |
//! | [`FaultyStore`] | another store's, spoiled by plan: it fails, delays, shortens and hangs |
//!
//! Lock order: a store's own locks are leaves. No store calls back, and none holds a lock during I/O.

use std::io;
use std::os::fd::BorrowedFd;

mod direct;
mod faulty;
mod file;
mod lock;
mod memory;
mod moved;
mod overlay;
mod pagecache;
mod pages;
mod plan;
mod writeback;
mod zero;

pub use faulty::{CallRecord, FaultyStore};
pub use file::{FileMode, FileOptions, FileStore, OpenError};
pub use lock::Locking;
pub use memory::MemoryStore;
pub use overlay::OverlayStore;
pub use pages::PageSet;
pub use plan::{Action, Call, Rule};
pub use zero::ZeroStore;

/// The number of an error, also of one that a store has put into its own words; 0 if it has none.
pub fn errno(error: &io::Error) -> i32 {
    let mut within = error
        .get_ref()
        .map(|inner| inner as &(dyn std::error::Error + 'static));
    let mut number = error.raw_os_error();
    while let (None, Some(error)) = (number, within) {
        number = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error);
        within = error.source();
    }
    number.unwrap_or(0)
}

/// The home of a region's bytes.
///
/// A store may be slow, fail, fail once or write half. What the engine promises then:
///
/// * slow: only the threads that touch the block wait; no lock is held during a call.
/// * a failed read: nothing of the buffer is shown to anybody; the read is tried again or the block is
///   poisoned, as the region's policy says.
/// * a failed or short write: the pages stay dirty in memory and are written again later, whole.
///   A store must report a short write as an error; the engine assumes nothing about what was stored.
/// * an error that carries no errno counts as `EIO`; its text goes into the message.
/// * a call that never returns: its buffer is not reused until it does, and what it was to write stays dirty.
///   Whoever waits for it is told after a while, and nobody else's bytes wait for it.
pub trait Store: Send + Sync {
    /// Fills `buf` with the bytes at `offset`. Bytes past the end of the store read as zero.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Like [`Store::read`], but only if that needs no waiting; `Ok(false)` says that nothing was read.
    fn read_now(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }

    /// A descriptor from which all of a range can be read, and the offset there, by a direct read into memory that is
    /// aligned to a page; for callers who have the kernel read it while they do something else. `None` where that
    /// is not what [`Store::read`] would do, or worse than that: where some of the range is in the page cache.
    /// Whatever goes wrong with such a read, [`Store::read`] says what it is.
    fn direct(&self, _offset: u64, _len: usize) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    /// The file that a range is in, and the offset there, where that file is in memory itself and as long as it was:
    /// for callers who map it and have the kernel copy from there instead of calling [`Store::read`], and to there, if
    /// the store is [`Store::writable`], instead of [`Store::write_leaving`]. `None` anywhere else. They must not touch
    /// the mapping themselves, for somebody may cut the file short; whatever goes wrong, `read` and `write` say what it is.
    fn in_memory(&self, _offset: u64, _len: usize) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    /// Says that bytes were written through a mapping of [`Store::in_memory`].
    fn was_written(&self) {}

    /// Says that a range will be read soon, in small parts, so that the store may fetch it at one go. Returns at
    /// once; true if [`Store::was_read`] is to follow.
    fn will_read(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    /// Says that a range that was announced has been read: what was fetched for it may go.
    fn was_read(&self, _offset: u64, _len: u64) {}

    /// Like [`Store::read`], in a signal handler: it may make system calls and wait for a disk, but must not
    /// allocate, lock, use a thread-local, or panic. False says that the bytes have to be read by
    /// [`Store::read`], which will also say what is wrong.
    fn read_bare(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Writes all of `data` at `offset`. The engine never writes past [`Store::len`]; a store refuses it
    /// (`ENOSPC`) and never grows.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// As [`Store::write`], for bytes that leave memory with this call or soon after. A store may keep them
    /// in a cache of its own, where they stand once: they may well be asked for again.
    fn write_leaving(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data)
    }

    /// Gives back the space of a range, which reads as zeros afterwards.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Returns when everything written before is durable.
    ///
    /// After an error nobody can say which of the writes since the last successful call are stored: the
    /// kernel forgets the pages that it could not write. They have to be written again.
    fn sync(&self) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// True if the store holds no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block size in bytes that the store likes best; 0 if it does not care.
    fn preferred_block(&self) -> usize {
        0
    }

    /// True if several reads may be under way at once.
    fn concurrent_reads(&self) -> bool {
        true
    }

    /// True if [`Store::write`] can succeed.
    fn writable(&self) -> bool;

    /// True if a failed read is worth trying again: the store is behind a network.
    fn remote(&self) -> bool {
        false
    }

    /// Names the store in messages, for instance by its path.
    fn name(&self) -> String;
}
