//! The one place that calls ioctl(2).

use std::os::fd::RawFd;

/// Calls ioctl(2) and gives back its errno, 0 for success.
///
/// # Safety
/// `T` must be the struct that `request` takes, and the call itself must be one that the caller may make.
pub(crate) unsafe fn call<T>(fd: RawFd, request: u64, argument: &mut T) -> i32 {
    // SAFETY: the caller promises that `argument` is what `request` reads and writes; it lives through
    // the call.
    let result = unsafe { libc::ioctl(fd, request as _, std::ptr::from_mut(argument)) };
    if result < 0 { last_errno() } else { 0 }
}

/// The errno that the last failed call of this thread left.
pub(crate) fn last_errno() -> i32 {
    // SAFETY: the C library's errno is always readable by its own thread.
    unsafe { *libc::__errno_location() }
}
