//! Memory that is made to be tracked.
//!
//! Unsafe: maps and unmaps private anonymous memory.
//!
//! It is never evicted, and counts against the memory limit from the beginning. A forked child gets small
//! and transparent huge pages as any private memory (a copy at the instant of the fork, not tracked);
//! hugetlb pages it does not get, since a write on either side would need another page of the pool.

use std::ptr;
use std::sync::Arc;

use userfault_uffd::abi::UFFDIO_REGISTER_MODE_WP;

use super::guard::Guard;
use crate::Pages;
use crate::engine::Engine;
use crate::error::Error;
use crate::fork::{self, Kept};
use crate::memory::{HUGE, hugetlb_free, small_page};

/// Memory of this size and more gets huge pages with "auto", where the machine has them. Bytes.
const AUTO_HUGE_FROM: usize = 64 << 20;

/// What tracked memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrackedKind {
    /// Small pages, tracked silently.
    Small,
    /// Anonymous memory of transparent huge pages, guarded.
    Transparent,
    /// hugetlb pages of 2 MiB, guarded.
    Hugetlb,
}

impl TrackedKind {
    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            TrackedKind::Small => "4KiB",
            TrackedKind::Transparent => "2MiB transparent",
            TrackedKind::Hugetlb => "2MiB hugetlb",
        }
    }
}

/// A range of memory that is tracked for life.
#[derive(Debug)]
pub struct Tracked {
    start: usize,
    len: usize,
    kind: TrackedKind,
    generation: u32,
    charged: u64,
    pub(super) guard: Option<Guard>,
}

impl Tracked {
    /// `len` zero bytes, rounded up to a page. Fails with [`Error::Memory`] if the memory limit does not
    /// leave them.
    pub fn new(len: usize, pages: Pages) -> Result<Arc<Tracked>, Error> {
        let engine = Engine::current()?;
        match pages {
            Pages::Small => Tracked::of(engine, len, TrackedKind::Small),
            Pages::Huge => {
                if engine.abilities.hugetlb
                    && hugetlb_free() >= len.div_ceil(HUGE) as u64
                    && let Ok(memory) = Tracked::of(engine, len, TrackedKind::Hugetlb)
                {
                    return Ok(memory);
                }
                if !transparent() {
                    return Err(Error::Invalid(
                        "pages=\"2MiB\": the pool has too few huge pages (sysctl vm.nr_hugepages) and \
                         /sys/kernel/mm/transparent_hugepage/enabled is \"never\""
                            .into(),
                    ));
                }
                Tracked::of(engine, len, TrackedKind::Transparent)
            }
            // Without faults of the kernel's own accesses a system call that writes would get EFAULT.
            Pages::Auto if len >= AUTO_HUGE_FROM && engine.uffd.kernel_faults() => {
                match Tracked::new(len, Pages::Huge) {
                    Err(Error::Invalid(_) | Error::Os { .. }) => {
                        Tracked::of(engine, len, TrackedKind::Small)
                    }
                    result => result,
                }
            }
            Pages::Auto => Tracked::of(engine, len, TrackedKind::Small),
        }
    }

    fn of(engine: &'static Engine, len: usize, kind: TrackedKind) -> Result<Arc<Tracked>, Error> {
        let page = match kind {
            TrackedKind::Small => small_page(),
            _ => HUGE,
        };
        let len = len.next_multiple_of(page);
        engine.reserve_tracked(len as u64, kind != TrackedKind::Hugetlb)?;
        let memory = match map(len, kind) {
            Ok(start) => Tracked {
                start,
                len,
                kind,
                generation: fork::generation(),
                charged: len as u64,
                guard: (kind != TrackedKind::Small).then(|| Guard::new(start, len)),
            },
            Err(error) => {
                engine.give_back_tracked(len as u64, kind != TrackedKind::Hugetlb);
                return Err(error);
            }
        };
        // From here on a failure gives everything back by dropping `memory`. Small pages are registered
        // by whoever wants to know what is written (see `Ledger`).
        if kind != TrackedKind::Small {
            let uffd = engine.guard_uffd()?;
            let outcome = uffd.register(memory.start, memory.len, UFFDIO_REGISTER_MODE_WP);
            if !outcome.is_ok() {
                return Err(Error::Os {
                    call: "UFFDIO_REGISTER",
                    errno: outcome.errno,
                    advice: format!("{} memory cannot be tracked by this kernel", kind.name()),
                });
            }
        }
        let memory = Arc::new(memory);
        let mut own = engine.tracked.own.write();
        own.retain(|_, memory| memory.strong_count() > 0);
        own.insert(memory.start, Arc::downgrade(&memory));
        drop(own);
        if kind == TrackedKind::Hugetlb {
            fork::keep(&[Kept::Range(memory.start, memory.len)]);
        }
        Ok(memory)
    }

    /// Address of the first byte.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Bytes, a multiple of the page.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: it has at least a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it is made of.
    pub fn kind(&self) -> TrackedKind {
        self.kind
    }

    /// How it is tracked, if it is guarded.
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }
}

impl Drop for Tracked {
    /// Nobody can hold a pointer into the memory any more.
    fn drop(&mut self) {
        if self.generation != fork::generation() && self.kind == TrackedKind::Hugetlb {
            // What the child has there is not this memory.
            return;
        }
        // SAFETY: the range was mapped by `map`, and its owner gives it up. In a child it is a copy.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
        if self.generation != fork::generation() {
            return;
        }
        if self.kind == TrackedKind::Hugetlb {
            fork::forget(&[Kept::Range(self.start, self.len)]);
        }
        if let Some(engine) = Engine::existing() {
            engine.give_back_tracked(self.charged, self.kind != TrackedKind::Hugetlb);
        }
    }
}

/// True if anonymous memory can get huge pages by advice.
fn transparent() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|text| !text.contains("[never]"))
}

fn map(len: usize, kind: TrackedKind) -> Result<usize, Error> {
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    if kind == TrackedKind::Hugetlb {
        flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    }
    // Room to begin at a multiple of a huge page. hugetlb begins there by itself.
    let spare = if kind == TrackedKind::Transparent {
        HUGE
    } else {
        0
    };
    // SAFETY: the kernel chooses the address; nothing is replaced.
    let raw = unsafe { libc::mmap(ptr::null_mut(), len + spare, rights, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        let errno = std::io::Error::last_os_error().raw_os_error();
        if errno == Some(libc::ENOMEM) {
            return Err(Error::Memory {
                asked: len as u64,
                limit: 0,
                what: format!("tracked memory on {} pages", kind.name()),
            });
        }
        return Err(Error::last_os(
            "mmap",
            format!("of {len} bytes to be tracked"),
        ));
    }
    let raw = raw as usize;
    let start = if spare > 0 {
        raw.next_multiple_of(HUGE)
    } else {
        raw
    };
    for (from, to) in [(raw, start), (start + len, raw + len + spare)] {
        if from < to {
            // SAFETY: a part of the mapping just made, outside of what is kept.
            unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
        }
    }
    let advise = |advice| {
        // SAFETY: the range was just mapped; the advices change how it is paged, and populate it.
        unsafe { libc::madvise(start as *mut libc::c_void, len, advice) }
    };
    match kind {
        TrackedKind::Small => {
            // A huge page would be split by the first write after each harvest.
            advise(libc::MADV_NOHUGEPAGE);
        }
        TrackedKind::Transparent | TrackedKind::Hugetlb => {
            if kind == TrackedKind::Transparent {
                advise(libc::MADV_HUGEPAGE);
            } else {
                advise(libc::MADV_DONTFORK);
            }
            // Protection of what is not there would put small entries in its place, and it has been
            // charged anyhow.
            if advise(libc::MADV_POPULATE_WRITE) < 0 {
                let error = Error::last_os("taking huge pages", "");
                // SAFETY: the range was just mapped and nobody knows it.
                unsafe { libc::munmap(start as *mut libc::c_void, len) };
                return Err(error);
            }
        }
    }
    Ok(start)
}
