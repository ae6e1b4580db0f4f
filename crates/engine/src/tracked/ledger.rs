//! Silent tracking: which pages of a range were written, for one consumer.
//!
//! Unsafe: takes ranges out of user-space paging at the end.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::lock::Mutex;
use userfault_uffd::Scan;
use userfault_uffd::abi::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
    UFFD_FEATURE_WP_ASYNC, UFFDIO_REGISTER_MODE_WP, page_region,
};

use super::mapping;
use crate::dirty::DirtyMap;
use crate::engine::Engine;
use crate::error::Error;
use crate::fork;
use crate::memory::small_page;

/// Ranges that one call of PAGEMAP_SCAN reports at most: a random pattern makes one for each page, and a
/// call costs a microsecond or two.
const REGIONS: usize = 1024;

/// Memory that has one page table, bytes, or a part of it.
const TABLE: usize = 2 << 20;

/// A table whose pages were all written between one harvest and the next, so often in a row, is *steady*: it will
/// be so again, and noting every first write again costs the program a microsecond a page. From there on only its
/// first page is protected, for a *sentinel*. The others count as written to whoever asks, which is the truth, or is
/// found out by comparing what is saved.
const STEADY_FROM: u8 = 2;

/// After so many harvests more a steady table is looked at again, all of it.
const STEADY_FOR: u8 = 16;

const NO_REGION: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// The part that other consumers' harvests write to.
#[derive(Debug)]
pub(super) struct Pages {
    start: usize,
    len: usize,
    dirty: Mutex<DirtyMap>,
    /// For each table that the range has a part of, by how many harvests in a row it was found written whole.
    whole: Mutex<Vec<u8>>,
}

impl Pages {
    fn new(start: usize, len: usize) -> Pages {
        let pages = len / small_page();
        let mut dirty = DirtyMap::new(pages);
        dirty.insert(0..pages);
        let tables = (start + len).div_ceil(TABLE) - start / TABLE;
        Pages {
            start,
            len,
            dirty: Mutex::new(dirty),
            whole: Mutex::new(vec![0; tables]),
        }
    }

    /// Asks what was written and protects it again, but for all but one page of steady tables: those count as
    /// written if that one was.
    fn harvest(&self, engine: &Engine, range: Range<usize>) -> std::io::Result<Vec<Range<usize>>> {
        let mut whole = self.whole.lock();
        let first = self.start / TABLE;
        let steady = |whole: &[u8], at: usize| {
            at.is_multiple_of(TABLE)
                && at + TABLE <= range.end
                && (STEADY_FROM..STEADY_FROM + STEADY_FOR).contains(&whole[at / TABLE - first])
        };
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            if steady(&whole, at) {
                let table = at..at + TABLE;
                at = table.end;
                let times = &mut whole[table.start / TABLE - first];
                let sentinel = table.start..table.start + small_page();
                if scan(engine, sentinel, PM_SCAN_WP_MATCHING)?.is_empty() {
                    *times = 0;
                    found.extend(scan(engine, table, PM_SCAN_WP_MATCHING)?);
                } else {
                    *times += 1;
                    found.push(table);
                }
                continue;
            }
            let mut end = next_table(at);
            while end < range.end && !steady(&whole, end) {
                end = next_table(end);
            }
            let asked = at..end.min(range.end);
            at = asked.end;
            let written = scan(engine, asked.clone(), PM_SCAN_WP_MATCHING)?;
            let number = asked.start / TABLE;
            let mut bytes = vec![0; asked.end.div_ceil(TABLE) - number];
            for run in &written {
                let mut from = run.start;
                while from < run.end {
                    let to = next_table(from).min(run.end);
                    bytes[from / TABLE - number] += to - from;
                    from = to;
                }
            }
            for (times, bytes) in whole[number - first..].iter_mut().zip(bytes) {
                *times = if bytes == TABLE {
                    (*times).min(STEADY_FROM - 1) + 1
                } else {
                    0
                };
            }
            found.extend(written);
        }
        Ok(found)
    }

    fn note(&self, ranges: &[Range<usize>]) {
        let page = small_page();
        let mut dirty = self.dirty.lock();
        for range in ranges {
            let from = range.start.max(self.start);
            let to = range.end.min(self.start + self.len);
            if from < to {
                dirty.insert((from - self.start) / page..(to - self.start) / page);
            }
        }
    }
}

/// One consumer's account of a range of memory that is tracked silently.
///
/// Every page counts as written when the ledger is opened. Whoever opens it sees to it that the memory
/// stays mapped, by holding the object that owns it; if it goes all the same, [`Ledger::harvest`] or the
/// reading of it fails.
#[derive(Debug)]
pub struct Ledger {
    pages: Arc<Pages>,
    generation: u32,
    closed: AtomicBool,
}

impl Ledger {
    /// Begins to track `len` bytes at `start`, both multiples of the page. Fails with the reason why this
    /// memory cannot be tracked.
    pub fn open(start: usize, len: usize) -> Result<Ledger, Error> {
        let engine = Engine::current()?;
        if !engine.uffd.has(UFFD_FEATURE_WP_ASYNC) {
            return Err(Error::Invalid(
                "tracking needs Linux 6.7 or newer (userfaultfd's WP_ASYNC)".into(),
            ));
        }
        debug_assert!(start.is_multiple_of(small_page()) && len.is_multiple_of(small_page()));
        let pages = Arc::new(Pages::new(start, len));
        let mut ledgers = engine.tracked.ledgers.write();
        let outcome = engine.uffd.register(start, len, UFFDIO_REGISTER_MODE_WP);
        if !outcome.is_ok() {
            return Err(refused(start, len, outcome.errno));
        }
        ledgers.retain(|other| other.strong_count() > 0);
        ledgers.push(Arc::downgrade(&pages));
        drop(ledgers);
        let ledger = Ledger {
            pages,
            generation: fork::generation(),
            closed: AtomicBool::new(false),
        };
        // From here on a write is noted. What the other consumers had not yet heard of, they hear now.
        ledger.harvest(start, len)?;
        Ok(ledger)
    }

    /// Start of the range.
    pub fn start(&self) -> usize {
        self.pages.start
    }

    /// Bytes of the range.
    pub fn len(&self) -> usize {
        self.pages.len
    }

    /// Bytes of a page.
    pub fn page(&self) -> usize {
        small_page()
    }

    /// Never: a ledger has at least one page.
    pub fn is_empty(&self) -> bool {
        self.pages.len == 0
    }

    /// Asks the kernel what was written in `len` bytes at `start` since the last harvest of anybody,
    /// protects it again, and tells all consumers. Fails if the memory is not what it was. What is rewritten whole
    /// between any two harvests stays unprotected, and so counts as written at the next one and to
    /// [`Ledger::take_written`], whether it was or not.
    pub fn harvest(&self, start: usize, len: usize) -> Result<(), Error> {
        let engine = self.engine(start, len)?;
        // The same range may be in the ledgers of several consumers: no other harvest comes between the
        // kernel's answer and the last of their maps.
        let ledgers = engine.tracked.ledgers.write();
        let others: Vec<Arc<Pages>> = ledgers
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .filter(|pages| pages.start < start + len && start < pages.start + pages.len)
            .collect();
        let written = self.pages.harvest(engine, start..start + len);
        // What the kernel protected before it failed may be lost: everything counts as written.
        let all = start..start + len;
        let all = std::slice::from_ref(&all);
        for pages in &others {
            pages.note(written.as_deref().unwrap_or(all));
        }
        written.map(|_| ()).map_err(|_| gone(start, len))
    }

    /// Takes the dirty pages of a range (page numbers of the ledger) out, in order, as runs: those that are
    /// known, and those that the kernel knows now. Nothing is protected again, so that no processor is
    /// interrupted while somebody stands still; what the kernel knew is therefore found once more by the next
    /// harvest. Several threads may ask for different ranges at once.
    pub fn take_written(&self, pages: Range<usize>) -> Result<Vec<Range<usize>>, Error> {
        let page = small_page();
        let start = self.start() + pages.start * page;
        let len = pages.len() * page;
        let engine = self.engine(start, len)?;
        // No harvest of another consumer may be between the kernel and our map.
        let _ledgers = engine.tracked.ledgers.read();
        let written = scan(engine, start..start + len, 0).map_err(|_| gone(start, len))?;
        // They need not go through the map to be taken out of it again: two threads ask at a time.
        let known = self.take(pages);
        let from = self.start();
        let found = written
            .into_iter()
            .map(|run| (run.start - from) / page..(run.end - from) / page);
        Ok(union(known, found.collect()))
    }

    /// The number of pages that have been written, also those that only the kernel knows; what both know may
    /// count twice.
    pub fn written(&self) -> Result<usize, Error> {
        let (start, len) = (self.start(), self.len());
        let engine = self.engine(start, len)?;
        let written = scan(engine, start..start + len, 0).map_err(|_| gone(start, len))?;
        let bytes: usize = written.iter().map(ExactSizeIterator::len).sum();
        Ok((self.count() + bytes / small_page()).min(len / small_page()))
    }

    fn engine(&self, start: usize, len: usize) -> Result<&'static Engine, Error> {
        if self.generation != fork::generation() {
            return Err(Error::Forked);
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        if !mapping::mapped(start, len) {
            return Err(gone(start, len));
        }
        Engine::existing().ok_or(Error::Forked)
    }

    /// Takes the dirty pages of a range (page numbers of the ledger) out, in order, as runs.
    pub fn take(&self, pages: Range<usize>) -> Vec<Range<usize>> {
        let mut dirty = self.pages.dirty.lock();
        let runs = dirty.runs(pages.clone());
        if !runs.is_empty() {
            dirty.remove(pages);
        }
        runs
    }

    /// As [`Ledger::take`], from page `from` on and at most `most` pages.
    pub fn take_some(&self, from: usize, most: usize) -> Vec<Range<usize>> {
        let mut dirty = self.pages.dirty.lock();
        let (mut at, mut left) = (from, most);
        let mut runs = Vec::new();
        while left > 0
            && let Some(start) = dirty.next(at, dirty.pages())
        {
            let mut end = start + 1;
            while end < dirty.pages() && end - start < left && dirty.contains(end) {
                end += 1;
            }
            dirty.remove(start..end);
            left -= end - start;
            at = end;
            runs.push(start..end);
        }
        runs
    }

    /// Puts pages back: they could not be copied, or what was copied is lost.
    pub fn put_back(&self, pages: Range<usize>) {
        self.pages.dirty.lock().insert(pages);
    }

    /// Pages that are known to have been written, without asking the kernel.
    pub fn count(&self) -> usize {
        self.pages.dirty.lock().count()
    }
}

impl Ledger {
    /// Ends the account, and takes what nobody else tracks out of user-space paging.
    pub fn close(&self) {
        if self.generation != fork::generation() || self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(engine) = Engine::existing() else {
            return;
        };
        let (start, end) = (self.start(), self.start() + self.len());
        let mut ledgers = engine.tracked.ledgers.write();
        ledgers.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(&self.pages)));
        let mut kept: Vec<Range<usize>> = ledgers
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .map(|pages| pages.start..pages.start + pages.len)
            .collect();
        kept.sort_by_key(|range| range.start);
        let mut at = start;
        for range in kept
            .into_iter()
            .chain(std::iter::once(end..end))
            .filter(|range| range.end > start && range.start <= end)
        {
            if at < range.start {
                // SAFETY: nobody has absent bytes here: the range was registered for write-protection
                // alone. If it is gone, the call fails and that is that.
                let _ = unsafe { engine.uffd.unregister(at, range.start.min(end) - at) };
            }
            at = at.max(range.end);
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.close();
    }
}

/// Runs of two lists in order, put together where they meet.
fn union(mut runs: Vec<Range<usize>>, more: Vec<Range<usize>>) -> Vec<Range<usize>> {
    if runs.is_empty() {
        runs = more;
    } else {
        runs.extend(more);
    }
    if !runs.is_sorted_by_key(|run| run.start) {
        runs.sort_unstable_by_key(|run| run.start);
    }
    runs.dedup_by(|next, run| {
        let meet = next.start <= run.end;
        if meet {
            run.end = run.end.max(next.end);
        }
        meet
    });
    runs
}

/// Where the memory of the next table begins.
fn next_table(at: usize) -> usize {
    (at / TABLE + 1) * TABLE
}

/// The address ranges that were written, and those that the program itself threw away.
fn scan(engine: &Engine, range: Range<usize>, flags: u64) -> std::io::Result<Vec<Range<usize>>> {
    let mut regions = vec![NO_REGION; REGIONS.min(range.len() / small_page())];
    let mut found: Vec<Range<usize>> = Vec::new();
    // The kernel answers exactly this question several times as fast as any other.
    let written = Scan {
        flags: flags | PM_SCAN_CHECK_WPASYNC,
        all_of: PAGE_IS_WRITTEN,
        report: PAGE_IS_WRITTEN,
        ..Scan::default()
    };
    engine
        .pagemap
        .scan_each(range.clone(), &written, &mut regions, |region| {
            found.push(region.start as usize..region.end as usize);
        })?;
    // A page that was thrown away reads as zeros. Its entry, neither there nor a marker, counts as written;
    // but if its page table went too, nothing is left to say so. One page tells that of a whole table, and any
    // page of it that counts as written says that the table is there.
    let nothing = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
    let thrown_away = Scan {
        inverted: nothing,
        all_of: nothing,
        report: nothing,
        ..written
    };
    let asked = Scan {
        flags: 0,
        ..thrown_away
    };
    let named = found.len();
    let (mut at, mut run) = (range.start, 0);
    while at < range.end {
        let end = next_table(at).min(range.end);
        while run < named && found[run].end <= at {
            run += 1;
        }
        let has_table = run < named && found[run].start < end;
        let first = at..at + small_page();
        // The call takes a third longer if it is given room for all.
        if !has_table
            && engine
                .pagemap
                .scan(first, &asked, &mut regions[..1])?
                .regions
                > 0
        {
            engine
                .pagemap
                .scan_each(at..end, &thrown_away, &mut regions, |region| {
                    found.push(region.start as usize..region.end as usize);
                })?;
        }
        at = end;
    }
    Ok(found)
}

fn refused(start: usize, len: usize, errno: i32) -> Error {
    let advice = match errno {
        libc::EBUSY => "another userfaultfd watches it already",
        libc::ENOMEM => "the process has too many mappings: see /proc/sys/vm/max_map_count",
        _ => "this kernel cannot track memory of this kind",
    };
    Error::Os {
        call: "tracking memory",
        errno,
        advice: format!("{len} bytes at {start:#x}: {advice}"),
    }
}

fn gone(start: usize, len: usize) -> Error {
    Error::Invalid(format!(
        "the {len} bytes of tracked memory at {start:#x} were unmapped, moved or mapped anew by the program"
    ))
}
