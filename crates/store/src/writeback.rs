//! Keeps the page cache small behind buffered writes.
//!
//! What a region writes through the page cache stands there a second time. It is written out and dropped in
//! two generations: while the younger one gathers, the kernel writes the older one; when the younger is
//! full, the older is waited for and dropped. So at most twice [`GENERATION`] stays, and the disk is never
//! idle because of a wait.
//!
//! Unsafe: sync_file_range(2), which std does not have.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use crate::pagecache;

/// Bytes of one generation.
pub(crate) const GENERATION: u64 = 8 << 20;

type Ranges = Vec<(u64, u64)>;

#[derive(Debug, Default)]
struct Generations {
    younger: Ranges,
    younger_bytes: u64,
    older: Ranges,
    // sync_file_range hands out an error of the kernel's write-back once; the next sync must still tell it.
    error: Option<i32>,
}

/// The ranges of one file that were written through the page cache and not yet dropped from it.
#[derive(Debug, Default)]
pub(crate) struct WriteBack {
    generations: Mutex<Generations>,
}

impl WriteBack {
    /// Notes a buffered write; now and then writes older ones out.
    pub(crate) fn wrote(&self, file: &File, offset: u64, len: u64) {
        let mut g = self
            .generations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match g.younger.last_mut() {
            Some(last) if last.1 == offset => last.1 += len,
            _ => g.younger.push((offset, offset + len)),
        }
        g.younger_bytes += len;
        if g.younger_bytes < GENERATION {
            return;
        }
        g.younger_bytes = 0;
        let younger = std::mem::take(&mut g.younger);
        let older = std::mem::replace(&mut g.older, younger.clone());
        drop(g);
        for &(start, end) in &younger {
            sync_range(file, start, end, libc::SYNC_FILE_RANGE_WRITE).unwrap_or(());
        }
        let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        for (start, end) in older {
            if let Err(error) = sync_range(file, start, end, all) {
                let mut g = self
                    .generations
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                g.error
                    .get_or_insert(error.raw_os_error().unwrap_or(libc::EIO));
            }
            pagecache::forget(file, start, end - start);
        }
    }

    /// Makes everything durable, and drops what was written through the page cache.
    pub(crate) fn sync(&self, file: &File) -> io::Result<()> {
        let (written, earlier) = {
            let mut g = self
                .generations
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            g.younger_bytes = 0;
            let mut written = std::mem::take(&mut g.younger);
            written.append(&mut g.older);
            (written, g.error.take())
        };
        let result = file.sync_data();
        if result.is_ok() && earlier.is_none() {
            for (start, end) in written {
                pagecache::forget(file, start, end - start);
            }
        }
        // After an error the page cache may be the only place that still has what was written: whoever reads
        // it from there can write it again.
        match earlier {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => result,
        }
    }
}

fn sync_range(file: &File, start: u64, end: u64, flags: libc::c_uint) -> io::Result<()> {
    let (start, len) = (start as libc::off64_t, (end - start) as libc::off64_t);
    // SAFETY: takes a descriptor, which `file` keeps open, and numbers.
    if unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, flags) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Not every file can (ESPIPE, ENOSYS in sandboxes): then it is written by the kernel's own time and by sync.
    if matches!(
        error.raw_os_error(),
        Some(libc::ESPIPE | libc::ENOSYS | libc::EINVAL)
    ) {
        return Ok(());
    }
    Err(error)
}
