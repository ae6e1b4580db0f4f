//! Write-protection of served memory: a first write is noted, and goes on.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use userfault_uffd::abi::UFFDIO_WRITEPROTECT_MODE_WP;

use super::delivery::Put;
use super::layout::Segment;
use super::process::{Piece, Process};
use crate::protect::{self, Protected};

/// A write to a protected page: it counts as written from here on, and goes on (see `protect`).
pub(super) fn first_write(
    process: &Process,
    segment: &Segment<Arc<Piece>>,
    block: u32,
    address: usize,
    page: usize,
) -> Put {
    let piece = &segment.piece;
    if !process.family.terms.track {
        return lift_one(process, address, piece.page());
    }
    let (here, whole) = (piece.pages(segment), piece.body.pages(block));
    let near = here.start.max(whole.start)..here.end.min(whole.end);
    let pages = Pages::of(process, segment);
    let lifted = protect::first_write(&pages, &mut piece.body.lock(), page, near);
    match pages.refused.get() {
        Put::Done | Put::Unwoken if !lifted => {
            process.wake_page(address, piece.page());
            Put::Done
        }
        Put::Pending | Put::Gone if !lifted => pages.refused.get(),
        _ => Put::Done,
    }
}

/// The pages of a piece, where they lie in a process: their protection can be switched.
pub(super) struct Pages<'a> {
    process: &'a Process,
    segment: &'a Segment<Arc<Piece>>,
    /// Why the last call was refused.
    pub(super) refused: Cell<Put>,
}

impl<'a> Pages<'a> {
    pub(super) fn of(process: &'a Process, segment: &'a Segment<Arc<Piece>>) -> Pages<'a> {
        Pages {
            process,
            segment,
            refused: Cell::new(Put::Done),
        }
    }

    fn switch(&self, pages: Range<usize>, mode: u64) -> bool {
        let piece = &self.segment.piece;
        let start = piece.address(self.segment, pages.start);
        let len = pages.len() * piece.page();
        let put = Put::of(self.process.uffd.writeprotect(start, len, mode));
        self.refused.set(put);
        put == Put::Done
    }
}

impl Protected for Pages<'_> {
    fn protect(&self, pages: Range<usize>) -> bool {
        self.switch(pages, UFFDIO_WRITEPROTECT_MODE_WP)
    }

    fn lift(&self, pages: Range<usize>) -> bool {
        self.switch(pages, 0)
    }
}

/// Lets writes to the page around an address go on that nobody notes.
pub(super) fn lift_one(process: &Process, address: usize, page: usize) -> Put {
    let start = address / page * page;
    match Put::of(process.uffd.writeprotect(start, page, 0)) {
        Put::Unwoken => {
            process.wake_page(address, page);
            Put::Done
        }
        put => put,
    }
}
