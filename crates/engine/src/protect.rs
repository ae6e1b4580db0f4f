//! Synchronous write-protection: how the block table knows what was written, where the kernel keeps no
//! evidence (before Linux 6.7, and in memory of another process).
//!
//! A page is mapped write-protected. Its first write is a message, and the writer sleeps until the page's
//! bit is set in the table and the protection is lifted. What the table says is then exact: no scan, and
//! nothing to gather when a block leaves memory.
//!
//! ```text
//!   protected, bit as it was --first write--> bit set, writable --write-back--> bit taken, protected, copied
//! ```
//!
//! # The rule
//! **A page that can be written without a message has its bit set, or its owner is going to copy it after
//! protecting it.** Two orders keep it:
//!
//! * A first write sets the bit and lifts the protection while the table is locked ([`first_write`]), and
//!   only in a block that is resident or being cleaned. Nobody can take the bit between the two.
//! * A write-back takes the bits, then protects, then copies ([`protect_again`] is its second step). A write
//!   before the protection is in the copy; a write after it is a message, and sets the bit again. To protect
//!   first would be wrong: a first write that comes between would set a bit that is then taken, and leave
//!   its page writable without one.
//!
//! Before a block leaves memory it is unmapped, and from then on nobody writes it: there is nothing to
//! protect. Whoever lifts protection for another reason sets the bits first (a pin for writing), or owns a
//! block of which nothing is mapped. A page under a pin for writing is never protected: a system call that
//! writes it would get EFAULT where the kernel's own accesses raise no faults.
//!
//! The same protocol is explored step by step in `src/userfault/model/scenarios/engine`.

use std::ops::Range;

use userfault_uffd::Uffd;
use userfault_uffd::abi::UFFDIO_WRITEPROTECT_MODE_WP;

use crate::body::Body;
use crate::engine::Engine;
use crate::table::Table;

/// Memory whose protection can be switched, by pages of its table.
pub(crate) trait Protected {
    /// Protects pages. False: some may still be writable.
    fn protect(&self, pages: Range<usize>) -> bool;
    /// Lets pages be written and wakes whoever sleeps on them. False: some may still be protected, or asleep.
    fn lift(&self, pages: Range<usize>) -> bool;
}

/// The mapping of a region, and the userfaultfd that it is registered with.
pub(crate) struct Mapping<'a> {
    pub(crate) uffd: &'a Uffd,
    /// Address of the first page.
    pub(crate) start: usize,
    /// Bytes of a page.
    pub(crate) page: usize,
}

impl Mapping<'_> {
    fn switch(&self, pages: Range<usize>, mode: u64) -> bool {
        let start = self.start + pages.start * self.page;
        self.uffd
            .writeprotect(start, pages.len() * self.page, mode)
            .is_ok()
    }
}

impl Protected for Mapping<'_> {
    fn protect(&self, pages: Range<usize>) -> bool {
        self.switch(pages, UFFDIO_WRITEPROTECT_MODE_WP)
    }

    fn lift(&self, pages: Range<usize>) -> bool {
        self.switch(pages, 0)
    }
}

/// Answers the first write to a protected page of a block that is resident or being cleaned: sets its bit, lets
/// the write through and wakes. False: the page's sleepers must be woken all the same, and ask again.
///
/// As many pages go with it as were dirty just before it: a block that is written from end to end costs a
/// handful of messages, and a page that is written alone is written back alone.
pub(crate) fn first_write(
    memory: &impl Protected,
    table: &mut Table,
    page: usize,
    block: Range<usize>,
) -> bool {
    let before = (block.start..page)
        .rev()
        .take_while(|page| table.home.contains(*page))
        .count();
    let pages = page..block.end.min(page + before.max(1));
    table.mark_dirty(pages.clone());
    memory.lift(pages) || memory.lift(page..page + 1)
}

/// Protects mapped pages whose bits were taken for a write-back, before they are copied. The runs that may
/// still be writable are returned: they are dirty again, whatever becomes of the write-back.
pub(crate) fn protect_again(
    memory: &impl Protected,
    runs: impl IntoIterator<Item = Range<usize>>,
) -> Vec<Range<usize>> {
    runs.into_iter()
        .filter(|run| !memory.protect(run.clone()))
        .collect()
}

impl Engine {
    /// The protection of a region's pages.
    pub(crate) fn protection<'a>(&'a self, body: &Body) -> Mapping<'a> {
        Mapping {
            uffd: self.uffd_of(body),
            start: body.memory.main(),
            page: body.memory.page(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Which pages can be written. `refuses`: no protection, and no more than one page lifted at once.
    #[derive(Default)]
    struct Pages {
        writable: RefCell<Vec<usize>>,
        refuses: bool,
    }

    impl Protected for Pages {
        fn protect(&self, pages: Range<usize>) -> bool {
            if self.refuses {
                return false;
            }
            self.writable
                .borrow_mut()
                .retain(|page| !pages.contains(page));
            true
        }

        fn lift(&self, pages: Range<usize>) -> bool {
            if self.refuses && pages.len() > 1 {
                return false;
            }
            self.writable.borrow_mut().extend(pages);
            true
        }
    }

    fn table() -> Table {
        Table::new(2, 32, 1, 16)
    }

    #[test]
    fn a_first_write_sets_its_bit_and_makes_its_page_writable() {
        let (pages, mut table) = (Pages::default(), table());
        assert!(first_write(&pages, &mut table, 20, 16..32));
        assert_eq!(table.home.runs(0..32), vec![20..21]);
        assert_eq!(*pages.writable.borrow(), vec![20]);
    }

    #[test]
    fn writing_a_block_from_end_to_end_costs_few_messages() {
        let (pages, mut table) = (Pages::default(), table());
        let mut messages = 0;
        for page in 16..32 {
            if !pages.writable.borrow().contains(&page) {
                messages += 1;
                assert!(first_write(&pages, &mut table, page, 16..32));
            }
        }
        assert_eq!(messages, 5);
        assert_eq!(table.home.runs(0..32), vec![16..32]);
    }

    #[test]
    fn pages_that_are_written_alone_are_dirty_alone() {
        let (pages, mut table) = (Pages::default(), table());
        for page in [30, 16, 24, 18, 26] {
            assert!(first_write(&pages, &mut table, page, 16..32));
        }
        assert_eq!(table.home.count(), 5);
        assert_eq!(pages.writable.borrow().len(), 5);
    }

    #[test]
    fn a_range_that_the_kernel_refuses_is_lifted_by_the_page_that_is_written() {
        let pages = Pages {
            refuses: true,
            ..Pages::default()
        };
        let mut table = table();
        table.home.insert(20..24);
        assert!(first_write(&pages, &mut table, 24, 16..32));
        assert_eq!(*pages.writable.borrow(), vec![24]);
        assert!(table.home.contains(24));
    }

    #[test]
    fn what_cannot_be_protected_is_named() {
        let pages = Pages {
            refuses: true,
            ..Pages::default()
        };
        assert_eq!(protect_again(&pages, [3..5, 8..9]), vec![3..5, 8..9]);
        assert_eq!(
            protect_again(&Pages::default(), [3..5, 8..9]),
            Vec::<Range<usize>>::new()
        );
    }
}
