//! A lock of one word, which a signal handler can take too, and sleeping on a word.
//!
//! A thread that touches memory of a region with `fault="inline"` takes the locks of the block table and of
//! the pool in its handler of SIGBUS (see `inline`). There nothing may allocate or use a thread-local of this
//! library, which rules out the usual locks: those keep a queue of sleepers in both. This one is the futex
//! mutex of the textbooks: 0 free, 1 held, 2 held and somebody may sleep.
//!
//! [`Lock::lock`] is for ordinary code. [`Lock::lock_in_handler`] is for the handler, in which all signals
//! are blocked. In between stands the rule that keeps the two apart: whoever holds such a lock is not
//! interrupted by a signal whose handler might touch a region (see [`signals::shield`]).
//!
//! Unsafe: futex(2), and the interior of a lock.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::signals::{self, Shield};

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

/// Looks at a held lock so often before it sleeps: what is done under these locks takes less than a
/// microsecond.
const SPINS: u32 = 60;

/// Sleeps while `word` holds `expected`, at most `at_most`. True if the time is over.
pub(crate) fn wait(word: &AtomicU32, expected: u32, at_most: Option<Duration>) -> bool {
    let timeout = at_most.map(|at_most| libc::timespec {
        tv_sec: at_most.as_secs() as libc::time_t,
        tv_nsec: at_most.subsec_nanos().into(),
    });
    let pointer = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word outlives the call, and the timeout is null or a local.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            pointer,
        )
    };
    // SAFETY: the thread's own errno.
    result < 0 && unsafe { *libc::__errno_location() } == libc::ETIMEDOUT
}

/// Wakes at most `count` threads that sleep on `word`.
pub(crate) fn wake(word: &AtomicU32, count: i32) {
    // SAFETY: the word is only used as an address.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            count,
        )
    };
}

/// A value behind a lock of one word.
#[derive(Debug, Default)]
pub(crate) struct Lock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, of which there is one at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

/// The lock, held.
#[derive(Debug)]
pub(crate) struct Guard<'a, T> {
    lock: &'a Lock<T>,
    /// Let go of after the lock: fields are dropped behind the guard itself.
    shield: Option<Shield>,
}

impl<T> Lock<T> {
    pub(crate) const fn new(value: T) -> Lock<T> {
        Lock {
            word: AtomicU32::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Takes the lock, in ordinary code.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        let shield = signals::shield();
        self.acquire();
        Guard { lock: self, shield }
    }

    /// Takes the lock in the handler of SIGBUS.
    pub(crate) fn lock_in_handler(&self) -> Guard<'_, T> {
        self.acquire();
        Guard {
            lock: self,
            shield: None,
        }
    }

    fn acquire(&self) {
        let take = || {
            self.word
                .compare_exchange_weak(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
        };
        for _ in 0..SPINS {
            match take() {
                Ok(_) => return,
                Err(CONTENDED) => break,
                Err(_) => std::hint::spin_loop(),
            }
        }
        while self.word.swap(CONTENDED, Ordering::Acquire) != FREE {
            wait(&self.word, CONTENDED, None);
        }
    }

    fn release(&self) {
        if self.word.swap(FREE, Ordering::Release) == CONTENDED {
            wake(&self.word, 1);
        }
    }
}

impl<T> Guard<'_, T> {
    /// Lets go of the lock, sleeps while `word` holds `expected`, at most `at_most`, and takes it again.
    pub(crate) fn sleep(&mut self, word: &AtomicU32, expected: u32, at_most: Duration) {
        self.lock.release();
        // Signals come through while nothing is held.
        let shielded = self.shield.take().is_some();
        wait(word, expected, Some(at_most));
        if shielded {
            self.shield = signals::shield();
        }
        self.lock.acquire();
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held as long as the guard lives.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held as long as the guard lives, and the guard is borrowed alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn only_one_thread_at_a_time_has_the_value() {
        let lock = Lock::new(0u64);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for turn in 0..20_000 {
                        let mut value = if turn % 2 == 0 {
                            lock.lock()
                        } else {
                            lock.lock_in_handler()
                        };
                        let seen = *value;
                        if turn % 500 == 0 {
                            std::thread::yield_now();
                        }
                        *value = seen + 1;
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), 160_000);
    }

    #[test]
    fn a_sleeper_lets_others_have_the_lock_and_is_woken_by_a_change() {
        let (lock, word) = (Lock::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                *lock.lock() = true;
                word.fetch_add(1, Ordering::SeqCst);
                wake(&word, i32::MAX);
            });
            let mut guard = lock.lock();
            let began = Instant::now();
            while !*guard && began.elapsed() < Duration::from_secs(20) {
                let seen = word.load(Ordering::SeqCst);
                guard.sleep(&word, seen, Duration::from_secs(20));
            }
            assert!(*guard);
        });
    }

    #[test]
    fn a_wait_for_a_word_that_has_changed_ends_at_once_and_any_other_in_time() {
        let word = AtomicU32::new(7);
        assert!(!wait(&word, 6, Some(Duration::from_secs(100))));
        assert!(wait(&word, 7, Some(Duration::from_millis(1))));
    }
}
