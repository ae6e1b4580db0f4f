//! Keeps signals away: from the engine's threads, and from threads that hold a lock of the engine.
//!
//! A signal handler of the program may touch a region. With `fault="inline"` it then runs the engine's own
//! handler of SIGBUS, in the same thread, and would wait for ever for what this thread has: a lock, which the
//! engine's threads may want too before they can help, or a block. So, from the first such region on, signals
//! are blocked while a thread of the program is inside of a call of the library, or holds a lock of it
//! ([`shield`]). The engine's threads never let a signal in.
//!
//! Unsafe: calls pthread_sigmask, for which the standard library has no function.

use std::cell::Cell;
use std::marker::PhantomData;
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

/// Those that an instruction of the thread itself raises. The kernel kills where it finds them blocked, and a
/// call of the library may touch a region on behalf of the program.
const RAISED_BY_ITSELF: [libc::c_int; 5] = [
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
];

thread_local! {
    /// Shields that are up in this thread; the outermost blocks the signals. The engine's threads have one for ever.
    static SHIELDS: Cell<u32> = const { Cell::new(0) };
    /// What was blocked before the outermost.
    static BEFORE: Cell<MaybeUninit<libc::sigset_t>> = const { Cell::new(MaybeUninit::uninit()) };
}

/// From here on a shield is worth its two system calls.
pub(crate) fn need_shields() {
    NEEDED.store(true, Ordering::Release);
}

/// To be called by each of the engine's threads, which begin with all signals blocked.
pub(crate) fn never_interrupted() {
    SHIELDS.set(1);
}

/// Blocks signals until it is dropped, unless nobody needs it. Shields may be dropped in any order.
pub(crate) fn shield() -> Option<Shield> {
    if !NEEDED.load(Ordering::Acquire) {
        return None;
    }
    let up = SHIELDS.get();
    if up == 0 {
        let mut before = MaybeUninit::uninit();
        let mut blocked = MaybeUninit::uninit();
        // SAFETY: sigfillset initialises `blocked`; the calls cannot fail with these arguments.
        unsafe {
            libc::sigfillset(blocked.as_mut_ptr());
            for signal in RAISED_BY_ITSELF {
                libc::sigdelset(blocked.as_mut_ptr(), signal);
            }
            // What the thread itself has blocked stays so.
            libc::pthread_sigmask(libc::SIG_BLOCK, blocked.as_ptr(), before.as_mut_ptr());
        }
        BEFORE.set(before);
    }
    SHIELDS.set(up + 1);
    Some(Shield(PhantomData))
}

/// Signals are blocked in this thread.
#[derive(Debug)]
pub(crate) struct Shield(PhantomData<*mut ()>);

impl Drop for Shield {
    fn drop(&mut self) {
        let up = SHIELDS.get() - 1;
        SHIELDS.set(up);
        if up == 0 {
            let before = BEFORE.get();
            // SAFETY: the outermost shield's pthread_sigmask has filled it in.
            unsafe {
                libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(signal: libc::c_int) -> bool {
        let mut now = MaybeUninit::uninit();
        // SAFETY: asks for the mask alone, which is then initialised.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), now.as_mut_ptr());
            libc::sigismember(now.as_ptr(), signal) == 1
        }
    }

    #[test]
    fn signals_stay_blocked_until_the_last_shield_is_dropped_in_whatever_order() {
        need_shields();
        let first = shield();
        let second = shield();
        assert!(blocked(libc::SIGALRM) && !blocked(libc::SIGBUS));
        drop(first);
        assert!(blocked(libc::SIGALRM));
        drop(second);
        assert!(!blocked(libc::SIGALRM));
    }

    #[test]
    fn what_the_thread_has_blocked_itself_stays_blocked() {
        need_shields();
        let set = |how| {
            let mut set = MaybeUninit::uninit();
            // SAFETY: the set is made empty first.
            unsafe {
                libc::sigemptyset(set.as_mut_ptr());
                libc::sigaddset(set.as_mut_ptr(), libc::SIGBUS);
                libc::pthread_sigmask(how, set.as_ptr(), std::ptr::null_mut());
            }
        };
        set(libc::SIG_BLOCK);
        let shield = shield();
        assert!(blocked(libc::SIGBUS));
        drop(shield);
        assert!(blocked(libc::SIGBUS));
        set(libc::SIG_UNBLOCK);
    }
}
