//! A point as something to read: a store for each array, which checks every byte that it hands out.
//!
//! Unsafe: preadv2(2), to read from the page cache alone.
//!
//! Nothing is loaded when a point is opened but its record and the directories of its arrays: 16 bytes for
//! each MiB. Leaves come with the first read of a block that they describe, and stay.
//!
//! A reader holds a shared lock on every segment of its point, so that pruning leaves their bytes alone.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use userfault_engine::lock::Mutex;
use userfault_store::Store;

use crate::codec;
use crate::entry::{ENTRY, Entry, Kind, LEAF, PAGE, from_bytes, hash};
use crate::error::Error;
use crate::folder::{flock, read_manifest, segment_name};
use crate::manifest::{
    ArrayRecord, DataRecord, Extent, LARGEST_DOCUMENT, Manifest, PointRecord, PointSummary,
};
use crate::segment::check_header;

/// The segments of a directory, opened when they are needed.
pub struct Files {
    path: PathBuf,
    identity: u64,
    open: Mutex<HashMap<u32, Arc<File>>>,
}

impl Files {
    pub fn new(path: &Path, identity: u64) -> Files {
        Files {
            path: path.to_path_buf(),
            identity,
            open: Mutex::default(),
        }
    }

    pub fn path_of(&self, number: u32) -> PathBuf {
        self.path.join(segment_name(number))
    }

    /// A segment, locked against being pruned, its header checked.
    pub fn segment(&self, number: u32) -> Result<Arc<File>, Error> {
        if let Some(file) = self.open.lock().get(&number) {
            return Ok(file.clone());
        }
        let path = self.path_of(number);
        let file = File::open(&path).map_err(|error| Error::io(&path, "opening", error))?;
        // The exclusive lock is held for a moment only, by a prune.
        while !flock(&file, false).map_err(|error| Error::io(&path, "locking", error))? {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let mut page = vec![0; PAGE];
        file.read_exact_at(&mut page, 0)
            .map_err(|error| Error::io(&path, "reading the header", error))?;
        check_header(&path, &page, number, self.identity)?;
        let file = Arc::new(file);
        self.open.lock().insert(number, file.clone());
        Ok(file)
    }

    /// Reads a document and checks its hash.
    pub fn document(&self, number: u32, extent: Extent) -> Result<Vec<u8>, Error> {
        let path = self.path_of(number);
        let file = self.segment(number)?;
        let length = file
            .metadata()
            .map_err(|error| Error::io(&path, "reading", error))?
            .len();
        let offset = u64::from(extent.page) * PAGE as u64;
        if extent.length > LARGEST_DOCUMENT || offset.saturating_add(extent.length) > length {
            return Err(Error::corrupt(&path, "is shorter than it was"));
        }
        let mut bytes = vec![0; extent.length as usize];
        file.read_exact_at(&mut bytes, offset)
            .map_err(|error| Error::io(&path, "reading", error))?;
        if hash(&bytes) != extent.hash {
            return Err(Error::corrupt(
                &path,
                format!("the {} bytes at {offset} are damaged", extent.length),
            ));
        }
        Ok(bytes)
    }

    /// Reads one block of at most `block` bytes and checks it.
    pub fn read_block(&self, entry: Entry, block: usize, into: &mut [u8]) -> Result<(), Error> {
        let path = self.path_of(entry.segment());
        let damaged = || {
            Error::corrupt(
                &path,
                format!("the block at offset {} is damaged", entry.offset()),
            )
        };
        match entry.kind() {
            Kind::Zero => {
                if !entry.plausible() {
                    return Err(damaged());
                }
                into.fill(0);
                return Ok(());
            }
            Kind::Raw => {
                read_at(
                    &*self.segment(entry.segment())?,
                    &path,
                    entry.offset(),
                    into,
                )?;
            }
            kind => {
                let file = self.segment(entry.segment())?;
                let mut head = [0; codec::HEADER];
                read_at(&file, &path, entry.offset(), &mut head)?;
                let (len, sum) = codec::header(&head, block).ok_or_else(damaged)?;
                let mut payload = vec![0; len];
                let at = entry.offset() + codec::HEADER as u64;
                read_at(&file, &path, at, &mut payload)?;
                if hash(&payload) != sum || !codec::decode(kind, &payload, into) {
                    return Err(damaged());
                }
            }
        }
        if hash(into) != entry.hash {
            return Err(damaged());
        }
        Ok(())
    }
}

fn read_at(file: &File, path: &Path, offset: u64, into: &mut [u8]) -> Result<(), Error> {
    file.read_exact_at(into, offset).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Error::corrupt(path, "is shorter than it was")
        } else {
            Error::io(path, "reading", error)
        }
    })
}

/// A directory of points, as it is at this moment.
pub struct Directory {
    path: PathBuf,
    manifest: Manifest,
}

impl Directory {
    /// Reads the manifest. Fails with [`Error::NoPoint`] if there is none.
    pub fn read(path: &Path) -> Result<Directory, Error> {
        let bytes = read_manifest(path)?.ok_or_else(|| {
            Error::NoPoint(format!("{}: there is no checkpoint here", path.display()))
        })?;
        Ok(Directory {
            path: path.to_path_buf(),
            manifest: Manifest::from_bytes(&path.join(crate::folder::MANIFEST), &bytes)?,
        })
    }

    /// The points, oldest first.
    pub fn points(&self) -> &[PointSummary] {
        &self.manifest.points
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The point of a step; `None`: the latest.
    pub fn find(&self, step: Option<u64>) -> Result<&PointSummary, Error> {
        let found = match step {
            None => self.manifest.points.last(),
            Some(step) => self.manifest.points.iter().find(|point| point.step == step),
        };
        found.ok_or_else(|| {
            let steps: Vec<String> = self
                .manifest
                .points
                .iter()
                .map(|point| point.step.to_string())
                .collect();
            Error::NoPoint(match step {
                Some(step) => format!(
                    "{}: there is no point of step {step}; there are: {}",
                    self.path.display(),
                    if steps.is_empty() {
                        "none".into()
                    } else {
                        steps.join(", ")
                    }
                ),
                None => format!("{}: there is no finished point", self.path.display()),
            })
        })
    }
}

/// A point that is open for reading.
pub struct OpenPoint {
    summary: PointSummary,
    record: PointRecord,
    files: Arc<Files>,
}

impl OpenPoint {
    /// Opens the point of a step, or the latest.
    pub fn open(path: &Path, step: Option<u64>) -> Result<OpenPoint, Error> {
        let mut tries = 0;
        loop {
            let directory = Directory::read(path)?;
            let summary = directory.find(step)?.clone();
            match OpenPoint::of(path, directory.manifest.identity, summary) {
                // It was pruned between the manifest and its files: look again.
                Err(Error::Io { error, .. })
                    if error.kind() == io::ErrorKind::NotFound && tries < 5 =>
                {
                    tries += 1;
                }
                result => return result,
            }
        }
    }

    pub(crate) fn of(
        path: &Path,
        identity: u64,
        summary: PointSummary,
    ) -> Result<OpenPoint, Error> {
        let files = Files::new(path, identity);
        for &number in &summary.segments {
            files.segment(number)?;
        }
        let bytes = files.document(summary.segment, summary.record)?;
        let at = files.path_of(summary.segment);
        let record = PointRecord::from_bytes(&at, &bytes)?;
        if record.step != summary.step {
            return Err(Error::corrupt(&at, "holds the record of another point"));
        }
        Ok(OpenPoint {
            summary,
            record,
            files: Arc::new(files),
        })
    }

    /// What the manifest says of it.
    pub fn summary(&self) -> &PointSummary {
        &self.summary
    }

    /// What the program kept with it: a JSON text.
    pub fn meta(&self) -> &str {
        &self.record.meta
    }

    /// Its arrays.
    pub fn arrays(&self) -> &[ArrayRecord] {
        &self.record.arrays
    }

    /// What is said of its data.
    pub fn data(&self) -> &[DataRecord] {
        &self.record.data
    }

    /// The bytes of one of its data.
    pub fn reader(&self, data: usize) -> Result<ArrayReader, Error> {
        let record = &self.record.data[data];
        let bytes = self
            .files
            .document(self.summary.segment, record.directory)?;
        let name = self
            .record
            .arrays
            .iter()
            .find(|array| array.data == data)
            .map_or("", |array| &array.name);
        Ok(ArrayReader {
            files: self.files.clone(),
            leaves: from_bytes(&bytes),
            loaded: (0..record.leaves()).map(|_| OnceLock::new()).collect(),
            record: record.clone(),
            name: format!(
                "{}, step {}, array {name:?}",
                self.files.path.display(),
                self.summary.step
            ),
        })
    }

    pub(crate) fn files(&self) -> &Arc<Files> {
        &self.files
    }
}

type Leaf = Box<[Entry]>;

/// The bytes of an array of a point, as a read-only store: its image, that is with the lead.
pub struct ArrayReader {
    files: Arc<Files>,
    leaves: Vec<Entry>,
    loaded: Vec<OnceLock<Leaf>>,
    record: DataRecord,
    name: String,
}

/// What is read at once, bytes: it is still in the cache when it is hashed.
const RUN: usize = 256 << 10;

/// Neighbouring raw blocks that are neighbours in their segment too.
struct Run {
    first: usize,
    entries: Vec<Entry>,
}

impl ArrayReader {
    /// What is said of it.
    pub fn record(&self) -> &DataRecord {
        &self.record
    }

    /// Where the leaves are.
    pub fn leaf_entries(&self) -> &[Entry] {
        &self.leaves
    }

    /// A leaf, checked; the entries that describe blocks.
    pub fn leaf(&self, number: usize) -> Result<&[Entry], Error> {
        if let Some(leaf) = self.loaded[number].get() {
            return Ok(leaf);
        }
        let place = self.leaves[number];
        let count = LEAF.min(self.record.blocks() - number * LEAF);
        let mut page = vec![0; PAGE];
        self.files.read_block(place, PAGE, &mut page)?;
        let path = self.files.path_of(place.segment());
        if place.kind() != Kind::Zero && place.kind() != Kind::Raw {
            return Err(Error::corrupt(&path, "a leaf of the index is not one"));
        }
        let mut leaf = from_bytes(&page);
        if leaf.iter().any(|entry| !entry.plausible())
            || page[count * ENTRY..].iter().any(|byte| *byte != 0)
        {
            return Err(Error::corrupt(
                &path,
                "a leaf of the index contradicts itself",
            ));
        }
        leaf.truncate(count);
        Ok(self.loaded[number].get_or_init(|| leaf.into_boxed_slice()))
    }

    /// The entry of a block.
    pub fn entry(&self, block: usize) -> Result<Entry, Error> {
        Ok(self.leaf(block / LEAF)?[block % LEAF])
    }

    /// Bytes of a block.
    pub fn len_of(&self, block: usize) -> usize {
        let block_size = self.record.block as usize;
        block_size.min(self.record.image() as usize - block * block_size)
    }

    fn in_words(&self, block: usize, error: Error) -> io::Error {
        let errno = match &error {
            Error::Io { error, .. } => error.raw_os_error(),
            _ => None,
        };
        match errno {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(format!("{}: block {block}: {error}", self.name)),
        }
    }

    /// Reads the image at `offset`; false if `now` and that would wait.
    fn read_image(&self, offset: u64, buf: &mut [u8], now: bool) -> io::Result<bool> {
        let size = self.record.block as usize;
        let image = self.record.image() as usize;
        let start = (offset as usize).min(image);
        let end = (start + buf.len()).min(image);
        buf[end - start..].fill(0);
        let mut at = start;
        while at < end {
            let block = at / size;
            let len = self.len_of(block);
            let whole = at.is_multiple_of(size) && at + len <= end;
            let entry = self
                .entry(block)
                .map_err(|error| self.in_words(block, error))?;
            if whole && entry.kind() == Kind::Raw {
                let run = self.run_from(block, entry, end)?;
                let bytes: usize = (0..run.entries.len())
                    .map(|more| self.len_of(run.first + more))
                    .sum();
                if !self.read_run(&run, &mut buf[at - start..at - start + bytes], now)? {
                    return Ok(false);
                }
                at += bytes;
                continue;
            }
            if now && entry.kind() != Kind::Zero {
                return Ok(false);
            }
            let step = (block * size + len - at).min(end - at);
            let into = &mut buf[at - start..at - start + step];
            let read = if whole {
                self.files.read_block(entry, size, into)
            } else {
                let mut bytes = vec![0; len];
                self.files
                    .read_block(entry, size, &mut bytes)
                    .map(|()| into.copy_from_slice(&bytes[at - block * size..][..step]))
            };
            read.map_err(|error| self.in_words(block, error))?;
            at += step;
        }
        Ok(true)
    }

    fn run_from(&self, first: usize, entry: Entry, end: usize) -> io::Result<Run> {
        let size = self.record.block as usize;
        let pages = (size / PAGE) as u32;
        let most = (RUN / size).max(1);
        let mut entries = Vec::with_capacity(most.min(self.record.blocks() - first));
        entries.push(entry);
        while entries.len() < most {
            let block = first + entries.len();
            // Only after whole blocks, and as far as whole blocks are asked for.
            if block >= self.record.blocks() || block * size + self.len_of(block) > end {
                break;
            }
            let next = self
                .entry(block)
                .map_err(|error| self.in_words(block, error))?;
            let expected = u64::from(entry.page()) + entries.len() as u64 * u64::from(pages);
            if next.kind() != Kind::Raw
                || next.segment() != entry.segment()
                || u64::from(next.page()) != expected
            {
                break;
            }
            entries.push(next);
        }
        Ok(Run { first, entries })
    }

    fn read_run(&self, run: &Run, buf: &mut [u8], now: bool) -> io::Result<bool> {
        let place = run.entries[0];
        let path = self.files.path_of(place.segment());
        let failed = |error| self.in_words(run.first, error);
        let file = self.files.segment(place.segment()).map_err(failed)?;
        if now {
            if !read_cached(&file, place.offset(), buf) {
                return Ok(false);
            }
        } else {
            read_at(&file, &path, place.offset(), buf).map_err(failed)?;
        }
        let mut at = 0;
        for (more, entry) in run.entries.iter().enumerate() {
            let block = run.first + more;
            let len = self.len_of(block);
            if hash(&buf[at..at + len]) != entry.hash {
                return Err(self.in_words(
                    block,
                    Error::corrupt(
                        &path,
                        format!("the bytes at {} are damaged", entry.offset()),
                    ),
                ));
            }
            at += len;
        }
        Ok(true)
    }

    /// Reads `buf.len()` bytes of the array, without the lead, from `offset` on; several threads at once.
    pub fn read_array(&self, offset: u64, buf: &mut [u8], threads: usize) -> io::Result<()> {
        const PIECE: usize = 4 << 20;
        let lead = self.record.lead;
        let pieces: Vec<(usize, &mut [u8])> = {
            // Pieces end at blocks of the image, so that no block is read twice.
            let mut rest = buf;
            let mut at = 0;
            let mut pieces = Vec::new();
            while !rest.is_empty() {
                let image = lead as usize + offset as usize + at;
                let len = ((image / PIECE + 1) * PIECE - image).min(rest.len());
                let (piece, tail) = rest.split_at_mut(len);
                pieces.push((at, piece));
                at += len;
                rest = tail;
            }
            pieces
        };
        let threads = threads.clamp(1, pieces.len().max(1));
        let queue = Mutex::new(pieces.into_iter());
        let work = || -> io::Result<()> {
            loop {
                let Some((at, piece)) = queue.lock().next() else {
                    return Ok(());
                };
                self.read_image(lead + offset + at as u64, piece, false)?;
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut result = work();
            for other in others {
                let ended = other
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
                result = result.and(ended);
            }
            result
        })
    }
}

/// Fills `buf` if all of it is in the page cache.
fn read_cached(file: &File, offset: u64, buf: &mut [u8]) -> bool {
    let iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: `iov` names `buf`, which is borrowed for writing until the call returns.
    let read = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            &raw const iov,
            1,
            offset as libc::off_t,
            libc::RWF_NOWAIT,
        )
    };
    usize::try_from(read) == Ok(buf.len())
}

impl Store for ArrayReader {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_image(offset, buf, false).map(|_| ())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_image(offset, buf, true)
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EBADF))
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EBADF))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.record.image()
    }

    fn writable(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
