//! What memory that others made is made of, and why it cannot be tracked.
//!
//! Unsafe: msync(2) as a question, which touches nothing.

use std::fmt;
use std::ops::Range;

use userfault_uffd::Scan;
use userfault_uffd::abi::{PAGE_IS_HUGE, PAGE_IS_PRESENT, page_region};

use crate::engine::Engine;
use crate::memory::small_page;

/// Why memory cannot be tracked in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Untrackable {
    /// A file, or memory shared with others, is mapped there.
    File(String),
    /// It cannot be written.
    ReadOnly,
    /// Somewhere nothing is mapped.
    Unmapped,
    /// /proc/self/maps cannot be read.
    Unknown(String),
}

impl fmt::Display for Untrackable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Untrackable::File(what) => write!(
                f,
                "it is not private anonymous memory but a mapping of {what}, whose writes by others nobody sees"
            ),
            Untrackable::ReadOnly => f.write_str("it is read-only memory"),
            Untrackable::Unmapped => f.write_str("part of it is not mapped"),
            Untrackable::Unknown(why) => {
                write!(f, "what it is made of cannot be found out: {why}")
            }
        }
    }
}

/// Says whether a range is private anonymous memory that can be written, all of it.
pub fn trackable(range: Range<usize>) -> Result<(), Untrackable> {
    let maps = std::fs::read_to_string("/proc/self/maps")
        .map_err(|error| Untrackable::Unknown(error.to_string()))?;
    let mut at = range.start;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(span), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        let (Some(device), Some(inode)) = (words.nth(1), words.next()) else {
            continue;
        };
        let Some((start, end)) = span.split_once('-').and_then(|(start, end)| {
            Some((
                usize::from_str_radix(start, 16).ok()?,
                usize::from_str_radix(end, 16).ok()?,
            ))
        }) else {
            continue;
        };
        if end <= at {
            continue;
        }
        if start > at {
            return Err(Untrackable::Unmapped);
        }
        let name = words.next().unwrap_or("a file");
        if inode != "0" || device != "00:00" || !rights.ends_with('p') {
            return Err(Untrackable::File(name.to_owned()));
        }
        if !rights.starts_with("rw") {
            return Err(Untrackable::ReadOnly);
        }
        at = end;
        if at >= range.end {
            return Ok(());
        }
    }
    Err(Untrackable::Unmapped)
}

/// True if something is mapped everywhere in a range.
pub fn mapped(start: usize, len: usize) -> bool {
    // It takes whole pages only.
    let page = small_page();
    let (from, to) = (start / page * page, (start + len).next_multiple_of(page));
    // SAFETY: msync with MS_ASYNC does nothing to memory; it answers ENOMEM where nothing is mapped.
    unsafe { libc::msync(from as *mut libc::c_void, to - from, libc::MS_ASYNC) == 0 }
}

/// The bytes of a range that lie on huge pages.
pub fn huge_share(range: Range<usize>) -> usize {
    let Some(engine) = Engine::existing() else {
        return 0;
    };
    let scan = Scan {
        all_of: PAGE_IS_HUGE | PAGE_IS_PRESENT,
        report: PAGE_IS_HUGE,
        ..Scan::default()
    };
    let mut regions = [page_region {
        start: 0,
        end: 0,
        categories: 0,
    }; 64];
    let mut bytes = 0;
    let scanned = engine
        .pagemap
        .scan_each(range, &scan, &mut regions, |region| {
            bytes += (region.end - region.start) as usize;
        });
    if scanned.is_ok() { bytes } else { 0 }
}
