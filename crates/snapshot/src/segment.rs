//! A segment: the file that one save writes. Everything in it begins at a page.
//!
//! ```text
//!   page 0      header: magic, version, number, identity of the directory, hash
//!   page 1 ...  blocks, as the drain and the save come to them
//!   ...         leaves: 256 entries each, for blocks 0-255, 256-511 ... of an array
//!   ...         directories: for each array one entry for each leaf
//!   ...         the point's record, JSON
//! ```
//!
//! Until the manifest names it, a segment is private to its writer: a block that is drained twice is
//! overwritten in place.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::entry::{PAGE, hash};
use crate::error::Error;
use crate::folder::{Folder, KeptFile};
use crate::manifest::{Extent, VERSION};

const MAGIC: &[u8; 8] = b"UFSEGMNT";

/// Bytes after which the disk is started on what was written.
const STRIDE: u64 = 8 << 20;

/// The header of a segment, one page.
pub fn header(number: u32, identity: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    page[..8].copy_from_slice(MAGIC);
    page[8..12].copy_from_slice(&VERSION.to_le_bytes());
    page[12..16].copy_from_slice(&number.to_le_bytes());
    page[16..24].copy_from_slice(&identity.to_le_bytes());
    let sum = hash(&page[..24]);
    page[24..32].copy_from_slice(&sum.to_le_bytes());
    page
}

/// Refuses a first page that is not the header of this segment.
pub fn check_header(path: &Path, page: &[u8], number: u32, identity: u64) -> Result<(), Error> {
    if page == header(number, identity) {
        return Ok(());
    }
    Err(Error::corrupt(
        path,
        "the header is not that of this segment of this directory",
    ))
}

/// A segment that is being written.
pub struct SegmentWriter {
    file: KeptFile,
    number: u32,
    next: u32,
    /// Bytes up to which the disk has been started.
    started: u64,
    /// Pages that were used and are not any more.
    unused: Vec<Range<u32>>,
    /// Pages of each compressed block, by its first.
    sizes: HashMap<u32, u32>,
    /// Bytes written.
    pub written: u64,
}

impl SegmentWriter {
    /// A new segment file.
    pub fn create(folder: &Folder, number: u32, identity: u64) -> Result<SegmentWriter, Error> {
        let file = folder.create_segment(number)?;
        let writer = SegmentWriter {
            file,
            number,
            next: 1,
            started: 0,
            unused: Vec::new(),
            sizes: HashMap::new(),
            written: 0,
        };
        folder.write(&writer.file, number, 0, &header(number, identity))?;
        Ok(writer)
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Takes whole pages for `len` bytes; the first of them.
    pub fn take(&mut self, folder: &Folder, len: usize) -> Result<u32, Error> {
        let page = self.next;
        let next = u64::from(page) + len.div_ceil(PAGE) as u64;
        self.next = u32::try_from(next).map_err(|_| {
            Error::corrupt(&folder.segment(self.number), "a segment has at most 16 TiB")
        })?;
        Ok(page)
    }

    /// Notes how long a compressed block is, bytes.
    pub fn note_size(&mut self, page: u32, len: usize) {
        self.sizes.insert(page, len.div_ceil(PAGE) as u32);
    }

    /// Pages of the compressed block that begins here.
    pub fn size_at(&self, page: u32) -> u32 {
        self.sizes.get(&page).copied().unwrap_or(0)
    }

    /// Notes that pages hold nothing any more.
    pub fn drop_pages(&mut self, pages: Range<u32>) {
        if !pages.is_empty() {
            self.unused.push(pages);
        }
    }

    /// Writes at a page that was taken.
    pub fn write(&mut self, folder: &Folder, page: u32, bytes: &[u8]) -> Result<(), Error> {
        let offset = u64::from(page) * PAGE as u64;
        folder.write(&self.file, self.number, offset, bytes)?;
        self.written += bytes.len() as u64;
        let end = offset + bytes.len() as u64;
        if end >= self.started + STRIDE {
            folder.begin_writeback(&self.file, self.started, end - self.started);
            self.started = end;
        }
        Ok(())
    }

    /// Appends a document.
    pub fn append(&mut self, folder: &Folder, bytes: &[u8]) -> Result<Extent, Error> {
        let page = self.take(folder, bytes.len())?;
        self.write(folder, page, bytes)?;
        Ok(Extent {
            page,
            length: bytes.len() as u64,
            hash: hash(bytes),
        })
    }

    /// Gives back what is not used, and makes the rest durable.
    pub fn finish(&mut self, folder: &Folder) -> Result<(), Error> {
        for pages in std::mem::take(&mut self.unused) {
            let (offset, len) = (
                u64::from(pages.start) * PAGE as u64,
                pages.len() as u64 * PAGE as u64,
            );
            folder.punch(&self.file, self.number, offset, len)?;
        }
        folder.finish_segment(&self.file, self.number, u64::from(self.next) * PAGE as u64)
    }
}
