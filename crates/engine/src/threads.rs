//! The engine's own threads: no signals reach them, and a panic in one ends the process.
//!
//! Unsafe: asks for the number of a thread.
//!
//! A thread that answers faults owns blocks. Were it to unwind, whoever sleeps on them would sleep for ever,
//! with no word why. Fail-stop: the panic's message is printed, then the process aborts.

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

/// The number of the calling thread in the kernel.
pub fn id() -> libc::pid_t {
    // SAFETY: takes nothing and always answers.
    unsafe { libc::gettid() }
}
