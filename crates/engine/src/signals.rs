//! Keeps signals away from the engine's threads.
//!
//! Unsafe: calls pthread_sigmask, for which the standard library has no function.

use std::mem::MaybeUninit;

/// While this lives, all signals are blocked in this thread; a thread started meanwhile inherits that.
pub struct BlockedSignals(libc::sigset_t);

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
