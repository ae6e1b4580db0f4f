//! Fault loop, block table, residency, write-back: the engine of user-space paging.
//!
//! ```text
//!   fault source  ->  engine (loop, block table, scheduler)  ->  resolver
//!   a userfaultfd     one owner of "where is this block now"     what a missing or minor fault means
//! ```
//!
//! | file | concept |
//! |---|---|
//! | `block` | the states of a block and the answers to faults, as pure functions |
//! | `table`, `entries`, `dirty` | where every block of a region is, a word for each, and which pages differ from their home |
//! | `workers`, `answer`, `fill`, `halfway` | threads that read messages; what a fault means; bringing blocks in |
//! | `ahead`, `convoy` | bringing in what nobody has asked for yet; small neighbours at one go |
//! | `admission` | how many blocks are brought in at once, and for whom next when memory is short |
//! | `flight`, `aio` | reads that the kernel does while nobody waits for them |
//! | `policy` | who leaves memory next: pure, and run by the simulator in `sim/` |
//! | `pool`, `room`, `limit` | who is in memory, under which limit, and that everybody gets on |
//! | `evict`, `clean` | leaving memory, write-back |
//! | `drain`, `homeward` | copying what is dirty in the background, for regions and for checkpoints; for regions |
//! | `protect` | synchronous write-protection: the table knows what was written |
//! | `presumption` | blocks that are mapped writable, since others like them were written whole |
//! | `clock`, `poison`, `bar` | deadlines, blocks that could not be had, and how a touch of one ends |
//! | `errand` | calls of stores on behalf of somebody who does not wait for ever |
//! | `abilities` | what the running kernel has, and what takes the place of what it lacks |
//! | `memory`, `huge_tmpfs`, `kernel` | mappings, huge pages, and what is asked of the kernel |
//! | `store_mapping` | stores that are in memory themselves: the kernel copies straight from there, and to there |
//! | `staging`, `buffer` | bytes between a store and memory that others may see, and what they lie in |
//! | `readahead` | walks, and what to bring in for them |
//! | `region`, `access`, `pin`, `prefetch`, `closing` | what a user of the crate calls |
//! | `shape` | which blocks and which pages a region gets |
//! | `stats`, `figures` | what is counted; gathering it for regions and for the process |
//! | `tracked` | memory whose writes are noted for checkpoints, and how |
//! | `backing`, `served` | where the bytes of a block go; the memory of other processes |
//! | `trace` | recording faults for the simulator |
//! | `watch` | the debug option: no write is missed |
//! | `inline`, `futex` | faults answered in the touching thread, and the locks for that |
//! | `defects` | wrong rules that a build for tests can put back |
//! | `fork`, `lock`, `signals` | what a child gets; locks that survive it; threads without signals |
//! | `elsewhere` | whom a cut keeps off the processor of its caller |
//!
//! # Locks
//! A region's table (`Body::lock`), then a pool's state. The registries, the queue of the workers, the
//! clock's list and the drain's state are leaves. Nothing is locked while a store is called, a fault can
//! happen, or a block is waited for. A handler never touches memory that it serves.
//!
//! # Promises
//! * A page is not seen before it is whole.
//! * No CPU write is lost: what is not proved clean is dirty, a failed write-back keeps its data.
//! * A block has one owner at a time; whatever happens to it, its sleepers are woken at the end.
//! * Every open fault has a deadline, after which its toucher gets SIGBUS and the cause is told.
//! * Fail-stop: memory that is no longer served cannot be touched; it never reads as zeros.

pub mod abilities;
mod access;
mod admission;
mod ahead;
mod aio;
mod answer;
mod backing;
mod bar;
pub mod block;
mod body;
mod buffer;
mod clean;
mod clock;
mod closing;
mod convoy;
#[cfg(not(feature = "defects"))]
mod defects;
#[cfg(feature = "defects")]
pub mod defects;
pub mod dirty;
pub mod drain;
pub mod elsewhere;
mod engine;
mod entries;
mod errand;
mod error;
mod evict;
mod figures;
mod fill;
mod flight;
mod fork;
mod futex;
mod halfway;
mod homeward;
mod huge_tmpfs;
mod inline;
mod kernel;
mod leak;
pub mod limit;
pub mod lock;
mod memory;
mod pin;
mod poison;
pub mod policy;
pub mod pool;
mod prefetch;
mod presumption;
mod protect;
mod raw_read;
pub mod readahead;
mod region;
mod room;
mod say;
mod served;
mod shape;
mod shortage;
mod signals;
mod staging;
mod stats;
mod store_mapping;
mod table;
mod threads;
mod trace;
pub mod tracked;
mod watch;
mod workers;

use std::sync::Arc;
use std::time::Duration;

pub use error::Error;
pub use figures::stats;
pub use fork::{Kept, forget, generation, keep};
pub use memory::hugetlb_free;
pub use pin::Pin;
pub use prefetch::PrefetchTicket;
pub use region::Region;
pub use room::set_memory_limit;
pub use served::{Lies, Owed, ServeOptions, Served, ServedError, Written, serve};
pub use signals::BlockedSignals;
pub use stats::Stats;
pub use table::BlockError;
pub use threads::StoodBack;
pub use trace::write_out as write_out_trace;
use userfault_store::Store;

/// What may be done with the memory of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing; what is written goes to the store.
    ReadWrite,
    /// Reading and writing; what is written is nobody else's and ends with the region. It goes to the
    /// store, a scratch one, only to make room.
    Private,
}

/// Which pages a region lives on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// 2 MiB for blocks of that size and more, where the machine has them; else small ones.
    Auto,
    /// The kernel's small pages.
    Small,
    /// 2 MiB.
    Huge,
}

/// Who answers a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultWay {
    /// Threads of the engine.
    Threads,
    /// The thread that touches, in its handler of SIGBUS.
    Inline,
}

/// What happens when a block cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Retry for remote stores, poison for others.
    Auto,
    /// Try again until `retry_for` is over, then poison.
    Retry,
    /// Poison at the first error.
    Poison,
}

/// What a region should be.
#[derive(Debug, Clone)]
pub struct RegionOptions {
    /// For messages.
    pub name: String,
    /// Read-only or not.
    pub access: Access,
    /// Where the region begins in the store, bytes.
    pub offset: u64,
    /// Bytes, at least 1. The mapping is rounded up to a page; the tail reads as zeros and is not stored.
    pub len: u64,
    /// Bytes of a block, a power of two; `None` chooses.
    pub block: Option<usize>,
    /// Which pages.
    pub pages: Pages,
    /// Who answers its faults.
    pub fault: FaultWay,
    /// A limit for this region alone, bytes.
    pub memory_limit: Option<u64>,
    /// What a failed read means.
    pub on_error: OnError,
    /// How long a read may take or be tried again.
    pub retry_for: Duration,
}

/// Opens a part of `store` as memory.
pub fn open(store: Arc<dyn Store>, options: RegionOptions) -> Result<Arc<Region>, Error> {
    Region::open(store, options)
}
