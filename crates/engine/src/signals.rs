//! Keeps signals away: from the engine's threads, and from threads that hold a lock of the engine.
//!
//! A signal handler of the program may touch a region. With `fault="inline"` it then runs the engine's own
//! handler of SIGBUS, in the same thread, and would wait for ever for a lock that this thread holds. So, from
//! the first such region on, all signals are blocked while a thread of the program holds one ([`shield`]). The
//! engine's threads never let a signal in.
//!
//! Unsafe: calls pthread_sigmask, for which the standard library has no function.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

/// While this lives, all signals are blocked in this thread; a thread started meanwhile inherits that.
pub struct BlockedSignals(libc::sigset_t);

impl std::fmt::Debug for BlockedSignals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockedSignals")
    }
}

impl BlockedSignals {
    /// Blocks every signal.
    pub fn all() -> BlockedSignals {
        let mut every = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: sigfillset initialises `every`, and pthread_sigmask, which cannot fail with these
        // arguments, initialises `before`.
        unsafe {
            libc::sigfillset(every.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, every.as_ptr(), before.as_mut_ptr());
            BlockedSignals(before.assume_init())
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Set once a handler of SIGBUS may want the engine's locks.
static NEEDED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// True in the engine's threads, and while a shield is up.
    static SHIELDED: Cell<bool> = const { Cell::new(false) };
}

/// From here on a shield is worth its two system calls.
pub(crate) fn need_shields() {
    NEEDED.store(true, Ordering::Release);
}

/// To be called by each of the engine's threads, which begin with all signals blocked.
pub(crate) fn never_interrupted() {
    SHIELDED.set(true);
}

/// Blocks all signals until it is dropped, unless they are blocked already or nobody needs it.
pub(crate) fn shield() -> Option<Shield> {
    if !NEEDED.load(Ordering::Acquire) || SHIELDED.get() {
        return None;
    }
    let blocked = BlockedSignals::all();
    SHIELDED.set(true);
    Some(Shield { _blocked: blocked })
}

/// Signals are blocked in this thread.
#[derive(Debug)]
pub(crate) struct Shield {
    _blocked: BlockedSignals,
}

impl Drop for Shield {
    fn drop(&mut self) {
        SHIELDED.set(false);
    }
}
