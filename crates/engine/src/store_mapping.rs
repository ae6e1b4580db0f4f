//! A mapping of a store's file, where that is in memory itself: the kernel copies straight from there, and to there.
//!
//! A file in tmpfs is read and written by calls that look up each page of 4 KiB, and writes of one file exclude each
//! other. A mapping of it costs that once: afterwards a block of 2 MiB is one UFFDIO_COPY from the mapping, which needs
//! no page that was cleared before; and what leaves is one read(2) of the region's memory into the mapping.
//!
//! Only the kernel touches the mapping. Where a touch would be SIGBUS, since somebody has cut the file short or its
//! file system is full, the kernel says EFAULT or copies less; then the ordinary way is gone, which finds out what is
//! wrong. So each way out of here is `None` or false, and never an error.
//!
//! * A hole is not read here: a fault would fill it with a page. mincore(2) says before whether all pages are there.
//! * A file that has become shorter is not used at all (see [`Store::in_memory`](userfault_store::Store::in_memory)). One
//!   that is cut short while a block is copied may show zeros in the last page that it still has, as a read of
//!   it at that moment may.
//! * The page tables count against the limit, and are at most one in [`SHARE`] of it: beyond that the part that was
//!   mapped first is unmapped again.
//! * A block that is copied has an owner, who also owns its bytes in the store. So nobody reads here what another one
//!   writes, and the mapping goes when the view does.
//!
//! Only huge pages come in this way. Small ones are looked up one by one in any case, and a copy of a hot buffer is
//! as fast as one from here: a sort on 4 KiB pages took as long. Any pages leave this way, if enough of them leave
//! at once.
//!
//! Locks: the list of what is mapped is a leaf.
//!
//! Unsafe: maps a file, and hands its addresses to the kernel.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::OnceLock;

use crate::body::Body;
use crate::engine::Engine;
use crate::kernel::Evidence;
use crate::lock::Mutex;
use crate::memory::{self, HUGE, Kind, small_page};
use crate::stats::add;

/// Page tables are at most one in so many bytes of the limit.
const SHARE: u64 = 64;

/// Bytes to be written at once before that pays: a page table may have to be made, and another one given back.
const LEAST_WRITTEN: usize = 64 << 10;

/// Pages that mincore is asked for at once.
const ASKED: usize = 512;

/// The mapping of one region's part of its store, made when it is first of use.
#[derive(Debug, Default)]
pub(crate) struct StoreMapping {
    mapped: OnceLock<Option<Mapped>>,
}

#[derive(Debug)]
struct Mapped {
    /// Where the region's first byte is.
    first: usize,
    start: usize,
    len: usize,
    spans: Mutex<Spans>,
}

/// Parts of the size that one page table maps, by number.
#[derive(Debug, Default)]
struct Spans {
    /// True if all of it is mapped.
    mapped: HashMap<usize, bool>,
    /// Those in the order in which they were mapped.
    order: VecDeque<usize>,
    gone: bool,
}

/// What a range is mapped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    Reading,
    Writing,
}

impl Mapped {
    /// Maps the file behind `fd` for a region of `len` bytes that begins at `offset` of it.
    fn new(fd: BorrowedFd<'_>, offset: u64, len: usize, writable: bool) -> Option<Mapped> {
        let page = small_page();
        let before = offset as usize % page;
        let len = (before + len).next_multiple_of(page);
        let start = memory::map_file(fd, offset - before as u64, len, writable)?;
        Some(Mapped {
            first: start + before,
            start,
            len,
            spans: Mutex::default(),
        })
    }

    /// True if every page of a range is in memory, here or in the page cache.
    fn is_there(&self, from: usize, to: usize) -> bool {
        let page = small_page();
        let mut there = [0_u8; ASKED];
        (from..to).step_by(ASKED * page).all(|at| {
            let len = (to - at).min(ASKED * page);
            // SAFETY: `there` has a byte for each page of the range, which lies in the mapping.
            let asked =
                unsafe { libc::mincore(at as *mut libc::c_void, len, there.as_mut_ptr().cast()) };
            asked == 0 && there[..len / page].iter().all(|byte| byte & 1 != 0)
        })
    }

    fn advise(&self, from: usize, to: usize, advice: i32) -> bool {
        debug_assert!(from >= self.start && to <= self.start + self.len);
        // SAFETY: the range lies in the mapping. Populating it and dropping its entries change no byte.
        unsafe { libc::madvise(from as *mut libc::c_void, to - from, advice) == 0 }
    }

    /// Where `len` bytes at `start` of the region are, mapped. `most` page tables may be in use, and those beyond are given
    /// back by `drops`. The answer has how many more are in use now.
    fn range(
        &self,
        start: usize,
        len: usize,
        what_for: For,
        most: usize,
        drops: bool,
    ) -> (Option<usize>, i64) {
        let page = small_page();
        let (at, mut more) = (self.first + start, 0);
        let (from, to) = (at / page * page, (at + len).next_multiple_of(page));
        if what_for == For::Reading && !self.is_there(from, to) {
            return (None, 0);
        }
        let (mut dropped, mut whole) = (Vec::new(), true);
        {
            let mut spans = self.spans.lock();
            if spans.gone {
                return (None, 0);
            }
            for span in from / HUGE..to.div_ceil(HUGE) {
                match spans.mapped.get(&span) {
                    Some(all) => whole &= *all || what_for == For::Writing,
                    None if spans.order.len() >= most && !drops => return (None, more),
                    None => {
                        if spans.order.len() >= most.max(1)
                            && let Some(oldest) = spans.order.pop_front()
                        {
                            spans.mapped.remove(&oldest);
                            dropped.push(oldest);
                            more -= 1;
                        }
                        spans.mapped.insert(span, false);
                        spans.order.push_back(span);
                        more += 1;
                        whole = false;
                    }
                }
            }
        }
        for span in dropped {
            let from = (span * HUGE).max(self.start);
            let to = ((span + 1) * HUGE).min(self.start + self.len);
            self.advise(from, to, libc::MADV_DONTNEED);
        }
        if whole {
            return (Some(at), more);
        }
        let advice = match what_for {
            For::Reading => libc::MADV_POPULATE_READ,
            For::Writing => libc::MADV_POPULATE_WRITE,
        };
        if !self.advise(from, to, advice) {
            return (None, more);
        }
        if what_for == For::Reading {
            let mut spans = self.spans.lock();
            for span in from.div_ceil(HUGE)..to / HUGE {
                if let Some(all) = spans.mapped.get_mut(&span) {
                    *all = true;
                }
            }
        }
        (Some(at), more)
    }

    /// Unmaps everything, once. Says how many page tables were in use.
    fn end(&self) -> i64 {
        let mut spans = self.spans.lock();
        if std::mem::replace(&mut spans.gone, true) {
            return 0;
        }
        memory::unmap(self.start, self.len);
        std::mem::take(&mut spans.mapped).len() as i64
    }
}

impl StoreMapping {
    /// Unmaps everything. Nobody owns a block of the region. Says how many bytes of page tables were in use.
    pub(crate) fn end(&self) -> i64 {
        let mapped = self.mapped.get().and_then(Option::as_ref);
        mapped.map_or(0, Mapped::end) * small_page() as i64
    }
}

impl Engine {
    /// Where bytes of a region's store are mapped, for the kernel to copy from or to.
    fn in_store(&self, body: &Body, start: usize, len: usize, what_for: For) -> Option<usize> {
        let pays = match what_for {
            For::Reading => body.memory.huge(),
            For::Writing => len >= LEAST_WRITTEN,
        };
        if !pays
            || self.hashing
            || self.evidence(body) == Evidence::Table
            || body.stored(start, len) != len
        {
            return None;
        }
        let store = &body.store.0;
        let (fd, _) = store.in_memory(body.store_offset + start as u64, len)?;
        let mapped = body.store_mapping.mapped.get_or_init(|| {
            let (_, offset) = store.in_memory(body.store_offset, body.len)?;
            Mapped::new(fd, offset, body.len, body.writable())
        });
        let limit = self.pool_of(body).figures().limit;
        let most = (limit / SHARE) as usize / small_page();
        let drops = self.abilities.frees_tables;
        let (at, more) = mapped.as_ref()?.range(start, len, what_for, most, drops);
        self.charge(body, more * small_page() as i64);
        at
    }

    /// Fills a block straight from where its store has it in memory. False: nothing happened, and the block has to be
    /// filled in another way.
    pub(crate) fn fill_from_store(&self, body: &Body, block: u32) -> bool {
        let (start, len) = (body.start(block), body.block_len(block));
        // One page is there whole or not at all. What lies over a block that is tried again stays to others.
        if body.memory.kind() != Kind::Hugetlb
            || len != body.memory.page()
            || !self.abilities.poison
        {
            return false;
        }
        let Some(at) = self.in_store(body, start, len, For::Reading) else {
            return false;
        };
        let filled = self.copy_page_bare(body, block, at);
        if filled {
            add(&body.counters.bytes_read, len as u64);
        }
        filled
    }

    /// Reads bytes into claimed memory of an owned block straight from where the store has them in memory. False: what is
    /// there now is not known.
    pub(crate) fn read_from_store(&self, body: &Body, start: usize, len: usize) -> bool {
        let (Some(fd), Kind::HugeTmpfs) = (body.memory.fd(), body.memory.kind()) else {
            return false;
        };
        let at = self.in_store(body, start, len, For::Reading);
        let read = at.is_some_and(|at| copied(to_memory, fd, start, at, len));
        if read {
            add(&body.counters.bytes_read, len as u64);
        }
        read
    }

    /// Writes what rests of an owned block straight to where the store has it in memory. False: it has to be
    /// written in another way.
    pub(crate) fn write_to_store(&self, body: &Body, start: usize, len: usize) -> bool {
        let Some(fd) = body.memory.fd().filter(|_| body.writable()) else {
            return false;
        };
        let at = self.in_store(body, start, len, For::Writing);
        let written = at.is_some_and(|at| copied(from_memory, fd, start, at, len));
        if written {
            body.store.0.was_written();
            add(&body.counters.bytes_written, len as u64);
        }
        written
    }
}

/// Copies between the memory of a region, from `start` on, and `at`; repeats the call until all is done. False if it does
/// nothing or fails.
fn copied(
    call: fn(RawFd, usize, usize, usize) -> isize,
    fd: RawFd,
    start: usize,
    at: usize,
    len: usize,
) -> bool {
    let mut done = 0;
    while done < len {
        match call(fd, start + done, at + done, len - done) {
            n if n > 0 => done += n as usize,
            _ => return false,
        }
    }
    true
}

/// Has the kernel write bytes at `from` into the memory of a region.
fn to_memory(fd: RawFd, start: usize, from: usize, len: usize) -> isize {
    // SAFETY: the kernel reads memory of this process, and says EFAULT where it cannot.
    unsafe { libc::pwrite(fd, from as *const libc::c_void, len, start as libc::off_t) }
}

/// Has the kernel read the memory of a region to `into`.
fn from_memory(fd: RawFd, start: usize, into: usize, len: usize) -> isize {
    // SAFETY: `into` lies in a mapping of a store, of which no reference exists: its bytes are the store's, and the
    // owner of the block is the only one who writes them.
    unsafe { libc::pread(fd, into as *mut libc::c_void, len, start as libc::off_t) }
}
