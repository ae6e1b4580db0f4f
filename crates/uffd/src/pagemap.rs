//! Page table entries as /proc/PID/pagemap shows them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use crate::abi::*;

/// The pagemap file of one process: entries by read, [`scan`](Pagemap::scan) by ioctl.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    page: usize,
}

/// One page table entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Entry(pub u64);

impl Entry {
    /// Mapped and in memory.
    pub fn present(self) -> bool {
        self.0 & PM_PRESENT != 0
    }

    /// A swap entry, or a marker of userfaultfd.
    pub fn swapped(self) -> bool {
        self.0 & PM_SWAP != 0
    }

    /// Write-protected by userfaultfd, present or not.
    pub fn write_protected(self) -> bool {
        self.0 & PM_UFFD_WP != 0
    }

    /// A page of a file, or shared anonymous.
    pub fn file(self) -> bool {
        self.0 & PM_FILE != 0
    }

    /// Mapped exactly once.
    pub fn exclusive(self) -> bool {
        self.0 & PM_MMAP_EXCLUSIVE != 0
    }

    /// A guard page.
    pub fn guard(self) -> bool {
        self.0 & PM_GUARD_REGION != 0
    }
}

impl Pagemap {
    /// Of the calling process, as it is now: after fork() the child needs one of its own.
    pub fn own() -> io::Result<Pagemap> {
        Pagemap::open("/proc/self/pagemap")
    }

    /// Of another process.
    pub fn of(pid: u32) -> io::Result<Pagemap> {
        Pagemap::open(&format!("/proc/{pid}/pagemap"))
    }

    fn open(path: &str) -> io::Result<Pagemap> {
        // SAFETY: sysconf takes one integer.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        Ok(Pagemap {
            file: File::open(path)?,
            page,
        })
    }

    /// The base page size in bytes.
    pub fn page(&self) -> usize {
        self.page
    }

    /// Reads the entries of the pages from `start` (an address) on into `entries`, one for each page of
    /// the base size. The number read is smaller at the end of the address space.
    pub fn read(&self, start: usize, entries: &mut [Entry]) -> io::Result<usize> {
        let bytes = std::mem::size_of_val(entries);
        // SAFETY: `Entry` is a transparent u64: any bytes are valid, and the slice covers them exactly.
        let buffer =
            unsafe { std::slice::from_raw_parts_mut(entries.as_mut_ptr().cast::<u8>(), bytes) };
        let mut done = 0;
        while done < bytes {
            let at = (start / self.page * size_of::<Entry>() + done) as u64;
            match self.file.read_at(&mut buffer[done..], at)? {
                0 => break,
                read => done += read,
            }
        }
        Ok(done / size_of::<Entry>())
    }

    /// The entry of the page that holds `address`.
    pub fn entry(&self, address: usize) -> io::Result<Entry> {
        let mut one = [Entry::default()];
        match self.read(address, &mut one)? {
            1 => Ok(one[0]),
            _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        }
    }
}

impl AsRawFd for Pagemap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
