//! Faults and events, read in batches into a buffer of the caller.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::abi::*;
use crate::{Uffd, ioctl};

/// What happened to the memory.
#[derive(Debug)]
pub enum Message {
    /// A thread touched a page and sleeps (or spins, if a signal came during a system call).
    Pagefault {
        /// UFFD_PAGEFAULT_FLAG_ bits: none, WRITE, WRITE|WP, MINOR or WRITE|MINOR.
        flags: u64,
        /// The page, or with EXACT_ADDRESS the byte.
        address: usize,
        /// The thread with THREAD_ID, else 0.
        ptid: u32,
    },
    /// The process forked. The descriptor serves the child; dropping it leaves the child with zeros.
    Fork {
        /// The child's userfaultfd, its handshake done.
        ufd: OwnedFd,
    },
    /// mremap() moved memory.
    Remap {
        /// Old address.
        from: usize,
        /// New address.
        to: usize,
        /// Bytes.
        len: usize,
    },
    /// madvise() took pages away.
    Remove {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// munmap() took the mapping away.
    Unmap {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// An event that this version does not know.
    Unknown {
        /// Its number.
        event: u8,
        /// Its argument, raw.
        words: [u64; 3],
    },
}

impl Message {
    /// Reads one raw message.
    ///
    /// # Safety
    /// `raw` must come from a read of a userfaultfd, and be passed in once: a fork message owns its
    /// descriptor.
    unsafe fn from_raw(raw: &uffd_msg) -> Message {
        // SAFETY: every variant of the union is plain integers, so any of them may be read; `event` says
        // which one the kernel wrote.
        unsafe {
            match u64::from(raw.event) {
                UFFD_EVENT_PAGEFAULT => {
                    let fault = raw.arg.pagefault;
                    Message::Pagefault {
                        flags: fault.flags,
                        address: fault.address as usize,
                        ptid: fault.feat.ptid,
                    }
                }
                UFFD_EVENT_FORK => Message::Fork {
                    ufd: OwnedFd::from_raw_fd(raw.arg.fork.ufd as RawFd),
                },
                UFFD_EVENT_REMAP => {
                    let remap = raw.arg.remap;
                    Message::Remap {
                        from: remap.from as usize,
                        to: remap.to as usize,
                        len: remap.len as usize,
                    }
                }
                UFFD_EVENT_REMOVE => {
                    let remove = raw.arg.remove;
                    Message::Remove {
                        start: remove.start as usize,
                        end: remove.end as usize,
                    }
                }
                UFFD_EVENT_UNMAP => {
                    let unmap = raw.arg.remove;
                    Message::Unmap {
                        start: unmap.start as usize,
                        end: unmap.end as usize,
                    }
                }
                _ => Message::Unknown {
                    event: raw.event,
                    words: raw.arg.reserved,
                },
            }
        }
    }
}

/// Room for a batch of messages.
///
/// It must lie in memory that can never fault into the userfaultfd it is read from: a read that cannot
/// store its message loses it, and the thread that caused it sleeps on.
pub struct MessageBuffer<const N: usize> {
    raw: [uffd_msg; N],
}

impl<const N: usize> MessageBuffer<N> {
    /// An empty buffer.
    pub const fn new() -> Self {
        MessageBuffer {
            raw: [uffd_msg::EMPTY; N],
        }
    }
}

impl<const N: usize> Default for MessageBuffer<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// The messages of one read, in the kernel's order: all pending faults before any event.
///
/// Descriptors of fork messages that nobody took are closed with it.
pub struct Messages<'a> {
    rest: std::slice::Iter<'a, uffd_msg>,
}

impl Iterator for Messages<'_> {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        // SAFETY: `read_messages` made the slice of what the kernel wrote, and the iterator passes each
        // message once.
        self.rest
            .next()
            .map(|raw| unsafe { Message::from_raw(raw) })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.rest.size_hint()
    }
}

impl ExactSizeIterator for Messages<'_> {}

impl Drop for Messages<'_> {
    fn drop(&mut self) {
        for message in self {
            drop(message);
        }
    }
}

impl Uffd {
    /// Reads as many messages as wait and fit, at least one.
    ///
    /// A non-blocking descriptor without messages answers EAGAIN (`WouldBlock`); a blocking one sleeps,
    /// and a signal ends that with EINTR. EMFILE says that a fork message waits and no descriptor was free
    /// for it; it is still there.
    pub fn read_messages<'a, const N: usize>(
        &self,
        buffer: &'a mut MessageBuffer<N>,
    ) -> io::Result<Messages<'a>> {
        let bytes = std::mem::size_of_val(&buffer.raw);
        // SAFETY: the buffer is plain integers of exactly so many bytes, borrowed for the whole call.
        let read = unsafe { libc::read(self.as_raw_fd(), buffer.raw.as_mut_ptr().cast(), bytes) };
        if read < 0 {
            return Err(io::Error::from_raw_os_error(ioctl::last_errno()));
        }
        let count = read as usize / std::mem::size_of::<uffd_msg>();
        Ok(Messages {
            rest: buffer.raw[..count].iter(),
        })
    }

    /// Waits until a message can be read: true, or false when `timeout_ms` milliseconds are over (-1: no
    /// bound). Only for non-blocking descriptors: poll(2) answers POLLERR on a blocking one, an error here.
    pub fn wait(&self, timeout_ms: i32) -> io::Result<bool> {
        let mut poll = libc::pollfd {
            fd: self.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, alive through the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) };
        if ready < 0 {
            return Err(io::Error::from_raw_os_error(ioctl::last_errno()));
        }
        if poll.revents & libc::POLLERR != 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(ready > 0)
    }
}
