//! Blocks that are presumed to be written, and so mapped writable at once.
//!
//! The first write to a page that is mapped write-protected is a fault, and it makes the kernel tell every
//! processor that runs a thread of the program. A program that writes its blocks from end to end has one for each
//! page. Measured by a sort of 1 GiB in tmpfs, old and new in turns: with nothing protected at all it takes 0.8 of
//! the time on pages of 4 KiB and 0.92 on those of a huge tmpfs; by what is here 0.86 to 0.92, and 0.87 to 1.02. A
//! page that is mapped writable counts as written, by the rule that what is not proved clean is dirty: so no write
//! can be lost this way, only bytes written back that are the same as before.
//!
//! Of every eight blocks one is a *probe*: it is mapped protected always. When two probes in a row that left, or
//! were cleaned, had been written whole (or nearly), the blocks that are not probes are presumed to be, until two
//! were not. A probe that a flush cleans in the middle of its writing ends the presumption, too, for a while: to
//! take it for written would have a program that changes little between flushes write back whole blocks for ever.
//! So that a program which has written and now reads does not have a whole memory of clean blocks written back, a
//! probe is also looked at while it is there: after [`LOOK_AFTER`] other fills, and what read-ahead may bring in
//! for [`WALKS`] walks before it is touched, it should have been written to. The price of a change from writing
//! whole blocks to reading is as many blocks written in vain, and 16 up to the next probe, if they are read in
//! order: 32 blocks, and a quarter of the limit, but 64 MiB at most.
//!
//! Everything is atomic and may be called by a handler.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use userfault_uffd::Scan;
use userfault_uffd::abi::{PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, page_region};

use crate::ahead::longest_window;
use crate::body::Body;
use crate::engine::Engine;
use crate::kernel::Evidence;

/// One block of so many is a probe.
const PROBE: u32 = 8;

/// So much trust is needed to presume. A probe that was written whole adds one, another one takes two.
const ENOUGH: u8 = 2;

/// Trust is not more than this.
const MOST: u8 = 4;

/// A probe is looked at after so many more blocks have been brought in, and some for read-ahead.
const LOOK_AFTER: u64 = 2 * PROBE as u64;

/// Walks that may go on at once, each with a window of read-ahead.
const WALKS: u32 = 4;

/// Blocks of fewer pages are not worth it.
const FEWEST_PAGES: usize = 16;

/// Longer blocks are too much to be written in vain, bytes.
const LONGEST_BLOCK: usize = 2 << 20;

/// What is presumed of a region's blocks.
#[derive(Debug, Default)]
pub(crate) struct Presumption {
    /// Grows with each probe that was written whole.
    trust: AtomicU8,
    /// The probe that is looked at next: its number and 1, shifted by 32, and the fills since. 0: none.
    watched: AtomicU64,
}

fn is_probe(block: u32) -> bool {
    // Not the first of every eight: a program may well touch only those.
    block % PROBE == block / PROBE % PROBE
}

impl Presumption {
    /// True if a block that comes in is presumed to be written whole.
    fn holds(&self, block: u32) -> bool {
        self.trust.load(Relaxed) >= ENOUGH && !is_probe(block)
    }

    /// A block has come in. Returns a probe that is to be looked at now; `window` is what read-ahead brings in for a walk.
    fn came(&self, block: u32, window: impl FnOnce() -> u32) -> Option<u32> {
        if self.trust.load(Relaxed) < ENOUGH {
            return None;
        }
        let watched = self.watched.load(Relaxed);
        if watched == 0 {
            if is_probe(block) {
                self.watched.store(u64::from(block + 1) << 32, Relaxed);
            }
            return None;
        }
        let fills = u64::from(watched as u32);
        if fills >= LOOK_AFTER && fills >= LOOK_AFTER + u64::from(WALKS * window()) {
            self.watched.store(0, Relaxed);
            return Some((watched >> 32) as u32 - 1);
        }
        // Two fills at once may count as one: it is looked at a little later then.
        let _ = self
            .watched
            .compare_exchange(watched, watched + 1, Relaxed, Relaxed);
        None
    }

    /// A probe that was looked at has not been written to.
    fn is_wrong(&self) {
        self.trust.store(0, Relaxed);
    }

    /// Of the pages of a block so many were written, from its coming to its leaving or its first cleaning.
    fn saw(&self, block: u32, written: usize, pages: usize) {
        if !is_probe(block) {
            return;
        }
        if self.watched.load(Relaxed) >> 32 == u64::from(block + 1) {
            self.watched.store(0, Relaxed);
        }
        let trust = self.trust.load(Relaxed);
        let trust = if written >= pages - pages / 8 {
            (trust + 1).min(MOST)
        } else {
            trust.saturating_sub(2)
        };
        self.trust.store(trust, Relaxed);
    }
}

impl Engine {
    /// True if a block that comes in is to be mapped writable. Only where the kernel keeps the evidence of writes: there
    /// what is mapped writable counts as written without anybody saying so.
    pub(crate) fn presumes_written(&self, body: &Body, block: u32) -> bool {
        body.presumption.holds(block) && self.evidence(body) == Evidence::Kernel
    }

    /// A block has come in, and is mapped. `limit` is that of its pool.
    pub(crate) fn presume(&self, body: &Body, block: u32, limit: u64) {
        if let Some(probe) = body.presumption.came(block, || longest_window(body, limit))
            && !self.any_written(body, probe)
        {
            body.presumption.is_wrong();
        }
    }

    /// A block is unmapped, or cleaned while it is mapped, for the first time since it came in; `written` of its pages
    /// were written since then.
    pub(crate) fn learn_written(&self, body: &Body, block: u32, written: impl FnOnce() -> usize) {
        let pages = body.pages(block).len();
        let worth = pages >= FEWEST_PAGES && body.block <= LONGEST_BLOCK;
        if worth && self.evidence(body) == Evidence::Kernel {
            body.presumption.saw(block, written(), pages);
        }
    }

    /// True if some page of a mapped block was written, or nobody can say.
    fn any_written(&self, body: &Body, block: u32) -> bool {
        let scan = Scan {
            flags: PM_SCAN_CHECK_WPASYNC,
            all_of: PAGE_IS_WRITTEN,
            report: PAGE_IS_WRITTEN,
            max_pages: 1,
            ..Scan::default()
        };
        let start = body.address(block);
        let mut found = [page_region {
            start: 0,
            end: 0,
            categories: 0,
        }];
        self.pagemap
            .scan(start..start + body.block_len(block), &scan, &mut found)
            .map_or(true, |scanned| scanned.regions > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the opening comment promises without read-ahead.
    const MOST_IN_VAIN: u32 = 32;

    fn probes() -> impl Iterator<Item = u32> {
        (0..).filter(|block| is_probe(*block))
    }

    /// One that two probes have confirmed.
    fn confirmed() -> Presumption {
        let presumption = Presumption::default();
        for probe in probes().take(2) {
            presumption.saw(probe, 16, 16);
        }
        presumption
    }

    #[test]
    fn there_are_probes_and_others_whatever_the_stride() {
        for stride in [1, 3, 8, 16, 32] {
            let found = (0..512u32).filter(|n| is_probe(n * stride)).count();
            assert!((32..=256).contains(&found), "{found} of 512 by {stride}");
        }
    }

    #[test]
    fn two_probes_in_a_row_that_were_written_make_it_hold_for_all_but_probes() {
        let presumption = Presumption::default();
        let probe = probes().next().unwrap();
        for block in 0..100 {
            if !is_probe(block) {
                presumption.saw(block, 16, 16);
            }
        }
        assert!(
            !presumption.holds(1),
            "it has learned from what it presumed"
        );
        presumption.saw(probe, 16, 16);
        assert!(!presumption.holds(1));
        presumption.saw(probe, 14, 16);
        assert!(presumption.holds(1) && !presumption.holds(probe));
        for _ in 0..2 {
            assert!(presumption.holds(1));
            presumption.saw(probe, 16, 16);
        }
        presumption.saw(probe, 13, 16);
        assert!(presumption.holds(1), "one alone says little");
        presumption.saw(probe, 0, 16);
        assert!(!presumption.holds(1));
    }

    #[test]
    fn a_reader_in_order_is_noticed_in_time() {
        for (first, window) in (0..64).map(|first| (first, first % 3 * 8)) {
            let presumption = confirmed();
            let mut in_vain = 0;
            for block in first..first + 200 {
                in_vain += u32::from(presumption.holds(block));
                if presumption.came(block, || window).is_some() {
                    presumption.is_wrong();
                }
            }
            assert!(
                in_vain <= MOST_IN_VAIN + WALKS * window,
                "{in_vain} from {first} on"
            );
        }
    }

    #[test]
    fn a_probe_that_has_left_is_not_looked_at() {
        let presumption = confirmed();
        let probe = probes().nth(3).unwrap();
        assert_eq!(presumption.came(probe, || 0), None);
        presumption.saw(probe, 16, 16);
        for block in (0..200).filter(|block| !is_probe(*block)) {
            assert_eq!(presumption.came(block, || 0), None);
        }
    }
}
