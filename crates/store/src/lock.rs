//! Who may write a file: flock locks, so that two writers do not lose each other's bytes.
//!
//! A region writes whole pages back. Two regions that may both write one file would overwrite each other's
//! bytes inside a page with what they read earlier, so a second writer is refused, in one process and
//! between processes. A flock belongs to the open file description: two opens in one process exclude each
//! other too, and, other than POSIX record locks, it does not vanish when some other descriptor of the same
//! file is closed.
//!
//! A reader may join a live writer: it cannot lose anybody's bytes. It sees each block as the file had it
//! when the block was filled. [`Locking::Strict`] makes a reader take a shared lock, so that it excludes
//! writers and is refused while there is one.
//!
//! Unsafe: calls of flock(2), which std offers only from a newer Rust than this crate needs.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// Which locks an open takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Locking {
    /// A writer excludes other writers; a reader takes no lock.
    #[default]
    Writers,
    /// As `Writers`, and a reader excludes writers.
    Strict,
    /// No lock is taken or respected.
    Off,
}

/// A lock that is held; given up by drop, in the process that took it.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: Arc<File>,
    // A forked child shares the open file description: were it to unlock, the parent would lose its lock.
    owner: u32,
}

impl FileLock {
    /// Takes the lock that `locking` asks for; `Ok(None)` if it asks for none, an error of kind
    /// `WouldBlock` if somebody else holds a lock that excludes it.
    pub(crate) fn take(
        file: &Arc<File>,
        write: bool,
        locking: Locking,
    ) -> io::Result<Option<Self>> {
        let operation = match (locking, write) {
            (Locking::Off, _) | (Locking::Writers, false) => return Ok(None),
            (Locking::Strict, false) => libc::LOCK_SH,
            (_, true) => libc::LOCK_EX,
        };
        loop {
            // SAFETY: flock takes a descriptor, which `file` keeps open, and no pointer.
            if unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } == 0 {
                return Ok(Some(Self {
                    file: file.clone(),
                    owner: std::process::id(),
                }));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if self.owner == std::process::id() {
            // Said aloud, and not left to close: a forked child's copy of the descriptor would keep the lock.
            // SAFETY: as above.
            unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
        }
    }
}

/// The process that holds a flock on `file`, if /proc/locks says so.
pub(crate) fn holder(file: &File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let inode = format!(
        "{:02x}:{:02x}:{}",
        libc::major(meta.dev()),
        libc::minor(meta.dev()),
        meta.ino()
    );
    let table = fs::read_to_string("/proc/locks").ok()?;
    table.lines().find_map(|line| {
        // "3: FLOCK  ADVISORY  WRITE 4711 fe:00:131079 0 EOF"
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&inode.as_str()))
            .then(|| fields[4].parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_opens(name: &str) -> (Arc<File>, Arc<File>) {
        let path =
            std::env::temp_dir().join(format!("userfault-lock-{}-{name}", std::process::id()));
        fs::write(&path, b"x").unwrap();
        let open = || {
            fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap()
        };
        let pair = (Arc::new(open()), Arc::new(open()));
        fs::remove_file(&path).unwrap();
        pair
    }

    fn refused(file: &Arc<File>, write: bool, locking: Locking) -> bool {
        match FileLock::take(file, write, locking) {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                true
            }
        }
    }

    #[test]
    fn a_second_writer_is_refused_until_the_first_is_gone() {
        let (a, b) = two_opens("writers");
        let first = FileLock::take(&a, true, Locking::Writers).unwrap();
        assert!(refused(&b, true, Locking::Writers));
        assert_eq!(holder(&b), Some(std::process::id()));
        assert!(!refused(&b, true, Locking::Off));
        drop(first);
        assert!(!refused(&b, true, Locking::Writers));
    }

    #[test]
    fn a_reader_may_join_a_writer_unless_it_is_strict() {
        let (a, b) = two_opens("readers");
        let writer = FileLock::take(&a, true, Locking::Writers).unwrap();
        assert!(!refused(&b, false, Locking::Writers));
        assert!(refused(&b, false, Locking::Strict));
        drop(writer);
        let _reader = FileLock::take(&b, false, Locking::Strict).unwrap();
        assert!(refused(&a, true, Locking::Writers));
    }

    #[test]
    fn closing_another_descriptor_of_the_file_keeps_the_lock() {
        let (a, b) = two_opens("close");
        let _lock = FileLock::take(&a, true, Locking::Writers).unwrap();
        drop(a.try_clone().unwrap());
        drop(b.try_clone().unwrap());
        drop(a);
        assert!(refused(&b, true, Locking::Writers));
    }
}
