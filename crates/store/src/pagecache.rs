//! What the kernel's page cache holds of a file, asked and used without causing I/O.
//!
//! Unsafe: cachestat(2) and preadv2(2), which std does not have.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// The same number on every architecture; since Linux 6.5.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Remembers which of the kernel's offers this file cannot take.
#[derive(Debug, Default)]
pub(crate) struct PageCache {
    no_cachestat: AtomicBool,
    no_dontcache: AtomicBool,
}

impl PageCache {
    /// True if every page of the range is in the page cache; false if one is not, or if nobody can say.
    ///
    /// RWF_NOWAIT alone would not do: on a miss it starts a read into the page cache that nobody wants,
    /// because the block is then read a second time, past the cache.
    pub(crate) fn holds(&self, file: &File, offset: u64, len: u64, page: u64) -> bool {
        let pages = (offset + len).div_ceil(page) - offset / page;
        self.pages(file, offset, len)
            .is_some_and(|held| held >= pages)
    }

    /// How many pages of a range are in the page cache; `None` if nobody can say.
    pub(crate) fn pages(&self, file: &File, offset: u64, len: u64) -> Option<u64> {
        if len == 0 || self.no_cachestat.load(Ordering::Relaxed) {
            return None;
        }
        let range = CachestatRange { off: offset, len };
        let mut stat = Cachestat::default();
        // SAFETY: both structs have the kernel's layout and live until the call returns.
        let rc = unsafe {
            libc::syscall(
                SYS_CACHESTAT,
                file.as_raw_fd(),
                &raw const range,
                &raw mut stat,
                0,
            )
        };
        if rc != 0 {
            // ENOSYS before 6.5; EPERM where the file is not ours to ask about; hugetlbfs has none.
            self.no_cachestat.store(true, Ordering::Relaxed);
            return None;
        }
        Some(stat.cache)
    }

    /// Reads without leaving pages behind that were not there before. Returns the bytes read, 0 at the end.
    pub(crate) fn read_through(
        &self,
        file: &File,
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        if !self.no_dontcache.load(Ordering::Relaxed) {
            match preadv2(file, offset, buf, libc::RWF_DONTCACHE) {
                // Before 6.14, and for file systems that do not offer it.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS)
                    ) =>
                {
                    self.no_dontcache.store(true, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        let done = preadv2(file, offset, buf, 0)?;
        forget(file, offset, done as u64);
        Ok(done)
    }
}

/// Reads from the page cache alone: an error of kind `WouldBlock` where it would have to wait.
pub(crate) fn read_nowait(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    preadv2(file, offset, buf, libc::RWF_NOWAIT)
}

/// Tells the kernel that our reads say nothing about the next ones: no read-ahead of its own.
pub(crate) fn no_read_ahead(file: &File) {
    advise(file, 0, 0, libc::POSIX_FADV_RANDOM);
}

/// Begins to read a range into the page cache.
pub(crate) fn fetch(file: &File, offset: u64, len: u64) {
    advise(file, offset, len, libc::POSIX_FADV_WILLNEED);
}

/// Drops clean pages of a range from the page cache (whole pages that nobody has mapped).
pub(crate) fn forget(file: &File, offset: u64, len: u64) {
    if len > 0 {
        advise(file, offset, len, libc::POSIX_FADV_DONTNEED);
    }
}

fn advise(file: &File, offset: u64, len: u64, advice: libc::c_int) {
    // Advice only: that it is refused (pipes, odd file systems) changes no result.
    // SAFETY: takes a descriptor, which `file` keeps open, and numbers.
    unsafe {
        libc::posix_fadvise(
            file.as_raw_fd(),
            offset as libc::off_t,
            len as libc::off_t,
            advice,
        )
    };
}

fn preadv2(file: &File, offset: u64, buf: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    let offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    loop {
        // SAFETY: `iov` names `buf`, which is borrowed for writing until the call returns.
        let n = unsafe { libc::preadv2(file.as_raw_fd(), &raw const iov, 1, offset, flags) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
