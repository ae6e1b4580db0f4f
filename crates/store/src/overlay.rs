//! Private changes: a store whose writes go to scratch and never to what lies below.
//!
//! Mode "c" lies on a file that must not change; an array without a file lies on nothing, which reads as
//! zeros. Pages that were written live in a scratch file that is unlinked from the beginning, so nothing
//! of it outlives the process. Which pages those are is kept in memory: one bit for each 4 KiB. So a page is either
//! the scratch file's or of what lies below, and a range that is all one's is read as that one reads it, in flight and
//! in a signal handler too.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Store;
use crate::file::{FileMode, FileOptions, FileStore, OpenError};
use crate::lock::Locking;
use crate::moved::Moved;

/// The unit in which changes move to scratch, bytes.
const PAGE: usize = 4096;

/// A store of private changes.
pub struct OverlayStore {
    below: Option<Arc<dyn Store>>,
    /// Where the overlay begins in what lies below, bytes.
    offset: u64,
    len: u64,
    scratch: FileStore,
    folder: PathBuf,
    moved: Moved,
    name: String,
}

impl OverlayStore {
    /// `len` bytes of `below` from `offset` on, or `len` zeros, with changes in a scratch file in `folder`.
    pub fn new(
        below: Option<Arc<dyn Store>>,
        offset: u64,
        len: u64,
        folder: &Path,
        name: String,
    ) -> Result<Self, OpenError> {
        let failed = |error: io::Error| OpenError::Scratch {
            folder: folder.to_path_buf(),
            len,
            error,
        };
        let file = unlinked(folder).map_err(failed)?;
        let options = FileOptions {
            min_len: len.next_multiple_of(PAGE as u64),
            locking: Locking::Off,
            ..FileOptions::new(FileMode::ReadWrite)
        };
        // The store opens the file anew, which an unlinked one allows by its descriptor alone.
        let scratch = FileStore::open(format!("/proc/self/fd/{}", file.as_raw_fd()), options)
            .map_err(|error| match error {
                // The descriptor's name would tell nobody anything.
                OpenError::Io { error, .. } => failed(error),
                other => other,
            })?;
        Ok(Self {
            below,
            offset,
            len,
            scratch,
            folder: folder.to_path_buf(),
            moved: Moved::new((len as usize).div_ceil(PAGE)),
            name,
        })
    }

    /// Bytes that differ from what lies below, as far as they have been written here.
    pub fn changed(&self) -> u64 {
        (self.moved.count() * PAGE) as u64
    }

    /// The first piece of a range that is not empty: where its bytes are, at which offset there, and where it
    /// ends here.
    fn piece(&self, offset: u64, end: u64) -> (Place<'_>, u64, u64) {
        let page = PAGE as u64;
        let pages = (offset / page) as usize..end.div_ceil(page) as usize;
        let (moved, until) = self.moved.run(pages);
        let until = end.min(until as u64 * page);
        match &self.below {
            _ if moved => (Place::Scratch(&self.scratch), offset, until),
            Some(below) => (Place::Below(&**below), self.offset + offset, until),
            None => (Place::Nowhere, offset, until),
        }
    }

    /// Where all of a range is, if that is one place, and at which offset there.
    fn whole(&self, offset: u64, len: u64) -> Option<(Place<'_>, u64)> {
        let end = offset + len;
        if len == 0 || end > self.len {
            return None;
        }
        let (place, there, until) = self.piece(offset, end);
        (until == end).then_some((place, there))
    }

    /// Reads a range piece by piece, until `read` says false. Allocates nothing.
    fn read_pieces(
        &self,
        offset: u64,
        buf: &mut [u8],
        mut read: impl FnMut(&dyn Store, u64, &mut [u8]) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let stored = (buf.len() as u64).min(self.len.saturating_sub(offset)) as usize;
        let (mut bytes, tail) = buf.split_at_mut(stored);
        tail.fill(0);
        let (mut at, end) = (offset, offset + stored as u64);
        while at < end {
            let (place, there, until) = self.piece(at, end);
            let (into, rest) = bytes.split_at_mut((until - at) as usize);
            match place.store() {
                Some(store) if !read(store, there, into)? => return Ok(false),
                Some(_) => {}
                None => into.fill(0),
            }
            (bytes, at) = (rest, until);
        }
        Ok(true)
    }
}

/// Where bytes of an overlay are.
enum Place<'a> {
    Scratch(&'a FileStore),
    Below(&'a dyn Store),
    /// Zeros that nobody has written.
    Nowhere,
}

impl<'a> Place<'a> {
    fn store(&self) -> Option<&'a dyn Store> {
        match *self {
            Place::Scratch(store) => Some(store),
            Place::Below(store) => Some(store),
            Place::Nowhere => None,
        }
    }
}

impl Store for OverlayStore {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_pieces(offset, buf, |store, at, into| {
            store.read(at, into).map(|()| true)
        })
        .map(|_| ())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_pieces(offset, buf, |store, at, into| store.read_now(at, into))
    }

    fn read_bare(&self, offset: u64, buf: &mut [u8]) -> bool {
        let bare = |store: &dyn Store, at, into: &mut [u8]| Ok(store.read_bare(at, into));
        self.read_pieces(offset, buf, bare).unwrap_or(false)
    }

    fn direct(&self, offset: u64, len: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let (place, there) = self.whole(offset, len as u64)?;
        place.store()?.direct(there, len)
    }

    fn will_read(&self, offset: u64, len: u64) -> bool {
        // What moved to scratch came by a write: it is in the page cache, or was pushed out of it.
        match self.whole(offset, len) {
            Some((Place::Below(store), there)) => store.will_read(there, len),
            _ => false,
        }
    }

    fn was_read(&self, offset: u64, len: u64) {
        if let Some(below) = &self.below {
            below.was_read(self.offset + offset, len);
        }
    }

    /// Takes whole pages, as the engine writes them; only the last page of the store may be cut.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        if !offset.is_multiple_of(PAGE as u64)
            || !(end.is_multiple_of(PAGE as u64) || end == self.len)
        {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.scratch.write_leaving(offset, data).map_err(|error| {
            io::Error::other(ScratchError {
                folder: self.folder.clone(),
                error,
            })
        })?;
        self.moved
            .insert(offset as usize / PAGE..(end as usize).div_ceil(PAGE));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = (offset + len).min(self.len);
        let pages = (offset as usize).div_ceil(PAGE)..end as usize / PAGE;
        let inner = (pages.start * PAGE) as u64..(pages.end.max(pages.start) * PAGE) as u64;
        if !inner.is_empty() {
            self.scratch.punch(inner.start, inner.end - inner.start)?;
            // Over nothing a page that is gone is zeros anyhow; over a file its zeros hide the file's bytes.
            if self.below.is_none() {
                self.moved.remove(pages);
            } else {
                self.moved.insert(pages);
            }
        }
        for edge in [offset..inner.start.min(end), inner.end.max(offset)..end] {
            if edge.start < edge.end {
                let page = edge.start / PAGE as u64 * PAGE as u64;
                let mut bytes = vec![0; PAGE.min((self.len - page) as usize)];
                self.read(page, &mut bytes)?;
                bytes[(edge.start - page) as usize..(edge.end - page) as usize].fill(0);
                self.write(page, &bytes)?;
            }
        }
        Ok(())
    }

    /// Private changes are never durable.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn preferred_block(&self) -> usize {
        self.below
            .as_ref()
            .map_or(0, |below| below.preferred_block())
    }

    fn concurrent_reads(&self) -> bool {
        self.below
            .as_ref()
            .is_none_or(|below| below.concurrent_reads())
    }

    fn writable(&self) -> bool {
        true
    }

    fn remote(&self) -> bool {
        self.below.as_ref().is_some_and(|below| below.remote())
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// The scratch file did not take what had to leave memory.
#[derive(Debug)]
struct ScratchError {
    folder: PathBuf,
    error: io::Error,
}

impl fmt::Display for ScratchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (folder, error) = (self.folder.display(), &self.error);
        write!(f, "the scratch file in {folder}: {error}")
    }
}

impl std::error::Error for ScratchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// A file in `folder` that has no name.
fn unlinked(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(folder) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
            ) =>
        {
            // A file system without nameless files.
            let path = folder.join(format!(
                "userfault-scratch-{}-{:?}",
                std::process::id(),
                std::time::Instant::now()
            ));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;

    fn overlay(bytes: Vec<u8>, offset: u64, len: u64) -> (Arc<MemoryStore>, OverlayStore) {
        let below = Arc::new(MemoryStore::new(bytes));
        let store = OverlayStore::new(
            Some(below.clone()),
            offset,
            len,
            &std::env::temp_dir(),
            "test".into(),
        )
        .unwrap();
        (below, store)
    }

    #[test]
    fn writes_are_read_back_and_never_reach_what_lies_below() {
        let bytes: Vec<u8> = (0..40_000u32).map(|n| n as u8).collect();
        let (below, store) = overlay(bytes.clone(), 100, 30_000);
        store.write(4096, &[7; 8192]).unwrap();
        store.write(28_672, &[9; 30_000 - 28_672]).unwrap();
        let mut expected = bytes[100..30_100].to_vec();
        expected[4096..12_288].fill(7);
        expected[28_672..].fill(9);
        let mut read = vec![1; 30_100];
        store.read(0, &mut read).unwrap();
        assert_eq!(&read[..30_000], &expected[..]);
        assert_eq!(&read[30_000..], &[0; 100][..]);
        assert_eq!(below.to_vec(), bytes);
        assert_eq!(store.changed(), 3 * 4096);
        store.punch(5000, 10_000).unwrap();
        expected[5000..15_000].fill(0);
        store.read(0, &mut read[..30_000]).unwrap();
        assert_eq!(&read[..30_000], &expected[..]);
    }

    #[test]
    fn over_nothing_it_reads_zeros_and_gives_punched_space_back() {
        let store =
            OverlayStore::new(None, 0, 1 << 20, &std::env::temp_dir(), "array".into()).unwrap();
        let mut read = vec![1; 1 << 20];
        assert!(store.read_now(0, &mut read).unwrap());
        assert!(read.iter().all(|byte| *byte == 0));
        store.write(0, &[5; 65_536]).unwrap();
        store.punch(0, 1 << 20).unwrap();
        assert_eq!(store.changed(), 0);
        store.read(0, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_range_that_is_all_in_one_place_is_read_as_it_is_there() {
        // In the build's folder, which is on a disk: what is in memory has nothing to go past.
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = folder.join(format!("overlay-{}", std::process::id()));
        let bytes: Vec<u8> = (0..64 * PAGE).map(|n| (n / 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let below = FileStore::open(&path, FileOptions::new(FileMode::Read)).unwrap();
        std::fs::remove_file(&path).unwrap();
        let below: Arc<dyn Store> = Arc::new(below);
        let page = PAGE as u64;
        let store = OverlayStore::new(Some(below), 4 * page, 50 * page, folder, "test".into());
        let store = store.unwrap();
        store.write(10 * page, &[7; 2 * PAGE]).unwrap();
        let mut read = vec![1; 52 * PAGE];
        assert!(store.read_bare(0, &mut read), "in a signal handler");
        let mut expected = bytes[4 * PAGE..54 * PAGE].to_vec();
        expected[10 * PAGE..12 * PAGE].fill(7);
        assert_eq!(&read[..50 * PAGE], &expected[..]);
        assert_eq!(&read[50 * PAGE..], &[0; 2 * PAGE][..]);
        assert_eq!(store.whole(0, 10 * page).unwrap().1, 4 * page);
        assert_eq!(store.whole(10 * page, 2 * page).unwrap().1, 10 * page);
        assert!(store.whole(9 * page, 2 * page).is_none(), "in both");
        assert!(store.direct(9 * page, 2 * PAGE).is_none());
        assert!(store.whole(49 * page, 2 * page).is_none(), "past the end");
    }

    #[test]
    fn half_a_page_in_the_middle_is_refused() {
        let (_, store) = overlay(vec![0; 16_384], 0, 16_384);
        assert_eq!(
            store.write(100, &[1; 4096]).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
        assert_eq!(
            store.write(0, &[1; 100]).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
