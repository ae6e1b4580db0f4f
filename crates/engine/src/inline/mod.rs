//! `fault="inline"`: the thread that touches a missing page brings it itself.
//!
//! A second userfaultfd, opened with UFFD_FEATURE_SIGBUS, raises SIGBUS in the touching thread instead of
//! sending a message. The handler of that signal reads the block and puts it in place; then the access is
//! made again. No other thread takes part, which is where most of a fault's time goes. Everything else is
//! what it is for any region: the same block table, pools, evictions and write-back.
//!
//! ```text
//!   touch of an absent page
//!     | SIGBUS
//!     v                    not ours: a truncated file, poison, kill(2)
//!   signal: whose address is it? ------------------------------------> whoever had SIGBUS before us
//!     | a region's
//!     v                     needs more than a handler may do
//!   resolve: fill or map  ------------------------------------------> handover: a thread of the engine
//!     | done                                                             does it; this one sleeps at a door
//!     v                                                                  | block changes hands
//!   return; the access is made again <-----------------------------------+
//! ```
//!
//! | file | concept |
//! |---|---|
//! | `signal` | the handler of SIGBUS: installing it, looking after it, passing on what is not ours |
//! | `regions` | which region an address belongs to, without a lock |
//! | `resolve` | what is done in the touching thread |
//! | `bounce` | buffers that are there before they are needed |
//! | `handover` | a pipe to the engine's threads, for everything else |
//! | `left` | how a thread of the engine ends a fill that the handler had to leave in the middle |
//! | `door` | where touching threads sleep |
//! | `headroom` | memory that is free before it is needed, so that a handler need not evict |
//!
//! # What may be done in a handler
//! The handler runs between two instructions of the program: the program may be inside of malloc, or hold any
//! lock of its own. So the handler allocates nothing, frees nothing, and takes no lock but three: the block
//! table's, the pool's, and that of the walks, each a [`Lock`](crate::futex::Lock) of one word. It uses no
//! thread-local of this library (the first use of one in a thread allocates), cannot panic on the way, and
//! needs less than 2 KiB of stack. It does make system calls, and leaves errno as it was.
//!
//! # Why its locks cannot deadlock
//! A handler waits for a lock that some thread holds. It would wait for ever if that thread were its own, or
//! one that waits for this handler:
//!
//! 1. Whoever holds such a lock touches no memory of a region. The holders are the functions of this crate,
//!    and none of them follows a pointer into a region while it holds one. So the access that raised the
//!    signal was not made under the lock.
//! 2. But the holder may be interrupted by another signal, whose handler, the program's, touches a region. In
//!    the engine's threads all signals are blocked. A thread of the program blocks them while it is inside of
//!    a call of the library ([`signals::shield`](crate::signals::shield)), for there it may also own a block,
//!    or hold a lock that the engine's threads need before they can do what is handed over. The handler of
//!    SIGBUS itself runs with all signals blocked, but for those that its own mistakes would raise.
//! 3. No holder waits for anything but the next lock in the order (table, then pool), as everywhere else.
//!
//! What is handed over is done by threads that may allocate. A signal handler of the program that touches a
//! region while its own thread is inside of malloc can therefore be made to wait for itself, where the block
//! needs a thread of the engine; signal handlers that touch a region are safe only while it is pinned.
//!
//! # What is handed over
//! Stores that are no plain files; a block that somebody else owns; room that has to be made first; a block
//! that the table calls mapped (the program threw its page away); any failure, so that errors, retries,
//! deadlines and poison are the fault loop's alone; a block of which a part was mapped when the kernel ran out of
//! memory, for what has been written to it must reach the store before it goes. To be handed over is slow, never wrong: the fault loop
//! answers it as if it were a message.
//!
//! # Promises
//! * The touching thread makes progress or gets the SIGBUS that any other region would give it. A sleep at
//!   a door ends after a second at the latest, and the access is made again: no wake-up can be lost for good.
//! * A file's own read is not given up: a thread whose read(2) does not come back waits for it, as it would
//!   in a mapping of the kernel's. Others that wait for the same block have their deadline.
//! * SIGBUS for anything else goes to whoever had it before. If that brings nothing, the default action ends
//!   the process, rather than a loop.
//! * System calls on absent memory fail with EFAULT: the kernel asks nobody.

mod bounce;
mod door;
mod handover;
mod headroom;
mod left;
mod regions;
mod resolve;
mod signal;

use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use userfault_uffd::abi::{
    UFFD_FEATURE_POISON, UFFD_FEATURE_SIGBUS, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_UNPOPULATED,
};
use userfault_uffd::{KernelFaults, OpenOptions, Uffd};

pub(crate) use door::Doors;
pub(crate) use handover::{Request, Touches};
pub(crate) use left::Left;
pub(crate) use signal::{keep_handler, look_after, look_after_or_say};

use crate::abilities::REQUIRED;
use crate::block::State;
use crate::body::Body;
use crate::engine::Engine;
use crate::error::Error;
use crate::fork::{self, Kept};
use crate::signals;

/// What regions with `fault="inline"` share.
pub(crate) struct Inline {
    pub(crate) uffd: Uffd,
    regions: regions::Regions,
    bounce: bounce::Bounce,
    handover: handover::Handover,
    headroom: headroom::Headroom,
}

/// The second fault source of an engine, once somebody has asked for it.
#[derive(Default)]
pub(crate) struct InlineSource(OnceLock<Inline>);

impl Engine {
    /// The inline source, if any region has used it.
    pub(crate) fn inline(&self) -> Option<&Inline> {
        self.inline_source.0.get()
    }

    /// The inline source; it comes to life with the first region that asks for it.
    pub(crate) fn start_inline(&'static self, writable: bool) -> Result<&'static Inline, Error> {
        if writable && !(self.abilities.wp_async && self.abilities.continue_protects) {
            // A first write would be a signal too, and every one of them a call.
            return Err(Error::Invalid(
                "fault=\"inline\" with memory that is written needs a kernel that notes writes by itself, Linux \
                 6.7 or newer; use fault=\"threads\" here"
                    .into(),
            ));
        }
        signals::need_shields();
        if let Some(inline) = self.inline() {
            signal::look_after()?;
            return Ok(inline);
        }
        let inline = Inline::new()?;
        let mut kept = inline.handover.kept();
        kept.push(Kept::Descriptor(inline.uffd.as_raw_fd()));
        if self.inline_source.0.set(inline).is_ok() {
            fork::keep(&kept);
            if !(self.touches.start(self) && headroom::start(self)) {
                return Err(Error::last_os(
                    "starting the engine's threads",
                    "see ulimit -u and the pids cgroup",
                ));
            }
        }
        signal::serve();
        signal::look_after()?;
        Ok(self
            .inline()
            .expect("it was set just now, here or elsewhere"))
    }

    /// Does what a request asks for if it is no touch: true.
    fn heed(&'static self, request: &Request) -> bool {
        let Some(body) = self.at(request.address) else {
            // A touch of a closed region finds that out by itself.
            return true;
        };
        let block = ((request.address - body.memory.main()) / body.block) as u32;
        if let Some(window) = request.window(block) {
            self.submit_ahead(&body, window);
            return true;
        }
        if request.is_let_go() {
            let _ = body.release(&mut body.lock(), block, State::Absent);
            return true;
        }
        false
    }

    /// The userfaultfd that a region's memory is registered with.
    pub(crate) fn uffd_of(&self, body: &Body) -> &Uffd {
        match (&body.doors, self.inline()) {
            (Some(_), Some(inline)) => &inline.uffd,
            _ => &self.uffd,
        }
    }
}

impl Inline {
    fn new() -> Result<Inline, Error> {
        // What it looks up for the first time allocates.
        let _ = crate::defects::copy_breaks_off_after(0);
        let options = OpenOptions {
            // The feature takes the kernel's own faults away in any case, so no privilege is asked for.
            kernel_faults: KernelFaults::Unwanted,
            nonblocking: true,
            require: REQUIRED | UFFD_FEATURE_SIGBUS,
            prefer: UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_POISON,
            ..OpenOptions::default()
        };
        let uffd = Uffd::open(&options).map_err(|error| Error::Os {
            call: "opening a userfaultfd for fault=\"inline\"",
            errno: error.errno(),
            advice: format!("{error}; `userfault doctor` says more"),
        })?;
        Ok(Inline {
            uffd,
            regions: regions::Regions::default(),
            bounce: bounce::Bounce::new()?,
            handover: handover::Handover::new()?,
            headroom: headroom::Headroom::default(),
        })
    }

    /// Lets the handler of SIGBUS find a region.
    pub(crate) fn admit(&self, body: &Arc<Body>) -> Result<(), Error> {
        self.regions.admit(body)
    }

    /// Takes a sealed region away from the handler; its sleepers go on, to find that it is closed. Its
    /// addresses are known as long as `forget` has not been called.
    pub(crate) fn dismiss(&self, body: &Body) {
        self.regions.dismiss(body);
    }

    /// Forgets the addresses of a dismissed region: they will be somebody else's.
    pub(crate) fn forget(&self, start: usize) {
        self.regions.forget(start);
    }
}
