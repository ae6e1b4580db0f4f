//! What the engine asks of the kernel for a block it owns.
//!
//! Unsafe: fills of user memory. What keeps them sound: the caller owns the block, so nobody else maps it
//! or changes its pages, and buffers are the engine's own memory, which never faults into the engine.
//!
//! Every function says what it wakes: at the end of whatever happens to a block, its sleepers are woken.
//!
//! Memory that can be written is mapped write-protected, but for blocks that are presumed to be written (see
//! `presumption`). Before Linux 6.4 UFFDIO_CONTINUE cannot do
//! that: see [`Engine::continue_compared`].

use std::io;
use std::ops::Range;

use userfault_uffd::abi::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
    UFFDIO_CONTINUE_MODE_DONTWAKE, UFFDIO_CONTINUE_MODE_WP, UFFDIO_COPY_MODE_DONTWAKE,
    UFFDIO_COPY_MODE_WP, UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP, page_region,
};
use userfault_uffd::{Fill, Filled, Outcome, Scan, fill};

use crate::body::Body;
use crate::defects::{Defect, put_back};
use crate::engine::Engine;
use crate::error::Error;
use crate::protect::Protected;
use crate::staging;
use crate::table::Table;

/// Ranges that one call of PAGEMAP_SCAN reports at most.
const REGIONS: usize = 64;

fn failed(what: &str, filled: Filled) -> io::Error {
    match filled {
        Filled::Failed { errno, .. } => io::Error::from_raw_os_error(errno),
        Filled::ProcessGone => io::Error::from_raw_os_error(libc::ESRCH),
        other => io::Error::other(format!("{what}: {other:?}")),
    }
}

/// Who knows which pages of a mapped block were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// Nobody can write them.
    None,
    /// The kernel: WP_ASYNC and PAGEMAP_SCAN (Linux 6.7).
    Kernel,
    /// The block table: the first write to a page is a message.
    Table,
}

/// Bytes that are compared at once.
const COMPARED: usize = 1 << 20;

/// A mode of UFFDIO_CONTINUE without UFFDIO_CONTINUE_MODE_DONTWAKE.
const CONTINUE_WAKES: u64 = 0;

impl Engine {
    /// Who knows which pages of a mapped block were written.
    pub(crate) fn evidence(&self, body: &Body) -> Evidence {
        if !body.writable() {
            Evidence::None
        } else if self.abilities.wp_async {
            Evidence::Kernel
        } else {
            Evidence::Table
        }
    }

    /// Registers a region's memory, before its first touch.
    pub(crate) fn register(&self, body: &Body) -> Result<(), Error> {
        if put_back(Defect::UserfaultfdForEach) {
            crate::defects::open_one_for(body.id);
        }
        let outcome = self.register_range(body, 0, body.memory.len());
        if outcome.is_ok() {
            return Ok(());
        }
        Err(Error::Os {
            call: "UFFDIO_REGISTER",
            errno: outcome.errno,
            advice: format!(
                "{} memory is not supported by this kernel; see `userfault doctor`",
                body.memory.kind().name()
            ),
        })
    }

    /// Registers a part of a region's memory, before it can be touched.
    pub(crate) fn register_range(&self, body: &Body, start: usize, len: usize) -> Outcome {
        let mut mode = UFFDIO_REGISTER_MODE_MISSING;
        if body.memory.shared() {
            mode |= UFFDIO_REGISTER_MODE_MINOR;
        }
        if body.writable() {
            mode |= UFFDIO_REGISTER_MODE_WP;
        }
        self.uffd_of(body)
            .register(body.memory.main() + start, len, mode)
    }

    /// Wakes whoever sleeps on a block.
    pub(crate) fn wake(&self, body: &Body, block: u32) {
        body.backing.wake(self, body, block);
    }

    /// As [`Engine::wake`], for memory of this process.
    pub(crate) fn wake_here(&self, body: &Body, block: u32) {
        if let Some(doors) = &body.doors {
            // Nobody sleeps in the kernel.
            return doors.open(block);
        }
        // A range of a region that is being closed may be gone: then close wakes.
        let _ = self.uffd.wake(body.address(block), body.block_len(block));
    }

    /// Puts `bytes` into an absent block and maps it; wakes as [`Engine::copy`] does. After an error the first
    /// `placed` of them are in place.
    pub(crate) fn map_copy(
        &self,
        body: &Body,
        block: u32,
        bytes: &[u8],
        placed: &mut usize,
    ) -> io::Result<()> {
        if let Some(most) = crate::defects::copy_breaks_off_after(bytes.len()) {
            self.copy(body, block, &bytes[..most], placed)?;
            crate::defects::before_it_is_told();
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.copy(body, block, bytes, placed)
    }

    /// Maps an absent block whose bytes are in memory, whole; wakes as [`Engine::copy`] does.
    pub(crate) fn map_claimed(&self, body: &Body, block: u32) -> io::Result<()> {
        if let Some(most) = crate::defects::copy_breaks_off_after(body.block_len(block)) {
            self.continue_range(body, body.start(block), most, CONTINUE_WAKES)?;
            crate::defects::before_it_is_told();
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        if self.presumes_written(body, block) {
            return self.continue_in_mode(body, body.start(block), body.block_len(block), 0);
        }
        self.map_again(body, block)
    }

    /// The mode in which bytes are copied into an absent block, by who knows what is written then.
    fn copy_mode(&self, body: &Body, block: u32) -> u64 {
        match self.evidence(body) {
            Evidence::None => 0,
            Evidence::Kernel if self.presumes_written(body, block) => 0,
            Evidence::Kernel => UFFDIO_COPY_MODE_WP,
            Evidence::Table => UFFDIO_COPY_MODE_WP | UFFDIO_COPY_MODE_DONTWAKE,
        }
    }

    /// Puts `bytes` into an absent block, or the beginning of one; wakes, unless the table holds the evidence: then a
    /// thread that came to write would only meet the protection, and the caller wakes when it has lifted it.
    fn copy(&self, body: &Body, block: u32, bytes: &[u8], placed: &mut usize) -> io::Result<()> {
        let (start, mode) = (body.start(block), self.copy_mode(body, block));
        let page = body.memory.page();
        let exists = if body.memory.shared() {
            Fill::OwnAbsent
        } else {
            Fill::Shared
        };
        let address = body.memory.main() + start;
        let mut from = 0;
        *placed = 0;
        while from < bytes.len() {
            let filled = fill::fill(bytes.len() - from, page, exists, |at, len| {
                // SAFETY: `bytes` is the engine's own memory; the caller owns the block, so no reference
                // to its absent bytes exists outside of user threads that asked for exactly this.
                unsafe {
                    self.uffd_of(body).copy(
                        address + from + at,
                        bytes[from + at..].as_ptr() as usize,
                        len,
                        mode,
                    )
                }
            });
            match filled {
                Filled::Whole { skipped } => {
                    if skipped > 0 {
                        // EEXIST wakes nobody.
                        let _ = self.uffd_of(body).wake(address, bytes.len());
                    }
                    *placed = bytes.len();
                    return Ok(());
                }
                // The region's memory holds a page that it should not: write it through the view.
                Filled::StalePage { at } => {
                    let at = from + at;
                    // SAFETY: the caller owns the block, and the page is in memory.
                    unsafe { body.memory.copy_in(start + at, &bytes[at..at + page]) };
                    if body.writable() && !self.abilities.continue_protects {
                        self.continue_compared(body, start + at, &bytes[at..at + page])?;
                    } else {
                        self.continue_range(body, start + at, page, CONTINUE_WAKES)?;
                    }
                    let _ = self.uffd_of(body).wake(address + at, page);
                    from = at + page;
                    *placed = from;
                }
                // No events are asked for, so this passes by itself.
                Filled::EventPending { at } => {
                    from += at;
                    std::thread::yield_now();
                }
                other => {
                    if let Filled::Failed { at, .. } | Filled::LayoutChanged { at } = other {
                        *placed = from + at;
                    }
                    return Err(failed("UFFDIO_COPY", other));
                }
            }
        }
        Ok(())
    }

    /// Maps a block that is in memory, whole, and unmapped; wakes as [`Engine::copy`] does. Pages of it that
    /// are mapped already stay as they are, but for their protection.
    pub(crate) fn map_again(&self, body: &Body, block: u32) -> io::Result<()> {
        let (start, len) = (body.start(block), body.block_len(block));
        if !body.writable() || self.abilities.continue_protects {
            let quiet = self.evidence(body) == Evidence::Table;
            let mode = if quiet {
                UFFDIO_CONTINUE_MODE_DONTWAKE
            } else {
                CONTINUE_WAKES
            };
            return self.continue_range(body, start, len, mode);
        }
        // Pages that the program gave back are taken anew before they are read: a full pool must not be SIGBUS.
        body.memory.claim(start, len)?;
        let piece = COMPARED.max(body.memory.page());
        for at in (start..start + len).step_by(piece) {
            staging::with(self, piece.min(start + len - at), |before| {
                body.memory.copy_held(at, before);
                self.continue_compared(body, at, before)
            })?;
        }
        if self.evidence(body) != Evidence::Table {
            self.wake(body, block);
        }
        Ok(())
    }

    /// Maps pages that hold `before`, write-protected, where UFFDIO_CONTINUE can only map them writable
    /// (before Linux 6.4). Wakes nobody.
    ///
    /// Between the two calls another thread may write a page without a message. So the bytes are compared
    /// once the pages are protected: from then on nobody writes them, since a write is answered under the
    /// table's lock and the block has an owner. A page that still holds what it held is as clean or as
    /// dirty as before; a page that does not is dirty. Where protecting fails, all of them are.
    fn continue_compared(&self, body: &Body, start: usize, before: &[u8]) -> io::Result<()> {
        self.continue_range(body, start, before.len(), UFFDIO_CONTINUE_MODE_DONTWAKE)?;
        let page = body.memory.page();
        let pages = start / page..(start + before.len()) / page;
        if !self.protection(body).protect(pages.clone()) {
            body.lock().mark_dirty(pages);
            return Ok(());
        }
        for (number, was) in pages.zip(before.chunks(page)) {
            if !body.memory.holds(number * page, was) {
                body.lock().mark_dirty(number..number + 1);
            }
        }
        Ok(())
    }

    /// The mode in which pages are mapped: write-protected where they can be written and the kernel can do it.
    fn continue_mode(&self, body: &Body) -> u64 {
        if body.writable() && self.abilities.continue_protects {
            UFFDIO_CONTINUE_MODE_WP
        } else {
            0
        }
    }

    fn continue_range(
        &self,
        body: &Body,
        start: usize,
        len: usize,
        dont_wake: u64,
    ) -> io::Result<()> {
        self.continue_in_mode(body, start, len, self.continue_mode(body) | dont_wake)
    }

    fn continue_in_mode(&self, body: &Body, start: usize, len: usize, mode: u64) -> io::Result<()> {
        let address = body.memory.main() + start;
        let mut from = 0;
        loop {
            let filled = fill::fill(len - from, body.memory.page(), Fill::Shared, |at, len| {
                // SAFETY: the caller owns the block, and every page of it is whole.
                unsafe { self.uffd_of(body).continue_(address + from + at, len, mode) }
            });
            match filled {
                Filled::Whole { skipped } => {
                    if skipped > 0 && mode & UFFDIO_CONTINUE_MODE_DONTWAKE == 0 {
                        // EEXIST wakes nobody.
                        let _ = self.uffd_of(body).wake(address, len);
                    }
                    return Ok(());
                }
                Filled::EventPending { at } => {
                    from += at;
                    std::thread::yield_now();
                }
                other => return Err(failed("UFFDIO_CONTINUE", other)),
            }
        }
    }

    /// As [`Engine::copy`] into a whole block, for a handler. `Err` has the bytes of it that may be mapped.
    pub(crate) fn copy_bare(&self, body: &Body, block: u32, bytes: &[u8]) -> Result<(), usize> {
        let (start, mode) = (body.start(block), self.copy_mode(body, block));
        let copy = |bytes: &[u8]| {
            let (address, page) = (body.memory.main() + start, body.memory.page());
            fill::fill(bytes.len(), page, Fill::OwnAbsent, |at, len| {
                // SAFETY: as in `copy`.
                unsafe {
                    let from = bytes[at..].as_ptr() as usize;
                    self.uffd_of(body).copy(address + at, from, len, mode)
                }
            })
        };
        if let Some(most) = crate::defects::copy_breaks_off_after(bytes.len()) {
            let _ = copy(&bytes[..most]);
            crate::defects::before_it_is_told();
            return Err(most);
        }
        match copy(bytes) {
            Filled::Whole { .. } => Ok(()),
            Filled::Failed { at, .. }
            | Filled::LayoutChanged { at }
            | Filled::EventPending { at }
            | Filled::StalePage { at } => Err(at),
            Filled::ProcessGone => Err(0),
        }
    }

    /// Puts one huge page of bytes from `from`, where the kernel finds them, into a block of that size, and maps and
    /// wakes it. False if nothing happened: a page is there whole or not at all.
    pub(crate) fn copy_page_bare(&self, body: &Body, block: u32, from: usize) -> bool {
        let (start, len) = (body.start(block), body.block_len(block));
        debug_assert_eq!(len, body.memory.page());
        let mode = self.copy_mode(body, block);
        let address = body.memory.main() + start;
        // SAFETY: the caller owns the block. `from` is read by the kernel alone, which says EFAULT where it cannot.
        let outcome = unsafe { self.uffd_of(body).copy(address, from, len, mode) };
        outcome.is_ok()
    }

    /// As [`Engine::map_claimed`], for a handler: true if every page is mapped now. If not, some may be.
    pub(crate) fn map_claimed_bare(&self, body: &Body, block: u32) -> bool {
        let (start, len) = (body.start(block), body.block_len(block));
        let mode = if self.presumes_written(body, block) {
            0
        } else {
            self.continue_mode(body)
        };
        if let Some(most) = crate::defects::copy_breaks_off_after(len) {
            self.continue_bare_in_mode(body, start, most, mode);
            crate::defects::before_it_is_told();
            return false;
        }
        self.continue_bare_in_mode(body, start, len, mode)
    }

    /// As [`Engine::map_again`], for a handler: true if every page is mapped now. If not, some may be.
    pub(crate) fn continue_bare(&self, body: &Body, start: usize, len: usize) -> bool {
        self.continue_bare_in_mode(body, start, len, self.continue_mode(body))
    }

    fn continue_bare_in_mode(&self, body: &Body, start: usize, len: usize, mode: u64) -> bool {
        let (address, page) = (body.memory.main() + start, body.memory.page());
        let filled = fill::fill(len, page, Fill::Shared, |at, len| {
            // SAFETY: the caller owns the block, and every page of it is whole.
            unsafe { self.uffd_of(body).continue_(address + at, len, mode) }
        });
        matches!(filled, Filled::Whole { .. })
    }

    /// Makes every touch of an absent block SIGBUS.
    pub(crate) fn poison(&self, body: &Body, table: &mut Table, block: u32) -> io::Result<()> {
        if !self.abilities.poison {
            return self.bar(body, table, block);
        }
        let (start, len) = (body.address(block), body.block_len(block));
        if body.writable() {
            // Poison goes only where there is nothing: lift the markers that protection left behind.
            let _ = self.uffd_of(body).writeprotect(start, len, 0);
        }
        let filled = fill::fill(len, body.memory.page(), Fill::Shared, |at, len| {
            // SAFETY: a touch of a block that could not be had is SIGBUS by the region's contract.
            unsafe { self.uffd_of(body).poison(start + at, len, 0) }
        });
        match filled {
            Filled::Whole { .. } => Ok(()),
            other => Err(failed("UFFDIO_POISON", other)),
        }
    }

    /// Takes the poison off a block again: nothing of it is mapped, and touching it is a message.
    pub(crate) fn lift_poison(&self, body: &Body, table: &mut Table, block: u32) -> io::Result<()> {
        if !self.abilities.poison {
            return self.unbar(body, table, block);
        }
        body.memory.zap(body.start(block), body.block_len(block))
    }

    /// True if the page at `address` is mapped now.
    pub(crate) fn present(&self, address: usize) -> bool {
        self.pagemap
            .entry(address)
            .is_ok_and(|entry| entry.present())
    }

    /// Gathers the evidence of a block that was just unmapped: marks dirty every page that is not proved
    /// clean. Only a write-protect marker proves it (SWAPPED and not WRITTEN); none, present and anything
    /// else does not: a zapped dirty hugetlb page reports neither.
    pub(crate) fn harvest_zapped(&self, body: &Body, pages: Range<usize>) -> Vec<Range<usize>> {
        if self.evidence(body) != Evidence::Kernel {
            // Read-only, or the table knows: a page could be written only when its bit was set.
            return Vec::new();
        }
        let scan = Scan {
            flags: PM_SCAN_CHECK_WPASYNC,
            inverted: PAGE_IS_WRITTEN,
            all_of: PAGE_IS_SWAPPED | PAGE_IS_WRITTEN,
            any_of: 0,
            report: PAGE_IS_SWAPPED,
            max_pages: 0,
        };
        let mut dirty = Vec::new();
        let mut next = pages.start;
        let scanned = self.scan(body, pages.clone(), &scan, |clean| {
            if clean.start > next {
                dirty.push(next..clean.start);
            }
            next = clean.end;
        });
        if scanned.is_err() {
            return vec![pages];
        }
        if next < pages.end {
            dirty.push(next..pages.end);
        }
        dirty
    }

    /// Gathers the kernel's evidence of mapped blocks held in Cleaning and protects them again, in one step.
    /// Where the table knows what was written there is none, and [`crate::protect`] protects.
    pub(crate) fn harvest_mapped(&self, body: &Body, pages: Range<usize>) -> Vec<Range<usize>> {
        if self.evidence(body) != Evidence::Kernel {
            return Vec::new();
        }
        let scan = Scan {
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            inverted: 0,
            all_of: PAGE_IS_WRITTEN,
            any_of: 0,
            report: PAGE_IS_WRITTEN,
            max_pages: 0,
        };
        // What the program itself unmapped has no entry to say that it was written: a hugetlb page, a whole
        // table that the kernel freed (since 6.14), and before 6.18 any page. Neither there nor a marker.
        let gone = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
        let unmapped = Scan {
            inverted: gone,
            all_of: gone,
            report: gone,
            ..scan
        };
        let mut written = Vec::new();
        let scanned = self
            .scan(body, pages.clone(), &scan, |range| written.push(range))
            .and_then(|()| self.scan(body, pages.clone(), &unmapped, |range| written.push(range)));
        if scanned.is_ok() {
            written
        } else {
            vec![pages]
        }
    }

    fn scan(
        &self,
        body: &Body,
        pages: Range<usize>,
        scan: &Scan,
        mut each: impl FnMut(Range<usize>),
    ) -> io::Result<()> {
        let (main, page) = (body.memory.main(), body.memory.page());
        let mut regions = [page_region {
            start: 0,
            end: 0,
            categories: 0,
        }; REGIONS];
        let range = main + pages.start * page..main + pages.end * page;
        self.pagemap.scan_each(range, scan, &mut regions, |region| {
            each(
                (region.start as usize - main) / page..(region.end as usize - main).div_ceil(page),
            );
        })
    }
}

/// ORs a harvest into the maps of all consumers.
pub(crate) fn record(table: &mut Table, harvest: &[Range<usize>]) {
    for pages in harvest {
        table.mark_dirty(pages.clone());
    }
}
