//! Keeping a thread off the processor of another one that stands still for a cut.
//!
//! Unsafe: asks for and sets where a thread may run.
//!
//! A thread that is woken is often put on the processor of who woke it, or on the one that it ran on last, and goes
//! first there, even if another one is idle: the scheduler does not look for one when the machine is busy. For a
//! cut of a tenth of a millisecond that is a disaster: the thread behind it then takes the processor for
//! several of them, and so does the thread that saves a block for a writer. So for the moment in which they
//! are woken they may run anywhere else.

use crate::lock::{Mutex, MutexGuard};
pub use crate::threads::id as this_thread;

/// Who has a thread kept off. One at a time, so that what is put back is what was there.
static KEEPING: Mutex<()> = Mutex::new(());

/// A thread that may not run on one processor, as long as this lives.
pub struct Elsewhere {
    thread: libc::pid_t,
    allowed: libc::cpu_set_t,
    _one: MutexGuard<'static, ()>,
}

impl Elsewhere {
    /// Keeps a thread (its number in the kernel) off the processor that the caller is on. `None` if it could run
    /// nowhere else, or if somebody else keeps one off just now: it is advice.
    pub fn keep(thread: libc::pid_t) -> Option<Elsewhere> {
        if thread <= 0 {
            // Not started yet. To the kernel 0 is the caller.
            return None;
        }
        let one = KEEPING.try_lock()?;
        // SAFETY: takes nothing; the number of a processor, or -1.
        let here = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
        let allowed = places(thread)?;
        let mut others = allowed;
        // SAFETY: both look at a set that lives, at a number within it.
        let left = unsafe {
            if here >= libc::CPU_SETSIZE as usize || !libc::CPU_ISSET(here, &others) {
                return None;
            }
            libc::CPU_CLR(here, &mut others);
            libc::CPU_COUNT(&others)
        };
        (left > 0 && put(thread, &others)).then_some(Elsewhere {
            thread,
            allowed,
            _one: one,
        })
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        put(self.thread, &self.allowed);
    }
}

/// Where a thread may run; `None` on a machine of more processors than the set has room for.
fn places(thread: libc::pid_t) -> Option<libc::cpu_set_t> {
    // SAFETY: the set is plain numbers, lives, and its size is told; a thread that is gone is an error.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let answer = libc::sched_getaffinity(thread, size_of_val(&set), &raw mut set);
        (answer == 0).then_some(set)
    }
}

fn put(thread: libc::pid_t, set: &libc::cpu_set_t) -> bool {
    // SAFETY: as in `places`; the set is only read.
    unsafe { libc::sched_setaffinity(thread, size_of_val(set), set) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(thread: libc::pid_t) -> i32 {
        // SAFETY: looks at a set that lives.
        unsafe { libc::CPU_COUNT(&places(thread).unwrap()) }
    }

    #[test]
    fn a_thread_may_go_back_to_where_it_was_kept_off() {
        let thread = this_thread();
        let before = count(thread);
        let kept = Elsewhere::keep(thread);
        if before > 1 {
            assert!(kept.is_some());
            assert_eq!(count(thread), before - 1);
            assert!(Elsewhere::keep(thread).is_none(), "one at a time");
        } else {
            assert!(kept.is_none(), "it would have nowhere to run");
        }
        drop(kept);
        assert_eq!(count(thread), before);
    }
}
