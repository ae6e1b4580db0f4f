//! The engine's own threads: no signals reach them, and a panic in one ends the process.
//!
//! Unsafe: asks for the number of a thread, and how it is scheduled.
//!
//! A thread that answers faults owns blocks. Were it to unwind, whoever sleeps on them would sleep for ever,
//! with no word why. Fail-stop: the panic's message is printed, then the process aborts.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::signals::{self, BlockedSignals};

/// Starts a thread that lives until the process ends. False if the system has none left.
pub(crate) fn start(name: &str, stack: usize, run: impl FnOnce() + Send + 'static) -> bool {
    let _blocked = BlockedSignals::all();
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(stack)
        .spawn(|| {
            signals::never_interrupted();
            // The hook has printed the panic's message and place.
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                crate::say::line(
                    "userfault: a thread of the engine panicked; memory can no longer be served",
                );
                std::process::abort();
            }
        })
        .is_ok()
}

/// As long as this lives, its thread interrupts nobody when it is woken: whoever wakes it would otherwise lose the
/// processor to it on a busy machine. It is advice: what fails is left as it is, and so is a program that is scheduled
/// in real time.
#[derive(Debug)]
pub struct StoodBack {
    changed: bool,
    /// It is about the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl StoodBack {
    /// For the calling thread.
    pub fn begin() -> StoodBack {
        // SAFETY: takes a number, and concerns this thread alone.
        let normal = unsafe { libc::sched_getscheduler(0) } == libc::SCHED_OTHER;
        StoodBack {
            changed: normal && schedule(libc::SCHED_BATCH),
            _thread: PhantomData,
        }
    }
}

impl Drop for StoodBack {
    fn drop(&mut self) {
        if self.changed {
            schedule(libc::SCHED_OTHER);
        }
    }
}

fn schedule(policy: libc::c_int) -> bool {
    // SAFETY: a struct of one number, which has to be 0 for these policies.
    let normal: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: takes a number and a struct that lives, and concerns this thread alone.
    unsafe { libc::sched_setscheduler(0, policy, &raw const normal) == 0 }
}

/// The number of the calling thread in the kernel.
pub fn id() -> libc::pid_t {
    // SAFETY: takes nothing and always answers.
    unsafe { libc::gettid() }
}
