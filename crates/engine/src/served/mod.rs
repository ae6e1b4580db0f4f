//! The memory of other processes: a userfaultfd that somebody else made, and what this process owes it.
//!
//! Unsafe: pidfd_open, for which the standard library has no function.
//!
//! A process registers memory with a userfaultfd, and hands a copy of the descriptor to a page server together
//! with a layout: these bytes of my memory are those bytes of your store. From then on the server **owes** every
//! page its bytes, until they are delivered or the process throws the page away:
//!
//! ```text
//!            fault, read, COPY; or the page was there (EEXIST)
//!   owed ------------------------------------------------------> settled <--+
//!     |          REMOVE (madvise DONTNEED, FREE, REMOVE)             ^  |     | missing: a page of zeros
//!     +--------------------------------------------------------------+  +-----+ minor: CONTINUE
//! ```
//!
//! A settled page is the process's own affair. If it is missing, the process has thrown it away, and then it is
//! zeros, never the store's old bytes. No page is ever owed again. Blocks, deadlines, retries, poison and
//! read-ahead are those of the engine: a block of a piece is Absent as long as one of its pages is owed.
//!
//! # What an event does
//!
//! | event | effect |
//! |---|---|
//! | REMOVE | the pages are settled: the store owes them nothing any more |
//! | UNMAP | the place is dropped from the layout; nothing is filled there |
//! | REMAP | the piece follows to its new address; what is left at the old one is zeros |
//! | FORK | the child becomes a process of its own, with what was owed to its parent at the fork; memory that both share stays owed once |
//! | exit, exec | a call answers ESRCH: the process is forgotten |
//!
//! Memory that is registered and that the layout does not name (it grew by mremap) is zeros.
//!
//! # Why no byte comes late
//! Between the moment a fill looks up where its bytes belong and the moment it puts them there, the process may
//! throw the page away, and the bytes would come back from the dead. Two facts exclude that. The kernel refuses
//! every fill from the moment before a change to the moment its event has been read; and here, *reading a
//! message and applying it* takes the family's lock to write, while *looking up and putting in place* takes it
//! to read. So a fill that succeeds saw a layout in which every change is applied. A fill that is refused reads
//! what waits, and tries again after a pause. Faults overtake events in the queue, so a fault may name memory
//! that is about to go, or that has not yet come: it is answered like any other, refused, and looked up again.
//!
//! Whoever slept where something changed is woken and asks again; a fill wakes its whole block if anybody waits
//! or a page was there already.
//!
//! Memory on which MADV_DONTNEED keeps the bytes (shared memory) sends the same REMOVE as MADV_REMOVE, which does
//! not: such a page counts as thrown away unless it has been delivered. fallocate(PUNCH_HOLE) and ftruncate send
//! nothing: what was owed then is still owed. And a page that lies twice in one process must be named once.
//!
//! # What the limit means there
//! The memory belongs to the other process, and is charged to it: the memory limit of this process does not cover
//! it, and nothing is evicted. (MADV_DONTNEED for another process is EINVAL, and punching a hole takes the page
//! from every mapping without saying whether it was clean. A server that owns the memory itself, as a memfd, can
//! open it as a region.)
//!
//! # When somebody dies
//! *The server*: the kernel unregisters memory when the last copy of its userfaultfd is closed, and whoever waits
//! goes on into zeros. So **the process must keep a copy of the descriptor**. Then its touches wait, for good, or
//! until it hands the copy to another server. *The process*: its descriptors and tables are freed. `Served::close`
//! poisons what is still owed, unless it is told that another server takes over.
//!
//! # Locks
//! `Family::members`, then a body's table, which with tracked writes is held over UFFDIO_WRITEPROTECT (it waits for
//! nobody; see `protect`); `Piece::owed` is a leaf. `members` is held over COPY, ZEROPAGE, CONTINUE, POISON and WAKE:
//! they wait for the other process's memory map, and no thread holds that while it waits for an event to be read.

mod delivery;
mod handle;
mod layout;
mod peers;
mod process;
mod protection;
mod resolve;

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::lock::{Condvar, Mutex, RwLock};
use userfault_store::Store;
use userfault_uffd::Uffd;
use userfault_uffd::abi::{
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_SIGBUS, UFFD_FEATURE_WP_ASYNC,
    UFFDIO_WRITEPROTECT_MODE_WP,
};

pub use handle::{Owed, Served, ServedError, Written};
pub(crate) use peers::{Peers, Registry};

use crate::OnError;
use crate::dirty::DirtyMap;
use crate::engine::Engine;
use crate::error::Error;
use crate::memory::{HUGE, small_page};
use crate::shape::{AUTO_SMALL, LARGEST_BLOCK};
use crate::stats::Counters;
use layout::{Layout, Segment};
use process::{Events, Family, Member, Process, Terms, piece};

/// One item of a layout: where bytes of the store lie in the memory of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lies {
    /// Address of the first byte in that process, a multiple of the page.
    pub address: usize,
    /// Bytes, a multiple of the page.
    pub len: usize,
    /// Where they begin in the store, bytes.
    pub store_offset: u64,
    /// Bytes of a page of that memory: the kernel's small page, or 2 MiB on hugetlb.
    pub page: usize,
    /// The memory is shared (MAP_SHARED): a forked child has the same. `None`: ask /proc, if the process is
    /// known; otherwise it is private.
    pub shared: Option<bool>,
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// For messages.
    pub name: String,
    /// Bytes that a fault brings in, a power of two; `None` chooses. Never less than a page.
    pub block: Option<usize>,
    /// What a failed read means.
    pub on_error: OnError,
    /// How long a read may take or be tried again.
    pub retry_for: Duration,
    /// The process, if it is known: then its end is noticed at once.
    pub pid: Option<u32>,
    /// Note which pages are written. The memory must be registered for write-protection too.
    pub track: bool,
}

/// Serves the memory of the process that made `uffd` and registered what `layout` names: its pages come from
/// `store` when they are touched.
///
/// `uffd` is a copy of its userfaultfd; it becomes non-blocking for everybody who holds one. That process keeps
/// another copy, or the death of this one would hand it zeros. Whoever sleeps there already is woken, so a server
/// may take over from one that died: then `layout` names what is still owed, and no more.
///
/// What is already there is left alone. See the text of the module `served` for what its fork, mremap, munmap
/// and madvise do, which it should ask to be told of (UFFD_FEATURE_EVENT_...).
pub fn serve(
    uffd: OwnedFd,
    layout: &[Lies],
    store: Arc<dyn Store>,
    options: ServeOptions,
) -> Result<Served, Error> {
    let uffd = Uffd::given(uffd).map_err(|error| Error::Os {
        call: "serving a descriptor",
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
        advice: "it must be a userfaultfd whose handshake (UFFDIO_API) is done".into(),
    })?;
    check(&uffd, layout, &*store, &options)?;
    let pidfd = options.pid.map(open_pidfd).transpose()?;
    let engine = Engine::current()?;
    engine.peers.start(engine)?;
    let family = Arc::new(Family {
        terms: Terms {
            name: options.name.clone(),
            on_error: options.on_error,
            retry_for: options.retry_for,
            read_turn: engine.read_turn(&store),
            track: options.track,
        },
        members: RwLock::new(BTreeMap::new()),
        events: Events::default(),
        past: Counters::new(),
        past_errors: Mutex::default(),
        alive: Mutex::new(true),
        ended: Condvar::new(),
    });
    let process = Process::new(engine, uffd, pidfd, &family);
    if options.track {
        protect_all(&process, layout)?;
    }
    let mut places = Layout::new();
    let mut pieces = Vec::new();
    for (item, lies) in layout.iter().enumerate() {
        let pages = lies.len / lies.page;
        let mut owed = DirtyMap::new(pages);
        owed.insert(0..pages);
        let own = Arc::new(piece(
            engine,
            &process,
            store.clone(),
            item,
            lies.store_offset,
            lies.len,
            lies.page,
            block(lies, &*store, options.block),
            lies.shared
                .unwrap_or_else(|| options.pid.is_some_and(|pid| is_shared(pid, lies.address))),
            Arc::new(Mutex::new(owed)),
        ));
        places.put(Segment {
            at: lies.address,
            len: lies.len,
            piece: own.clone(),
            offset: 0,
        });
        pieces.push(own);
    }
    let member = Member {
        process: process.clone(),
        pieces,
        layout: places,
    };
    family.members.write().insert(process.id, member);
    if let Err(error) = engine.peers.admit(&process) {
        process.retire(engine);
        return Err(error);
    }
    // Whoever was waiting for a server that is gone asks again.
    for lies in layout {
        process.wake(lies.address..lies.address + lies.len);
    }
    process.retire_if_gone(engine);
    Ok(Served {
        family,
        generation: crate::fork::generation(),
    })
}

fn check(
    uffd: &Uffd,
    layout: &[Lies],
    store: &dyn Store,
    options: &ServeOptions,
) -> Result<(), Error> {
    let invalid = |text: String| Err(Error::Invalid(text));
    if layout.is_empty() {
        return invalid("the layout is empty: nothing would be served".into());
    }
    if let Some(block) = options.block
        && !(block.is_power_of_two() && (small_page()..=LARGEST_BLOCK).contains(&block))
    {
        return invalid(format!(
            "block is {block} bytes; it must be a power of two from {} to {LARGEST_BLOCK}",
            small_page()
        ));
    }
    if uffd.has(UFFD_FEATURE_SIGBUS) {
        return invalid(
            "the userfaultfd has UFFD_FEATURE_SIGBUS: its faults are signals and never reach a server".into(),
        );
    }
    if options.track
        && (uffd.has(UFFD_FEATURE_WP_ASYNC) || !uffd.has(UFFD_FEATURE_PAGEFAULT_FLAG_WP))
    {
        return invalid(
            "writes can be tracked only if the userfaultfd has UFFD_FEATURE_PAGEFAULT_FLAG_WP and not \
             UFFD_FEATURE_WP_ASYNC"
                .into(),
        );
    }
    let mut ends = Vec::new();
    for lies in layout {
        let Lies {
            address,
            len,
            store_offset,
            page,
            ..
        } = *lies;
        if page != small_page() && page != HUGE {
            return invalid(format!(
                "the page size of {address:#x} is {page} bytes; it must be {} or {HUGE}",
                small_page()
            ));
        }
        if len == 0 || !len.is_multiple_of(page) || !address.is_multiple_of(page) {
            return invalid(format!(
                "{len} bytes at {address:#x} are no whole pages of {page} bytes"
            ));
        }
        let stored = store.len().next_multiple_of(page as u64);
        if address.checked_add(len).is_none()
            || store_offset
                .checked_add(len as u64)
                .is_none_or(|end| end > stored)
        {
            return invalid(format!(
                "{len} bytes at offset {store_offset} do not lie within {}, which has {} bytes",
                store.name(),
                store.len()
            ));
        }
        if len / block(lies, store, options.block) >= u32::MAX as usize {
            return invalid(format!("{len} bytes are too many; ask for larger blocks"));
        }
        ends.push(address..address + len);
    }
    ends.sort_by_key(|range| range.start);
    for pair in ends.windows(2) {
        if pair[0].end > pair[1].start {
            return invalid(format!(
                "the layout names the bytes at {:#x} twice",
                pair[1].start
            ));
        }
    }
    Ok(())
}

/// Bytes of a block.
fn block(lies: &Lies, store: &dyn Store, asked: Option<usize>) -> usize {
    let preferred = store.preferred_block().next_power_of_two();
    asked
        .unwrap_or_else(|| AUTO_SMALL.max(preferred))
        .clamp(lies.page, LARGEST_BLOCK)
}

fn protect_all(process: &Arc<Process>, layout: &[Lies]) -> Result<(), Error> {
    for lies in layout {
        let mode = UFFDIO_WRITEPROTECT_MODE_WP;
        let outcome = process.uffd.writeprotect(lies.address, lies.len, mode);
        match outcome.errno {
            0 | libc::ESRCH => {}
            libc::EAGAIN => {
                return Err(Error::Invalid(
                    "the process changed its memory before it was served; it must wait until it is"
                        .into(),
                ));
            }
            errno => {
                return Err(Error::Os {
                    call: "UFFDIO_WRITEPROTECT",
                    errno,
                    advice: format!(
                        "the memory at {:#x} must be registered with UFFDIO_REGISTER_MODE_WP too, for its \
                         writes to be tracked",
                        lies.address
                    ),
                });
            }
        }
    }
    Ok(())
}

fn open_pidfd(pid: u32) -> Result<(u32, OwnedFd), Error> {
    // SAFETY: the call takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    if fd < 0 {
        return Err(Error::last_os("pidfd_open", format!("of process {pid}")));
    }
    // SAFETY: the kernel just made it and nobody else has it.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// True if the mapping at an address of a process is shared. What cannot be found out counts as private.
fn is_shared(pid: u32, address: usize) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            return false;
        };
        let Some((start, end)) = range.split_once('-') else {
            return false;
        };
        let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
        (number(start)..number(end)).contains(&address) && rights.ends_with('s')
    })
}
