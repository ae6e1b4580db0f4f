//! A local file or block device as a store.
//!
//! * Length: any, also no multiple of a page. What lies past the length at open reads as zeros, and is
//!   never written. Bytes that were there at open and are not any more (somebody truncated the file) are an
//!   error, never zeros; neither is a truncated file made longer again by a write.
//! * Page cache: what is there is used ([`Store::read_now`]); what is not is read past it where that is
//!   faster, and leaves nothing behind in it otherwise: no byte stands twice in memory for long. What
//!   leaves memory goes through it and is at hand there as long as the kernel has no better use for the room.
//!   The kernel's own read-ahead is off.
//! * Durable: [`Store::sync`] is fdatasync(2).
//!
//! Direct and buffered I/O meet on one file only through this type. The kernel writes back and drops cached
//! pages of a range before and after direct writes, and writes them back before direct reads, so the two agree.
//!
//! Unsafe: fallocate(2), futimens(3) for whoever may write, and sysconf(3), which std does not have.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Store;
use crate::direct::{self, Direct};
use crate::lock::{self, FileLock, Locking};
use crate::pagecache::{self, PageCache};
use crate::writeback::WriteBack;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileMode {
    /// The file must exist; it is never written.
    Read,
    /// The file must exist; it is written.
    ReadWrite,
    /// The file is created if it does not exist, and written.
    Create,
    /// The file must not exist; it is created and written.
    CreateNew,
    /// The file is created, or emptied once its lock is held; it is written.
    Truncate,
}

/// What [`FileStore::open`] is asked for.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// How the file is opened.
    pub mode: FileMode,
    /// A file that is written is made at least this long, in bytes, sparse.
    pub min_len: u64,
    /// Which locks are taken.
    pub locking: Locking,
    /// False keeps away from direct I/O.
    pub direct: bool,
}

impl FileOptions {
    /// Options for a mode: no minimum length, writers locked, direct I/O where it is faster.
    pub fn new(mode: FileMode) -> Self {
        Self {
            mode,
            min_len: 0,
            locking: Locking::Writers,
            direct: true,
        }
    }
}

/// Why a file was not opened.
#[derive(Debug)]
pub enum OpenError {
    /// Somebody else has the file, in a way that excludes this one.
    InUse {
        /// The file.
        path: PathBuf,
        /// The process that holds the lock, where the kernel says.
        holder: Option<u32>,
    },
    /// It is neither a regular file nor a block device.
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A folder takes no scratch file.
    Scratch {
        /// The folder.
        folder: PathBuf,
        /// Bytes that the file was to have.
        len: u64,
        /// What the kernel said.
        error: io::Error,
    },
    /// A system call failed.
    Io {
        /// The file.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// Its error.
        error: io::Error,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse { path, holder } => {
                write!(f, "{} is in use", path.display())?;
                match holder {
                    Some(pid) if *pid == std::process::id() => write!(f, " in this process")?,
                    Some(pid) => write!(f, " in process {pid}")?,
                    None => write!(f, " elsewhere")?,
                }
                f.write_str(
                    ": two writers would lose each other's bytes. Close the other one, open this one \
                     read-only, or pass locking=False if you see to it that they never write the same pages",
                )
            }
            Self::Kind { path } => {
                write!(
                    f,
                    "{} is neither a regular file nor a block device",
                    path.display()
                )
            }
            Self::Scratch { folder, len, error } => write!(
                f,
                "{} takes no scratch file of {len} bytes: {error}",
                folder.display()
            ),
            Self::Io {
                path,
                call: "flock",
                error,
            } => write!(
                f,
                "{} cannot be locked against other writers ({error}): this file system has no flock locks; \
                 pass locking=False if you see to it that nobody else writes the file",
                path.display()
            ),
            Self::Io { path, call, error } => {
                write!(f, "{call} of {} failed: {error}", path.display())
            }
        }
    }
}

impl std::error::Error for OpenError {}

/// A local file or block device.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
    file: Arc<File>,
    len: u64,
    writable: bool,
    in_memory: bool,
    /// It is a file of a tmpfs.
    tmpfs: bool,
    /// Bytes of it were changed through a mapping, of which nobody has told the file's time yet.
    changed: AtomicBool,
    page: u64,
    cache: PageCache,
    direct: Option<Direct>,
    writeback: WriteBack,
    lock: Mutex<Option<FileLock>>,
}

impl FileStore {
    /// Opens, locks and if asked creates, empties or lengthens a file.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self, OpenError> {
        let path = path.as_ref().to_path_buf();
        let failed = |call: &'static str| {
            let path = path.clone();
            move |error: io::Error| OpenError::Io { path, call, error }
        };
        let writable = options.mode != FileMode::Read;
        let file = OpenOptions::new()
            .read(true)
            .write(writable)
            .create(matches!(
                options.mode,
                FileMode::Create | FileMode::Truncate
            ))
            .create_new(options.mode == FileMode::CreateNew)
            // A named pipe would be waited for, before it can be refused.
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(failed("open"))?;
        let file = Arc::new(file);
        let kind = file.metadata().map_err(failed("stat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path });
        }
        let lock = FileLock::take(&file, writable, options.locking).map_err(|error| {
            if error.kind() == io::ErrorKind::WouldBlock {
                OpenError::InUse {
                    path: path.clone(),
                    holder: lock::holder(&file),
                }
            } else {
                failed("flock")(error)
            }
        })?;
        if kind.is_file() && writable {
            let lengthen = || -> Result<(), OpenError> {
                if file.metadata().map_err(failed("stat"))?.len() < options.min_len {
                    file.set_len(options.min_len)
                        .map_err(failed("lengthening"))?;
                }
                Ok(())
            };
            // Before anything is lost: a length that the file system does not take must not empty the file.
            lengthen()?;
            if options.mode == FileMode::Truncate {
                file.set_len(0).map_err(failed("emptying"))?;
                lengthen()?;
            }
        }
        // A block device has no length in its metadata.
        let len = (&*file).seek(SeekFrom::End(0)).map_err(failed("seek"))?;
        pagecache::no_read_ahead(&file);
        Ok(Self {
            len,
            writable,
            in_memory: direct::in_memory(&file),
            tmpfs: direct::is_tmpfs(&file),
            changed: AtomicBool::new(false),
            page: page_size(),
            cache: PageCache::default(),
            // A file that no call can read so much of needs no second descriptor.
            direct: (options.direct && len >= direct::READ_FROM as u64)
                .then(|| Direct::open(&file, writable))
                .flatten(),
            writeback: WriteBack::default(),
            lock: Mutex::new(lock),
            file,
            path,
        })
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the lock up before the store is dropped: its last user has written its last byte.
    pub fn unlock(&self) {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How many of `len` bytes at `offset` were in the file when it was opened.
    fn existing(&self, offset: u64, len: usize) -> usize {
        usize::try_from(self.len.saturating_sub(offset)).map_or(len, |rest| rest.min(len))
    }

    /// Fills `buf`, past the page cache where that is at least `direct_from` bytes. False: the file has become
    /// shorter than it was. Allocates nothing.
    fn read_all(&self, offset: u64, buf: &mut [u8], direct_from: usize) -> io::Result<bool> {
        let len = self.existing(offset, buf.len());
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            // The whole buffer, not only what exists: a direct read may run over the end of the file.
            let direct = self
                .direct
                .as_ref()
                .and_then(|direct| direct.read(at, &mut buf[done..], direct_from));
            let n = match direct {
                Some(result) => result?,
                None if self.in_memory => retry(|| self.file.read_at(&mut buf[done..len], at))?,
                None => self
                    .cache
                    .read_through(&self.file, at, &mut buf[done..len])?,
            };
            if n == 0 {
                return Ok(false);
            }
            done += n;
        }
        buf[len..].fill(0);
        Ok(true)
    }

    /// Writes all of `data` by calls of `write`, which may do less than they are asked to.
    fn write_checked(
        &self,
        offset: u64,
        data: &[u8],
        mut write: impl FnMut(u64, &[u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        if !self.writable {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        if offset.saturating_add(data.len() as u64) > self.len {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        // Beyond the end of a truncated file a write would leave a hole, and the hole would read as zeros.
        if self
            .file
            .metadata()
            .is_ok_and(|meta| meta.is_file() && meta.len() < self.len)
        {
            return Err(self.truncated());
        }
        let mut done = 0;
        while done < data.len() {
            match write(offset + done as u64, &data[done..])? {
                0 => return Err(io::Error::from_raw_os_error(libc::EIO)),
                n => done += n,
            }
        }
        Ok(())
    }

    /// The error for a file that has become shorter than it was at open.
    fn truncated(&self) -> io::Error {
        let now = self.file.metadata().map_or(0, |meta| meta.len());
        io::Error::other(Truncated {
            path: self.path.clone(),
            was: self.len,
            now,
        })
    }
}

/// A file became shorter while it was open.
#[derive(Debug)]
struct Truncated {
    path: PathBuf,
    was: u64,
    now: u64,
}

impl fmt::Display for Truncated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} was truncated while it was open: it had {} bytes and now has {}",
            self.path.display(),
            self.was,
            self.now
        )
    }
}

impl std::error::Error for Truncated {}

impl Store for FileStore {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.read_all(offset, buf, direct::READ_FROM)? {
            return Ok(());
        }
        Err(self.truncated())
    }

    fn read_bare(&self, offset: u64, buf: &mut [u8]) -> bool {
        // What is in the page cache, or on its way there, is read from there.
        let len = self.existing(offset, buf.len()) as u64;
        let absent = !self.in_memory && self.cache.pages(&self.file, offset, len) == Some(0);
        let direct_from = if absent {
            direct::ABSENT_FROM
        } else {
            direct::READ_FROM
        };
        // The errors of system calls are plain numbers.
        self.read_all(offset, buf, direct_from).unwrap_or(false)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let len = self.existing(offset, buf.len());
        if self.in_memory {
            return self.read(offset, buf).map(|()| true);
        }
        if len > 0 {
            if !self.cache.holds(&self.file, offset, len as u64, self.page) {
                return Ok(false);
            }
            match pagecache::read_nowait(&self.file, offset, &mut buf[..len]) {
                Ok(n) if n == len => {}
                // Part of it went out of the cache since, or the file is shorter: read() finds out which.
                _ => return Ok(false),
            }
        }
        buf[len..].fill(0);
        Ok(true)
    }

    fn direct(&self, offset: u64, len: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let direct = self.direct.as_ref()?;
        let there = self.existing(offset, len) == len && !self.in_memory;
        (there && self.cache.pages(&self.file, offset, len as u64) == Some(0))
            .then(|| direct.descriptor(offset, len))
            .flatten()
            .map(|file| (file, offset))
    }

    fn in_memory(&self, offset: u64, len: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let there = self.tmpfs && self.existing(offset, len) == len;
        let whole = || {
            self.file
                .metadata()
                .is_ok_and(|meta| meta.len() >= self.len)
        };
        (there && whole()).then(|| (self.file.as_fd(), offset))
    }

    /// A write through a mapping does not change the file's time, but whoever makes backups looks at that.
    fn was_written(&self) {
        if !self.changed.swap(true, Ordering::Relaxed) {
            touch(&self.file);
        }
    }

    fn will_read(&self, offset: u64, len: u64) -> bool {
        let len = self.existing(offset, usize::try_from(len).unwrap_or(usize::MAX));
        if self.in_memory || len == 0 {
            return false;
        }
        // What stands there already stays: it came by a write, or is somebody else's.
        let held = self.cache.pages(&self.file, offset, len as u64);
        if held != Some(0) {
            return false;
        }
        pagecache::fetch(&self.file, offset, len as u64);
        true
    }

    fn was_read(&self, offset: u64, len: u64) {
        pagecache::forget(&self.file, offset, len);
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_checked(offset, data, |at, data| {
            let direct = self
                .direct
                .as_ref()
                .and_then(|direct| direct.write(at, data));
            if let Some(result) = direct {
                return result;
            }
            let n = retry(|| self.file.write_at(data, at))?;
            if !self.in_memory {
                self.writeback.wrote(&self.file, at, n as u64);
            }
            Ok(n)
        })
    }

    /// Through the page cache, which writes in its own time, once where the same bytes leave several times,
    /// and has them at hand as long as the kernel has no better use for the memory.
    fn write_leaving(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_checked(offset, data, |at, data| {
            retry(|| self.file.write_at(data, at))
        })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = len.min(self.len.saturating_sub(offset));
        if len == 0 {
            return Ok(());
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let result = retry(|| {
            // SAFETY: takes a descriptor, which `file` keeps open, and numbers.
            match unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    mode,
                    offset as libc::off_t,
                    len as libc::off_t,
                )
            } {
                0 => Ok(0),
                _ => Err(io::Error::last_os_error()),
            }
        });
        match result {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                // A file system without holes: the promise is zeros, the space stays.
                let zeros = vec![0; usize::try_from(len.min(1 << 20)).unwrap_or(1 << 20)];
                let mut at = offset;
                while at < offset + len {
                    let n = (offset + len - at).min(zeros.len() as u64);
                    self.write(at, &zeros[..n as usize])?;
                    at += n;
                }
                Ok(())
            }
            result => result.map(|_| ()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        if self.changed.swap(false, Ordering::Relaxed) {
            touch(&self.file);
        }
        self.writeback.sync(&self.file)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

impl AsFd for FileStore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Says that a file was changed now. To both of its times: that is allowed to whoever may write it.
fn touch(file: &File) {
    // SAFETY: takes a descriptor that `file` keeps open. What is written is in the file whatever the answer.
    let _ = unsafe { libc::futimens(file.as_raw_fd(), std::ptr::null()) };
}

/// Runs a call again for as long as a signal interrupts it.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn page_size() -> u64 {
    // SAFETY: sysconf takes a number; a page size exists on every Linux.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}
