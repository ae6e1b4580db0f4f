//! A directory of points: its files, its lock, and every call on them.
//!
//! Unsafe: fallocate, flock and sync_file_range, which the standard library does not have.
//!
//! All I/O of a save goes through here, so that a test can make each call fail, or hang, in turn.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use userfault_engine::lock::Mutex;
use userfault_engine::{Kept, forget, generation, keep};

use crate::error::Error;

/// A call on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Making a file.
    Create,
    /// Writing.
    Write,
    /// Making durable.
    Sync,
    /// Giving a file its name.
    Rename,
    /// Giving space back.
    Punch,
    /// Removing a file.
    Remove,
}

/// Called before each call on a file: it may fail it, or not return for a while.
pub type Fault = Arc<dyn Fn(Op) -> io::Result<()> + Send + Sync>;

/// The name of the manifest.
pub const MANIFEST: &str = "MANIFEST";
const NEW_MANIFEST: &str = "MANIFEST.new";
const LOCK: &str = "LOCK";

/// An open file that a forked child does not get: a lock would outlive this process in it.
pub struct KeptFile {
    file: ManuallyDrop<File>,
    generation: u32,
}

impl KeptFile {
    /// Keeps a file from children.
    pub fn new(file: File) -> KeptFile {
        keep(&[Kept::Descriptor(file.as_raw_fd())]);
        KeptFile {
            file: ManuallyDrop::new(file),
            generation: generation(),
        }
    }
}

impl Deref for KeptFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for KeptFile {
    fn drop(&mut self) {
        // In a child the descriptor was closed at the fork, and its number may be somebody else's.
        if self.generation == generation() {
            forget(&[Kept::Descriptor(self.file.as_raw_fd())]);
            // SAFETY: the file is not used any more.
            unsafe { ManuallyDrop::drop(&mut self.file) };
        }
    }
}

/// A directory, locked for one writer.
pub struct Folder {
    path: PathBuf,
    lock: Mutex<Option<KeptFile>>,
    durable: bool,
    fault: Option<Fault>,
}

/// The name of a segment.
pub fn segment_name(number: u32) -> String {
    format!("segment-{number:010}")
}

/// The number in a segment's name.
pub fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("segment-")?;
    (digits.len() == 10 && digits.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

/// A lock of flock(2), which ends with the descriptor; false if somebody else has one that excludes it.
pub fn flock(file: &File, exclusive: bool) -> io::Result<bool> {
    let how = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    // SAFETY: takes a descriptor, which `file` keeps open, and a number.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Ok(false);
    }
    Err(error)
}

impl Folder {
    /// Makes the directory if need be, and locks it. It stays that one wherever the program goes.
    pub fn open(path: &Path, durable: bool, fault: Option<Fault>) -> Result<Folder, Error> {
        let path = &std::path::absolute(path).map_err(|error| Error::io(path, "finding", error))?;
        make(path, durable).map_err(|error| Error::io(path, "making the directory", error))?;
        let at = path.join(LOCK);
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&at)
            .map_err(|error| Error::io(&at, "opening", error))?;
        match flock(&lock, true) {
            Ok(true) => {}
            Ok(false) => return Err(Error::InUse(path.to_path_buf())),
            Err(error) => return Err(Error::io(&at, "locking", error)),
        }
        Ok(Folder {
            path: path.to_path_buf(),
            lock: Mutex::new(Some(KeptFile::new(lock))),
            durable,
            fault,
        })
    }

    /// Lets others save into it.
    pub fn unlock(&self) {
        *self.lock.lock() = None;
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a segment.
    pub fn segment(&self, number: u32) -> PathBuf {
        self.path.join(segment_name(number))
    }

    fn before(&self, op: Op) -> io::Result<()> {
        self.fault.as_ref().map_or(Ok(()), |fault| fault(op))
    }

    /// A new segment file.
    pub fn create_segment(&self, number: u32) -> Result<KeptFile, Error> {
        let path = self.segment(number);
        self.before(Op::Create)
            .and_then(|()| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(&path)
            })
            .map(KeptFile::new)
            .map_err(|error| Error::io(&path, "making", error))
    }

    /// Writes all of `bytes`.
    pub fn write(&self, file: &File, number: u32, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.before(Op::Write)
            .and_then(|()| file.write_all_at(bytes, offset))
            .map_err(|error| Error::io(&self.segment(number), "writing", error))
    }

    /// Starts the disk on what has been written, and does not wait for it.
    pub fn begin_writeback(&self, file: &File, offset: u64, len: u64) {
        if self.durable {
            // Advice only: the sync at the end is what counts.
            // SAFETY: takes a descriptor, which `file` keeps open, and numbers.
            unsafe {
                libc::sync_file_range(
                    file.as_raw_fd(),
                    offset as libc::off64_t,
                    len as libc::off64_t,
                    libc::SYNC_FILE_RANGE_WRITE,
                )
            };
        }
    }

    /// Sets a segment's length and makes it durable.
    pub fn finish_segment(&self, file: &File, number: u32, len: u64) -> Result<(), Error> {
        let path = self.segment(number);
        self.before(Op::Sync)
            .and_then(|()| file.set_len(len))
            .and_then(|()| {
                if self.durable {
                    file.sync_all()
                } else {
                    Ok(())
                }
            })
            .map_err(|error| Error::io(&path, "making durable", error))
    }

    /// Gives the space of a range back; it reads as zeros afterwards.
    pub fn punch(&self, file: &File, number: u32, offset: u64, len: u64) -> Result<(), Error> {
        let path = self.segment(number);
        self.before(Op::Punch)
            .map_err(|error| Error::io(&path, "giving space back", error))?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes a descriptor, which `file` keeps open, and numbers.
        if unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                mode,
                offset as libc::off_t,
                len as libc::off_t,
            )
        } == 0
        {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
            return Err(Error::io(&path, "giving space back", error));
        }
        // A file system without holes: the promise is zeros, the space stays.
        let zeros = vec![0; 1 << 16];
        let mut at = offset;
        while at < offset + len {
            let step = (offset + len - at).min(zeros.len() as u64);
            file.write_all_at(&zeros[..step as usize], at)
                .map_err(|error| Error::io(&path, "giving space back", error))?;
            at += step;
        }
        Ok(())
    }

    /// Removes a file of the directory; one that is gone already is no error.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        match self
            .before(Op::Remove)
            .and_then(|()| fs::remove_file(&path))
        {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(&path, "removing", error))
            }
            _ => Ok(()),
        }
    }

    /// Replaces the manifest: whoever reads it sees the old one or the new one, also after a crash.
    pub fn replace_manifest(&self, bytes: &[u8]) -> Result<(), Error> {
        let (new, old) = (self.path.join(NEW_MANIFEST), self.path.join(MANIFEST));
        self.before(Op::Create)
            .and_then(|()| File::create(&new))
            .and_then(|file| {
                self.before(Op::Write)?;
                file.write_all_at(bytes, 0)?;
                self.before(Op::Sync)?;
                if self.durable {
                    file.sync_all()
                } else {
                    Ok(())
                }
            })
            .map_err(|error| Error::io(&new, "writing", error))?;
        // The segment's name has to be durable before the manifest that speaks of it.
        self.sync_folder()?;
        self.before(Op::Rename)
            .and_then(|()| fs::rename(&new, &old))
            .map_err(|error| Error::io(&old, "replacing", error))?;
        self.sync_folder()
    }

    /// True if this is the manifest on disk.
    pub fn holds(&self, manifest: &[u8]) -> bool {
        matches!(read_manifest(&self.path), Ok(Some(bytes)) if bytes == manifest)
    }

    /// True unless it is certain that the manifest on disk does not name a segment.
    pub fn names(&self, segment: u32) -> bool {
        match read_manifest(&self.path) {
            Ok(None) => false,
            Ok(Some(bytes)) => crate::manifest::Manifest::from_bytes(&self.path, &bytes)
                .map_or(true, |manifest| manifest.names(segment)),
            Err(_) => true,
        }
    }

    fn sync_folder(&self) -> Result<(), Error> {
        self.before(Op::Sync)
            .and_then(|()| {
                if self.durable {
                    File::open(&self.path)?.sync_all()
                } else {
                    Ok(())
                }
            })
            .map_err(|error| Error::io(&self.path, "making durable", error))
    }

    /// Numbers of the segments that are there.
    pub fn segments(&self) -> Result<Vec<u32>, Error> {
        let failed = |error| Error::io(&self.path, "listing", error);
        let mut numbers = Vec::new();
        for item in fs::read_dir(&self.path).map_err(failed)? {
            if let Some(number) = item
                .map_err(failed)?
                .file_name()
                .to_str()
                .and_then(segment_number)
            {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Removes working sets, which restores leave beside their points, unless their step is kept. They are
    /// advice: one that cannot be removed harms nobody.
    pub fn remove_working_sets(&self, kept: impl Fn(u64) -> bool) {
        let Ok(items) = fs::read_dir(&self.path) else {
            return;
        };
        for item in items.flatten() {
            let name = item.file_name();
            let step = name
                .to_str()
                .and_then(|name| name.strip_prefix("working-set-"))
                .and_then(|rest| rest.get(..20))
                .and_then(|digits| digits.parse().ok());
            if step.is_some_and(|step| !kept(step)) {
                let _ = fs::remove_file(item.path());
            }
        }
    }

    /// Removes what a killed save left: segments that no point names, and a manifest that was not finished.
    pub fn remove_leftovers(&self, named: impl Fn(u32) -> bool) -> Result<(), Error> {
        for number in self.segments()? {
            if !named(number) {
                self.remove(&segment_name(number))?;
            }
        }
        self.remove(NEW_MANIFEST)
    }
}

/// Makes a directory, and those above it. If points in it are to be durable, so are their names.
fn make(path: &Path, durable: bool) -> io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|each| !each.exists()).collect();
    fs::create_dir_all(path)?;
    if durable {
        for parent in missing.iter().filter_map(|each| each.parent()) {
            File::open(parent)?.sync_all()?;
        }
    }
    Ok(())
}

/// The bytes of the manifest of a directory; `None` if it has none.
pub fn read_manifest(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let at = path.join(MANIFEST);
    match fs::read(&at) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(&at, "reading", error)),
    }
}
