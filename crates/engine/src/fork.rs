//! What a fork leaves in the child: neither zeros nor a stranger's bytes.
//!
//! Unsafe: pthread_atfork handlers that make raw system calls.
//!
//! A child has no handler threads, and a userfaultfd serves only the process that created it. The
//! mappings are not inherited (MADV_DONTFORK), but that alone leaves holes that the child's malloc would
//! fill, and stale pointers would read a stranger's bytes. So the child maps PROT_NONE over every region
//! and view before fork() returns there, closes the descriptors, and takes the next generation number:
//! every call on a region of an older generation says so and does nothing. `_Fork` and a raw clone skip
//! these handlers. After vfork and posix_spawn the child shares the parent's memory until it calls exec,
//! and is served like any thread of the parent.
//!
//! The table is guarded by a lock of one atomic, taken around the fork, since the child can use nothing
//! that another thread may have held.

use std::cell::UnsafeCell;
use std::os::fd::RawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// One thing that must not reach a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// An address range.
    Range(usize, usize),
    /// A descriptor.
    Descriptor(RawFd),
}

struct Registry {
    locked: AtomicBool,
    kept: UnsafeCell<Vec<Kept>>,
}

// SAFETY: `kept` is only reached while `locked` is held, or in a child that has one thread.
unsafe impl Sync for Registry {}

static REGISTRY: Registry = Registry {
    locked: AtomicBool::new(false),
    kept: UnsafeCell::new(Vec::new()),
};
static GENERATION: AtomicU32 = AtomicU32::new(0);
static INSTALL: Once = Once::new();

fn lock() {
    while REGISTRY
        .locked
        .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
        .is_err()
    {
        std::thread::yield_now();
    }
}

fn unlock() {
    REGISTRY.locked.store(false, Ordering::Release);
}

/// How many forks lie between the first process and this one.
pub fn generation() -> u32 {
    GENERATION.load(Ordering::Acquire)
}

/// Remembers what a child must not get.
pub fn keep(kept: &[Kept]) {
    INSTALL.call_once(|| {
        // SAFETY: the handlers are `extern "C"` functions that live as long as the program; this code is
        // never unloaded (it is part of a Python extension module).
        unsafe { libc::pthread_atfork(Some(before), Some(after_in_parent), Some(after_in_child)) };
    });
    lock();
    // SAFETY: the lock is held.
    unsafe { (*REGISTRY.kept.get()).extend_from_slice(kept) };
    unlock();
}

/// Forgets what is gone.
pub fn forget(gone: &[Kept]) {
    lock();
    // SAFETY: the lock is held.
    unsafe { (*REGISTRY.kept.get()).retain(|kept| !gone.contains(kept)) };
    unlock();
}

/// Runs `change` while no fork of this process is under way: it leaves mappings for a moment as a child must
/// not get them.
pub(crate) fn between_forks<R>(change: impl FnOnce() -> R) -> R {
    lock();
    let result = change();
    unlock();
    result
}

extern "C" fn before() {
    lock();
}

extern "C" fn after_in_parent() {
    unlock();
}

extern "C" fn after_in_child() {
    GENERATION.fetch_add(1, Ordering::AcqRel);
    // SAFETY: the child has one thread, and the lock was taken before the fork. The system calls touch
    // only ranges that MADV_DONTFORK left unmapped and descriptors that the engine opened. Nothing is
    // allocated: clearing a vector keeps its memory.
    unsafe {
        let kept = &mut *REGISTRY.kept.get();
        for item in kept.iter() {
            match *item {
                Kept::Range(start, len) => {
                    let flags = libc::MAP_PRIVATE
                        | libc::MAP_ANONYMOUS
                        | libc::MAP_NORESERVE
                        | libc::MAP_FIXED_NOREPLACE;
                    libc::mmap(
                        start as *mut libc::c_void,
                        len,
                        libc::PROT_NONE,
                        flags,
                        -1,
                        0,
                    );
                }
                Kept::Descriptor(fd) => {
                    libc::close(fd);
                }
            }
        }
        kept.clear();
    }
    unlock();
}
