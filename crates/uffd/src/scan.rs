//! PAGEMAP_SCAN (Linux 6.7): what the page tables say of a range, and write-protection in the same step.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::abi::*;
use crate::{Pagemap, ioctl};

/// What to look for. The bits are PAGE_IS_ categories; a page matches when, after turning the sense of
/// the `inverted` ones, all of `all_of` are set and, if `any_of` is not 0, one of `any_of`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scan {
    /// PM_SCAN_WP_MATCHING: protect what matches. PM_SCAN_CHECK_WPASYNC: fail with EPERM where WP_ASYNC
    /// does not track; without it such memory is silently passed over, as if nothing were dirty.
    pub flags: u64,
    /// Categories whose sense is turned round.
    pub inverted: u64,
    /// Categories that must all be set.
    pub all_of: u64,
    /// Categories of which one must be set.
    pub any_of: u64,
    /// Categories to be told.
    pub report: u64,
    /// Stop after so many matching pages of the base size; 0: no bound. On hugetlb less than one huge page
    /// finds nothing.
    pub max_pages: u64,
}

/// How far one scan came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Entries of the buffer that were filled.
    pub regions: usize,
    /// Everything before this address was looked at, and protected if that was asked for.
    pub walk_end: usize,
}

impl Pagemap {
    /// One PAGEMAP_SCAN of `range` (addresses, multiples of the page) into `regions`.
    ///
    /// It stops early when the buffer is full or `max_pages` are found. Without a buffer (empty slice)
    /// it protects and reports nothing.
    pub fn scan(
        &self,
        range: Range<usize>,
        scan: &Scan,
        regions: &mut [page_region],
    ) -> io::Result<Scanned> {
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: scan.flags,
            start: range.start as u64,
            end: range.end as u64,
            walk_end: 0,
            vec: if regions.is_empty() {
                0
            } else {
                regions.as_mut_ptr() as u64
            },
            vec_len: regions.len() as u64,
            max_pages: scan.max_pages,
            category_inverted: scan.inverted,
            category_mask: scan.all_of,
            category_anyof_mask: scan.any_of,
            return_mask: scan.report,
        };
        // SAFETY: the struct is the one of this request; the kernel writes at most `vec_len` entries at
        // `vec`, which `regions` lends for the call. Protecting pages changes no byte.
        let found = unsafe { libc::ioctl(self.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) };
        if found < 0 {
            return Err(io::Error::from_raw_os_error(ioctl::last_errno()));
        }
        Ok(Scanned {
            regions: found as usize,
            walk_end: argument.walk_end as usize,
        })
    }

    /// Scans to the end of `range`, however often the buffer fills, and hands every region to `each`.
    ///
    /// A run of equal pages may come in pieces. `max_pages` of the scan is ignored. An error leaves
    /// what was reported before it reported (and protected).
    pub fn scan_each(
        &self,
        range: Range<usize>,
        scan: &Scan,
        regions: &mut [page_region],
        mut each: impl FnMut(&page_region),
    ) -> io::Result<()> {
        let scan = Scan {
            max_pages: 0,
            ..*scan
        };
        let mut start = range.start;
        while start < range.end {
            let step = self.scan(start..range.end, &scan, regions)?;
            regions[..step.regions].iter().for_each(&mut each);
            // The kernel always comes further, or it would have failed; a walk that stands still would
            // loop for ever.
            if step.walk_end <= start {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            start = step.walk_end;
        }
        Ok(())
    }
}
