//! Which memory is under user-space paging.

use crate::abi::{UFFDIO_REGISTER, UFFDIO_UNREGISTER, uffdio_range, uffdio_register};
use crate::{Outcome, Uffd, ioctl};

impl Uffd {
    /// Puts `len` bytes at `start` under user-space paging, for the faults that `mode` names.
    ///
    /// On success `done` is the mask of ioctls that the kernel offers for the range (bit numbers
    /// `_UFFDIO_COPY` ...). It speaks of the page size only: shared memory is offered MOVE and then
    /// refuses it. Registering again with a subset of the modes changes nothing; with any other set the
    /// new modes *replace* the old ones, and page table entries stay as they are.
    ///
    /// Registering changes no byte, but from here on a touch of a missing page waits until somebody
    /// answers it.
    pub fn register(&self, start: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_register {
            range: uffdio_range {
                start: start as u64,
                len: len as u64,
            },
            mode,
            ioctls: 0,
        };
        // SAFETY: the struct is the one of this request, and the call reads and writes no other memory.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_REGISTER, &mut argument) };
        Outcome {
            done: if errno == 0 {
                argument.ioctls as i64
            } else {
                0
            },
            errno,
        }
    }

    /// Takes `len` bytes at `start` out of user-space paging.
    ///
    /// Sleepers are woken only in ranges that were registered MISSING: wake the others yourself. The
    /// kernel fills what is missing with zeros from here on.
    ///
    /// # Safety
    /// Nobody may rely on the absent bytes of the range any more: a later touch reads zeros.
    pub unsafe fn unregister(&self, start: usize, len: usize) -> Outcome {
        let mut argument = uffdio_range {
            start: start as u64,
            len: len as u64,
        };
        // SAFETY: the struct is the one of this request; the caller vouches for the range.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_UNREGISTER, &mut argument) };
        Outcome::of_length(errno, len)
    }
}
