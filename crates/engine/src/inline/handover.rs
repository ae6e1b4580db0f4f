//! From a signal handler to the engine's threads: a pipe.
//!
//! write(2) of so few bytes is atomic and may be called in a handler. At the other end a loop of threads reads
//! requests as the fault loop reads messages, and answers them in the same way: one more
//! [`FaultSource`]. A full pipe makes the writer wait, which it is about to do anyway.
//!
//! Unsafe: pipe2(2), and write(2) and read(2) of plain structs.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::time::Instant;

use crate::engine::Engine;
use crate::error::Error;
use crate::fork::Kept;
use crate::readahead::Window;
use crate::workers::{FaultSource, Task, Touch};

/// Requests read at once.
const BATCH: usize = 16;

/// A walk goes on from the touched block: bring in what it touches next.
const AHEAD: u32 = 1;
/// Answer the touch; its walk has been noted.
const NOTED: u32 = 2;
/// Answer the touch.
const TOUCH: u32 = 3;
/// End the sender's ownership of the block.
const LET_GO: u32 = 4;
/// End the sender's fill of the block, which is partly in place.
const HALFWAY: u32 = 5;

/// What a handler asks for.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Request {
    kind: u32,
    /// Who touches, as walks and pools know it.
    pub(crate) thread: u32,
    /// What was touched.
    pub(crate) address: usize,
    /// Blocks from one touch of the walk to the next.
    step: i64,
    /// Blocks to bring in, or bytes that are in place.
    count: u32,
    unused: u32,
}

impl Request {
    /// A touch that the handler leaves to others. `noted`: its walk has been looked at.
    pub(super) fn touch(address: usize, thread: u32, noted: bool) -> Request {
        Request {
            kind: if noted { NOTED } else { TOUCH },
            thread,
            address,
            ..Request::default()
        }
    }

    /// What a walk will touch next, counted from the block at `address`.
    pub(super) fn ahead(address: usize, thread: u32, step: i64, count: u32) -> Request {
        Request {
            kind: AHEAD,
            thread,
            address,
            step,
            count,
            unused: 0,
        }
    }

    /// The block at `address` is the sender's, its sleepers were given up, and its memory is released.
    pub(super) fn let_go(address: usize) -> Request {
        Request {
            kind: LET_GO,
            address,
            ..Request::default()
        }
    }

    /// The block at `address` is the sender's; `placed` bytes of it are in memory and may have been written.
    pub(super) fn halfway(address: usize, thread: u32, placed: usize) -> Request {
        Request {
            kind: HALFWAY,
            thread,
            address,
            count: placed as u32,
            ..Request::default()
        }
    }

    /// The bytes that are in place, if the fill is to be ended.
    pub(super) fn placed(&self) -> Option<usize> {
        (self.kind == HALFWAY).then_some(self.count as usize)
    }

    /// What to bring in, if that is what is asked for; `block` is the one at `address`.
    pub(super) fn window(&self, block: u32) -> Option<Window> {
        (self.kind == AHEAD).then(|| Window {
            first: i64::from(block) + self.step,
            step: self.step,
            count: self.count,
        })
    }

    pub(super) fn is_let_go(&self) -> bool {
        self.kind == LET_GO
    }

    pub(crate) fn is_noted(&self) -> bool {
        self.kind == NOTED
    }
}

const SIZE: usize = size_of::<Request>();

/// The pipe.
pub(super) struct Handover {
    read: File,
    write: File,
}

impl Handover {
    pub(super) fn new() -> Result<Handover, Error> {
        let mut ends: [RawFd; 2] = [-1; 2];
        // SAFETY: room for two descriptors; both are new and owned from here on.
        unsafe {
            if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
                return Err(Error::last_os("pipe2", "see ulimit -n"));
            }
            Ok(Handover {
                read: File::from_raw_fd(ends[0]),
                write: File::from_raw_fd(ends[1]),
            })
        }
    }

    pub(super) fn kept(&self) -> Vec<Kept> {
        vec![
            Kept::Descriptor(self.read.as_raw_fd()),
            Kept::Descriptor(self.write.as_raw_fd()),
        ]
    }

    /// Asks the engine's threads for something. May be called in a handler.
    pub(super) fn send(&self, request: Request) {
        // SAFETY: the struct is plain integers without gaps. What cannot be written (nothing can, but for a
        // signal) is asked for again by the next touch.
        unsafe { libc::write(self.write.as_raw_fd(), (&raw const request).cast(), SIZE) };
    }

    /// Reads what was sent, at least one request.
    fn read(&self, into: &mut [Request; BATCH]) -> usize {
        // SAFETY: plain integers, any of whose values is one.
        let got = unsafe {
            libc::read(
                self.read.as_raw_fd(),
                into.as_mut_ptr().cast(),
                size_of_val(into),
            )
        };
        usize::try_from(got).map_or(0, |got| got / SIZE)
    }
}

/// What touching threads of regions with `fault="inline"` leave to others.
pub(crate) struct Touches;

impl FaultSource for Touches {
    fn next(&self, engine: &'static Engine, tasks: &mut VecDeque<Task>) {
        let inline = engine.inline().expect("served once it is open");
        let mut requests = [Request::default(); BATCH];
        let count = inline.handover.read(&mut requests);
        let read = Instant::now();
        for request in &requests[..count] {
            if engine.heed(request) {
                continue;
            }
            tasks.push_back(match engine.left_halfway(request) {
                Some(left) => Task::Halfway(left),
                None => Task::Touch(Touch::from_request(request, read)),
            });
        }
    }
}
