//! What one call did.

/// The exact result of one ioctl: the bytes done, and the errno (0: success).
///
/// The kernel keeps both apart, and so does this type: a fill of eight pages that meets a page already
/// there after three of them answers `done = 3 pages, errno = EAGAIN`, and only a second call for the
/// rest learns the real reason. Never negative: where the kernel stores `-errno` in its result field, or
/// does not touch the field, nothing was done and `done` is 0.
///
/// `errno = EAGAIN` with `done = 0` therefore has one meaning only: an event (fork, mremap, munmap,
/// madvise) is unread, and every fill is refused until it is read.
///
/// The calls without a result field (UNREGISTER, WAKE, WRITEPROTECT) report their whole length when they
/// succeed and 0 when they fail. REGISTER has a mask instead of a length: see
/// [`Uffd::register`](crate::Uffd::register).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fill that failed leaves a thread asleep"]
pub struct Outcome {
    /// Bytes done; for REGISTER the mask of ioctls that the range takes.
    pub done: i64,
    /// 0, or the errno of the call.
    pub errno: i32,
}

impl Outcome {
    /// True if the call did all that it was asked to.
    pub fn is_ok(self) -> bool {
        self.errno == 0
    }

    /// True if the call was refused because an event is unread.
    pub fn is_event_pending(self) -> bool {
        self.errno == libc::EAGAIN && self.done == 0
    }

    /// The errno as a `Result`, for callers to whom anything but success is an error.
    pub fn ok(self) -> std::io::Result<i64> {
        match self.errno {
            0 => Ok(self.done),
            errno => Err(std::io::Error::from_raw_os_error(errno)),
        }
    }

    /// From a call with a result field; `field` was 0 before the call.
    pub(crate) fn of_field(errno: i32, field: i64) -> Outcome {
        Outcome {
            done: field.max(0),
            errno,
        }
    }

    /// From a call that has no result field.
    pub(crate) fn of_length(errno: i32, len: usize) -> Outcome {
        Outcome {
            done: if errno == 0 { len as i64 } else { 0 },
            errno,
        }
    }
}
