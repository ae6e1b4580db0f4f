//! The ioctls that answer a fault, one method each: exact results, no retry.
//!
//! Every fill goes page by page and stops at the first page that refuses. If that is the first one, the
//! errno is the reason and nothing was done. If it is a later one, the errno is EAGAIN, `done` says how far
//! it came, and only a call for the rest learns the reason. A failure wakes nobody, EEXIST included.

use crate::abi::*;
use crate::{Outcome, Uffd, ioctl};

fn range(start: usize, len: usize) -> uffdio_range {
    uffdio_range {
        start: start as u64,
        len: len as u64,
    }
}

impl Uffd {
    /// UFFDIO_COPY: fills `len` bytes at `dst` from `src`, each page at once and whole.
    ///
    /// # Safety
    /// `src` must be `len` bytes that nobody writes meanwhile, and must not lie in memory that the calling
    /// thread itself has to fill (the call would wait for itself). Nobody may hold a reference to the
    /// absent bytes at `dst` that expects them unchanged.
    pub unsafe fn copy(&self, dst: usize, src: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_copy {
            dst: dst as u64,
            src: src as u64,
            len: len as u64,
            mode,
            copy: 0,
        };
        // SAFETY: the struct is the one of this request; the caller vouches for both ranges.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_COPY, &mut argument) };
        Outcome::of_field(errno, argument.copy)
    }

    /// UFFDIO_ZEROPAGE: fills with zeros. Not on hugetlb.
    ///
    /// # Safety
    /// As for the destination of [`Uffd::copy`].
    pub unsafe fn zeropage(&self, start: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_zeropage {
            range: range(start, len),
            mode,
            zeropage: 0,
        };
        // SAFETY: the struct is the one of this request; the caller vouches for the range.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_ZEROPAGE, &mut argument) };
        Outcome::of_field(errno, argument.zeropage)
    }

    /// UFFDIO_CONTINUE: maps what the page cache holds.
    ///
    /// # Safety
    /// The page cache must hold the whole pages by now: whoever touches them sees what is there. Over a
    /// poison marker this lifts the poison.
    pub unsafe fn continue_(&self, start: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_continue {
            range: range(start, len),
            mode,
            mapped: 0,
        };
        // SAFETY: the struct is the one of this request; the caller vouches for the range.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_CONTINUE, &mut argument) };
        Outcome::of_field(errno, argument.mapped)
    }

    /// True if UFFDIO_CONTINUE can map write-protected (Linux 6.4). No feature bit says so: it is asked to do it
    /// where nothing is registered, and an older kernel refuses the mode before it looks for the memory.
    pub fn continue_protects(&self) -> bool {
        let here = 0u8;
        // SAFETY: sysconf takes one integer.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let start = (&raw const here).addr() / page * page;
        // SAFETY: the stack is registered with no userfaultfd, so nothing is mapped.
        let outcome = unsafe { self.continue_(start, page, UFFDIO_CONTINUE_MODE_WP) };
        outcome.errno != libc::EINVAL
    }

    /// UFFDIO_POISON: makes every touch of absent pages raise SIGBUS.
    ///
    /// # Safety
    /// Whoever touches the range must be prepared for SIGBUS.
    pub unsafe fn poison(&self, start: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_poison {
            range: range(start, len),
            mode,
            updated: 0,
        };
        // SAFETY: the struct is the one of this request; the caller vouches for the range.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_POISON, &mut argument) };
        Outcome::of_field(errno, argument.updated)
    }

    /// UFFDIO_MOVE: fills by moving the pages at `src`, which are absent afterwards. Anonymous memory of
    /// the process that made the userfaultfd only.
    ///
    /// # Safety
    /// Nobody may hold a reference to the bytes at `src`; the destination as for [`Uffd::copy`].
    pub unsafe fn r#move(&self, dst: usize, src: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_move {
            dst: dst as u64,
            src: src as u64,
            len: len as u64,
            mode,
            r#move: 0,
        };
        // SAFETY: the struct is the one of this request; the caller vouches for both ranges.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_MOVE, &mut argument) };
        Outcome::of_field(errno, argument.r#move)
    }

    /// UFFDIO_WRITEPROTECT: protects with UFFDIO_WRITEPROTECT_MODE_WP, unprotects (and wakes) without.
    ///
    /// It changes no byte. It spans several mappings, and one that fails in a later mapping has done its
    /// work in the earlier ones.
    pub fn writeprotect(&self, start: usize, len: usize, mode: u64) -> Outcome {
        let mut argument = uffdio_writeprotect {
            range: range(start, len),
            mode,
        };
        // SAFETY: the struct is the one of this request, and the call reads and writes no other memory.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_WRITEPROTECT, &mut argument) };
        Outcome::of_length(errno, len)
    }

    /// UFFDIO_WAKE: wakes the threads of this userfaultfd that sleep on the range. A thread that is woken
    /// too early asks again.
    pub fn wake(&self, start: usize, len: usize) -> Outcome {
        let mut argument = range(start, len);
        // SAFETY: the struct is the one of this request, and the call reads and writes no other memory.
        let errno = unsafe { ioctl::call(self.raw_fd(), UFFDIO_WAKE, &mut argument) };
        Outcome::of_length(errno, len)
    }
}
