//! Finding a wrong byte: every byte of every file of a directory is accounted for.
//!
//! Unsafe: lseek(2) for holes, which the standard library does not have.
//!
//! Documents, leaves and blocks have hashes; headers are known in full; and what no point refers to is
//! zeros, since writers leave holes there. So any single changed byte is found, and named.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use userfault_engine::dirty::DirtyMap;

use crate::entry::{Entry, Kind, LEAF, PAGE, is_zero};
use crate::error::Error;
use crate::folder::segment_name;
use crate::prune::stored_len;
use crate::reader::{Directory, Files, OpenPoint};

/// Bytes that are not what they were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The point, if one is touched.
    pub step: Option<u64>,
    /// The array, if it is known.
    pub array: Option<String>,
    /// The first byte of the damaged block in the array, if it is known.
    pub offset: Option<u64>,
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub detail: String,
}

/// What was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Points.
    pub points: usize,
    /// Bytes of blocks that were read and hashed.
    pub bytes: u64,
    /// Everything that is wrong.
    pub damage: Vec<Damage>,
    /// Bytes that belong to no point and are not zeros: a prune was killed (the next one gives them back),
    /// or a hole was written to. No restore reads them.
    pub unused: Vec<Damage>,
}

struct Search {
    identity: u64,
    path: PathBuf,
    found: Verified,
    /// Pages of each segment that points refer to.
    used: BTreeMap<u32, DirtyMap>,
    /// Stored things that are sound, by place.
    sound: HashSet<(u32, u32)>,
    /// And those that are not, with what is wrong.
    unsound: HashMap<(u32, u32), Error>,
}

/// Checks the points of a directory: all, or one of them. `progress` hears of bytes as they are checked, and
/// stops everything by answering false.
pub fn verify(
    path: &Path,
    step: Option<u64>,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Verified, Error> {
    let directory = match Directory::read(path) {
        Ok(directory) => directory,
        Err(Error::Corrupt { path, detail }) => {
            return Ok(Verified {
                damage: vec![Damage {
                    step: None,
                    array: None,
                    offset: None,
                    path,
                    detail,
                }],
                ..Verified::default()
            });
        }
        Err(error) => return Err(error),
    };
    let points = match step {
        None => directory.points().to_vec(),
        Some(_) => vec![directory.find(step)?.clone()],
    };
    let identity = directory.manifest().identity;
    let mut search = Search {
        identity,
        path: path.to_path_buf(),
        found: Verified::default(),
        used: BTreeMap::new(),
        sound: HashSet::new(),
        unsound: HashMap::new(),
    };
    let mut whole = true;
    for summary in points {
        search.found.points += 1;
        let step = summary.step;
        match OpenPoint::of(path, identity, summary) {
            Ok(point) => {
                if !search.point(&point, progress) {
                    return Ok(search.found);
                }
            }
            Err(error) => {
                whole = false;
                search.note(Some(step), None, None, &error);
            }
        }
    }
    // What is not used can only be told when everything that uses something could be read.
    if step.is_none() && whole && search.found.damage.is_empty() {
        search.unused()?;
    }
    Ok(search.found)
}

impl Search {
    fn note(&mut self, step: Option<u64>, array: Option<&str>, offset: Option<u64>, error: &Error) {
        let (path, detail) = match error {
            Error::Corrupt { path, detail } => (path.clone(), detail.clone()),
            Error::Io { path, call, error } => (path.clone(), format!("{call} failed: {error}")),
            other => (self.path.clone(), other.to_string()),
        };
        self.found.damage.push(Damage {
            step,
            array: array.map(str::to_owned),
            offset,
            path,
            detail,
        });
    }

    fn mark(&mut self, number: u32, page: u32, len: usize) {
        let path = self.path.join(segment_name(number));
        let pages = self.used.entry(number).or_insert_with(|| {
            let len = std::fs::metadata(path).map_or(0, |meta| meta.len());
            let mut pages = DirtyMap::new((len as usize).div_ceil(PAGE));
            pages.insert(0..1.min(pages.pages()));
            pages
        });
        let end = (page as usize + len.div_ceil(PAGE)).min(pages.pages());
        pages.insert((page as usize).min(end)..end);
    }

    /// False if it was stopped.
    fn point(&mut self, point: &OpenPoint, progress: &mut dyn FnMut(u64) -> bool) -> bool {
        let step = Some(point.summary().step);
        let own = point.summary().segment;
        let files = point.files().clone();
        let record = point.summary().record;
        self.mark(own, record.page, record.length as usize);
        self.tail(&files, own, record.page, record.length as usize, step, None);
        for (number, data) in point.data().iter().enumerate() {
            let name = point
                .arrays()
                .iter()
                .find(|array| array.data == number)
                .map(|array| array.name.clone());
            let name = name.as_deref();
            let (page, len) = (data.directory.page, data.directory.length as usize);
            self.mark(own, page, len);
            self.tail(&files, own, page, len, step, name);
            let reader = match point.reader(number) {
                Ok(reader) => reader,
                Err(error) => {
                    self.note(step, name, None, &error);
                    continue;
                }
            };
            for leaf in 0..data.leaves() {
                let place = reader.leaf_entries()[leaf];
                if place.kind() != Kind::Zero {
                    self.mark(place.segment(), place.page(), PAGE);
                }
                let entries = match reader.leaf(leaf) {
                    Ok(entries) => entries,
                    Err(error) => {
                        let at = (leaf * LEAF) as u64 * data.block;
                        self.note(step, name, Some(at.saturating_sub(data.lead)), &error);
                        continue;
                    }
                };
                for (at, &entry) in entries.iter().enumerate() {
                    let block = leaf * LEAF + at;
                    let len = reader.len_of(block);
                    if let Err(error) = self.block(&files, entry, data.block as usize, len) {
                        let offset = block as u64 * data.block;
                        self.note(step, name, Some(offset.saturating_sub(data.lead)), &error);
                    }
                    if !progress(len as u64) {
                        return false;
                    }
                }
            }
        }
        true
    }

    fn block(&mut self, files: &Files, entry: Entry, size: usize, len: usize) -> Result<(), Error> {
        if entry.kind() == Kind::Zero {
            return Ok(());
        }
        let place = (entry.segment(), entry.page());
        if self.sound.contains(&place) {
            return Ok(());
        }
        if let Some(error) = self.unsound.get(&place) {
            return Err(error.clone());
        }
        let check = || -> Result<usize, Error> {
            let mut bytes = vec![0; len];
            files.read_block(entry, size, &mut bytes)?;
            let stored = stored_len(files, entry, size, len)?;
            zeros_after(files, entry.segment(), entry.page(), stored)?;
            Ok(stored)
        };
        match check() {
            Ok(stored) => {
                self.mark(place.0, place.1, stored);
                self.sound.insert(place);
                self.found.bytes += len as u64;
                Ok(())
            }
            Err(error) => {
                self.unsound.insert(place, error.clone());
                Err(error)
            }
        }
    }

    /// Checks the rest of a document's last page.
    fn tail(
        &mut self,
        files: &Files,
        number: u32,
        page: u32,
        len: usize,
        step: Option<u64>,
        array: Option<&str>,
    ) {
        if let Err(error) = zeros_after(files, number, page, len) {
            self.note(step, array, None, &error);
        }
    }

    /// Checks that the pages which no point refers to are zeros.
    fn unused(&mut self) -> Result<(), Error> {
        let files = Files::new(&self.path, self.identity);
        for (number, pages) in std::mem::take(&mut self.used) {
            let path = files.path_of(number);
            let file = files.segment(number)?;
            let len = file.metadata().map_or(0, |meta| meta.len());
            let mut at = 0;
            for run in pages
                .runs(0..pages.pages())
                .into_iter()
                .chain(std::iter::once(pages.pages()..pages.pages()))
            {
                // The last page may not be whole.
                let end = (run.start * PAGE).min(len as usize);
                if let Some(offset) = first_data(&file, &path, at * PAGE, end)? {
                    let error = Error::corrupt(
                        &path,
                        format!("the byte at {offset} belongs to nothing and is not zero"),
                    );
                    self.note(None, None, None, &error);
                    self.found.unused.extend(self.found.damage.pop());
                }
                at = run.end;
            }
            if len % PAGE as u64 != 0 {
                let error = Error::corrupt(&path, "its length is no multiple of a page");
                self.note(None, None, None, &error);
            }
        }
        Ok(())
    }
}

/// Fails unless the bytes after `len` stored ones are zeros to the end of their page.
fn zeros_after(files: &Files, number: u32, page: u32, len: usize) -> Result<(), Error> {
    let rest = len.next_multiple_of(PAGE) - len;
    if rest == 0 {
        return Ok(());
    }
    let path = files.path_of(number);
    let offset = u64::from(page) * PAGE as u64 + len as u64;
    let mut bytes = vec![0; rest];
    files
        .segment(number)?
        .read_exact_at(&mut bytes, offset)
        .map_err(|error| Error::io(&path, "reading", error))?;
    if is_zero(&bytes) {
        return Ok(());
    }
    Err(Error::corrupt(
        &path,
        format!("the padding at {offset} is not zero"),
    ))
}

/// The first byte of a range that is not zero. Holes are skipped.
fn first_data(file: &File, path: &Path, from: usize, to: usize) -> Result<Option<u64>, Error> {
    let failed = |error| Error::io(path, "reading", error);
    let mut at = from as u64;
    let mut bytes = vec![0; 1 << 16];
    while at < to as u64 {
        // SAFETY: takes a descriptor, which `file` keeps open, and numbers. The position is nobody's.
        let data = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
        if data >= 0 {
            at = data as u64;
        } else if std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) {
            // Holes to the end.
            return Ok(None);
        }
        if at >= to as u64 {
            return Ok(None);
        }
        let len = bytes.len().min((to as u64 - at) as usize);
        file.read_exact_at(&mut bytes[..len], at).map_err(failed)?;
        if let Some(place) = bytes[..len].iter().position(|byte| *byte != 0) {
            return Ok(Some(at + place as u64));
        }
        at += len as u64;
    }
    Ok(None)
}
