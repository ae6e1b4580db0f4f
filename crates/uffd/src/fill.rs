//! When a failed fill may go on: the kernel's race rules, in one place.
//!
//! [`fill`] drives one filling call over a range until the range is done or something happened that only
//! the caller can decide. It retries nothing that needs a decision and it never waits.

use crate::Outcome;

/// How a fill ended. `at` is the offset in bytes of the first page that is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "only Filled::Whole means that the range is there"]
pub enum Filled {
    /// Every page is there. `skipped` bytes of them were there before.
    Whole {
        /// Bytes that the kernel refused with EEXIST.
        skipped: usize,
    },
    /// An event is unread. Read the messages, apply them to the block table, then fill the rest.
    ///
    /// Try again on a timer too, and not only when a message was read: another thread may have read
    /// the event, and its number may be down before this thread looks (a published hang of a virtual
    /// machine came from retrying only while the queue was not empty).
    EventPending {
        /// Where to go on.
        at: usize,
    },
    /// A page was there that must not be: [`Fill::OwnAbsent`] only. It is stale: write it through the view,
    /// then CONTINUE.
    StalePage {
        /// Which page.
        at: usize,
    },
    /// The layout of the memory changed (munmap, mremap, another registration): read it again.
    LayoutChanged {
        /// Where.
        at: usize,
    },
    /// The process whose memory this was is gone: drop the source of faults.
    ProcessGone,
    /// Anything else is a mistake of the caller or a limit of the machine (EFAULT, EINVAL, ENOMEM ...).
    Failed {
        /// Where.
        at: usize,
        /// Why.
        errno: i32,
    },
}

/// What EEXIST means for the memory that is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Others fill the same memory: a page that is there is as good as ours.
    Shared,
    /// The block is ours alone and was absent when the fill began: a page that is there is stale.
    OwnAbsent,
}

/// Fills `len` bytes by calls of `call(offset, length)`, one of the filling ioctls, page size `page`.
///
/// The rules, and why:
///
/// * **Success or partial progress** (`done > 0`): go on after what is done. With partial progress the
///   errno is always EAGAIN, whatever stopped the kernel; only a call that starts at the page in question
///   learns the reason.
/// * **EAGAIN with nothing done**: an event (fork, mremap, munmap, madvise) is unread, and the kernel
///   refuses every fill so that none lands in memory that has just moved. Only reading the event helps, so
///   this function gives up its turn. Even then the refusals go on for a moment, until the thread that
///   raised the event has run again: another reason for a timer.
/// * **EEXIST**: somebody was faster, or a page was left. Where others fill too, the page is skipped.
///   Otherwise it is stale, and the caller must replace its bytes.
/// * **ENOENT**: no registered mapping covers the range as one piece any more.
/// * **ESRCH**: the owner of the memory has exited (or executed another program).
/// * **At the end wake the whole block, whatever happened**: a failed call wakes nobody, EEXIST included,
///   and partial progress wakes only what is done. The caller does that once, with [`Uffd::wake`](crate::Uffd::wake), when it
///   has acted on the answer: a thread woken over a page that is still missing only asks again.
pub fn fill(
    len: usize,
    page: usize,
    exists: Fill,
    mut call: impl FnMut(usize, usize) -> Outcome,
) -> Filled {
    let mut at = 0;
    let mut skipped = 0;
    while at < len {
        let outcome = call(at, len - at);
        if outcome.done > 0 {
            at += outcome.done as usize;
            continue;
        }
        match outcome.errno {
            libc::EAGAIN => return Filled::EventPending { at },
            libc::EEXIST if exists == Fill::Shared => {
                let step = page.min(len - at);
                at += step;
                skipped += step;
            }
            libc::EEXIST => return Filled::StalePage { at },
            libc::ENOENT => return Filled::LayoutChanged { at },
            libc::ESRCH => return Filled::ProcessGone,
            // A success that did nothing cannot be; going on would never end.
            0 => {
                return Filled::Failed {
                    at,
                    errno: libc::EIO,
                };
            }
            errno => return Filled::Failed { at, errno },
        }
    }
    Filled::Whole { skipped }
}
