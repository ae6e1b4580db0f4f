//! read(2) on a descriptor that somebody else owns.
//!
//! Unsafe: the standard library reads only from descriptors that it owns.

use std::io;
use std::os::fd::RawFd;

/// Reads once.
pub(crate) fn read(fd: RawFd, into: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are those of `into`.
    let count = unsafe { libc::read(fd, into.as_mut_ptr().cast(), into.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
