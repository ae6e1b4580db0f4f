//! Tracked memory: which pages have been written since somebody last asked.
//!
//! A checkpoint (and later a migration) wants to know what has changed in memory that a program goes on
//! writing. There are two ways, and a range keeps one of them for life, since a mapping has one
//! userfaultfd and the feature WP_ASYNC belongs to the whole descriptor.
//!
//! ```text
//!   silent   (`ledger`)   4 KiB pages, our own or the program's private anonymous memory.
//!                         WP_ASYNC: the kernel notes a first write by itself, nobody is woken.
//!                         PAGEMAP_SCAN tells what was written and protects it again, in one step.
//!   guarded  (`guard`)    2 MiB pages of our own (anonymous huge pages or hugetlb).
//!                         Synchronous protection: arming 1 GiB is a walk of 512 entries; the first
//!                         write to a block waits until its old bytes are saved.
//! ```
//!
//! Each consumer has its own dirty map. A harvest is ORed into the maps of all of them before anything
//! else is done with it, and a consumer clears only its own bits. The guarded way needs messages, so it
//! has a userfaultfd without WP_ASYNC: a second fault source of the one fault loop.
//!
//! | file | concept |
//! |---|---|
//! | `ledger` | silent tracking: a range, a consumer, and what was written |
//! | `guard` | guarded tracking: arming, saving a block before its first write |
//! | `own` | memory that is made to be tracked, charged to the memory limit |
//! | `mapping` | what a range of foreign memory is made of, and why it cannot be tracked |
//! | `foreign` | reading memory that may vanish, without a fault |
//!
//! # Locks
//! `Registry::ledgers` (held over a scan), then one ledger's map. A guard's state is a leaf; it is held
//! over UFFDIO_WRITEPROTECT, which waits for nobody.

mod foreign;
mod guard;
mod ledger;
mod mapping;
mod own;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};

use crate::lock::RwLock;
use userfault_uffd::abi::{
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED,
};
use userfault_uffd::{KernelFaults, OpenOptions, Uffd};

pub use foreign::read_foreign;
pub use guard::{Aside, Begun, Guard, Held, Saved};
pub use ledger::Ledger;
pub use mapping::{Untrackable, huge_share, mapped, trackable};
pub use own::{Tracked, TrackedKind};

use crate::engine::Engine;
use crate::error::Error;

/// What is tracked in this process.
#[derive(Default)]
pub(crate) struct Registry {
    /// All consumers of silent tracking. The lock is held from a scan to the end of its bookkeeping, so
    /// that no evidence is taken by one harvest and missed by another consumer: for writing by who takes
    /// evidence from the kernel, for reading by who only looks at it.
    ledgers: RwLock<Vec<Weak<ledger::Pages>>>,
    /// Our own tracked memory, by address.
    own: RwLock<BTreeMap<usize, Weak<Tracked>>>,
    guard: OnceLock<Uffd>,
}

impl Registry {
    /// Our own memory that holds all of `len` bytes at `address`.
    pub(crate) fn own(&self, address: usize, len: usize) -> Option<Arc<Tracked>> {
        let own = self.own.read();
        let (_, memory) = own.range(..=address).next_back()?;
        let memory = memory.upgrade()?;
        (address + len <= memory.start() + memory.len()).then_some(memory)
    }

    /// The userfaultfd of guarded memory, once there is some.
    pub(crate) fn guard(&self) -> Option<&Uffd> {
        self.guard.get()
    }
}

impl Engine {
    /// The userfaultfd of guarded memory; begins to serve it.
    fn guard_uffd(&'static self) -> Result<&'static Uffd, Error> {
        if let Some(uffd) = self.tracked.guard.get() {
            return Ok(uffd);
        }
        let options = OpenOptions {
            // A system call that writes protected memory must wait like any other write.
            kernel_faults: KernelFaults::Required,
            nonblocking: false,
            require: UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_THREAD_ID,
            prefer: UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED,
            ..OpenOptions::default()
        };
        let uffd = Uffd::open(&options).map_err(|error| Error::Os {
            call: "opening a userfaultfd for huge pages",
            errno: error.errno(),
            advice: format!("{error}; pages=\"4KiB\" can be tracked without it"),
        })?;
        use std::os::fd::AsRawFd;
        let fd = uffd.as_raw_fd();
        if self.tracked.guard.set(uffd).is_ok() {
            crate::fork::keep(&[crate::fork::Kept::Descriptor(fd)]);
            if !self.guards.start(self) {
                return Err(Error::last_os("starting a thread for huge pages", ""));
            }
        }
        Ok(self.tracked.guard.get().expect("set above"))
    }
}

/// The tracked memory of our own that holds all of `len` bytes at `address`, if they are such.
pub fn own_memory(address: usize, len: usize) -> Option<Arc<Tracked>> {
    Engine::existing()?.tracked.own(address, len)
}
