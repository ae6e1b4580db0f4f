//! A region's memory: the user's mapping and the view.
//!
//! Unsafe: this file maps, unmaps and dereferences raw memory. Two mappings show the same pages. The
//! user's mapping is registered with the userfaultfd, and the engine never touches it. The view is not
//! registered, and the engine reads and writes through it without faulting. Private memory has no view:
//! it is filled by copy alone.
//!
//! What keeps this sound: a slice into the view is made only for a block that its caller owns (see
//! `block.rs`) and that is not mapped for the user; bytes of a mapped block are moved by raw copies,
//! since the user's threads may change them at any moment.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr;

use crate::defects::{Defect, put_back};
use crate::error::Error;
use crate::fill::Filling;
use crate::huge_tmpfs;

/// 2 MiB.
pub const HUGE: usize = 2 << 20;

/// What the memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory of small pages: read-only regions of small blocks.
    Private,
    /// A memfd of small pages.
    Small,
    /// hugetlb pages of 2 MiB.
    Hugetlb,
    /// 2 MiB pages of a private tmpfs.
    HugeTmpfs,
    /// Mapped in another process: here only its measure is known.
    Elsewhere,
}

impl Kind {
    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Private => "4KiB private",
            Kind::Small => "4KiB",
            Kind::Hugetlb => "2MiB hugetlb",
            Kind::HugeTmpfs => "2MiB tmpfs",
            Kind::Elsewhere => "another process's",
        }
    }
}

/// The kernel's small page, bytes.
pub fn small_page() -> usize {
    // SAFETY: sysconf has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// The two mappings of a region.
#[derive(Debug)]
pub struct Memory {
    kind: Kind,
    main: usize,
    view: usize,
    len: usize,
    page: usize,
    /// What the user may do with the mapping.
    prot: i32,
    file: Option<File>,
}

fn map(at: usize, len: usize, prot: i32, flags: i32, fd: RawFd) -> Result<usize, Error> {
    map_part(at, len, prot, flags, fd, 0).map_err(|_| {
        Error::last_os(
            "mmap",
            format!(
                "{len} bytes of address space were asked for; see /proc/sys/vm/max_map_count and ulimit -v"
            ),
        )
    })
}

/// As [`map`], from an offset of the file on; the reason is the system's alone.
fn map_part(
    at: usize,
    len: usize,
    prot: i32,
    flags: i32,
    fd: RawFd,
    offset: u64,
) -> io::Result<usize> {
    // SAFETY: either the kernel chooses the address, or `at` lies in a range that this file reserved
    // or mapped before, so MAP_FIXED replaces nothing that belongs to somebody else.
    let address = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            len,
            prot,
            flags,
            fd,
            offset as libc::off_t,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(address as usize)
}

/// Gives back what was mapped here.
pub(crate) fn unmap(at: usize, len: usize) {
    // SAFETY: the range was mapped by this file and its owner gives it up.
    unsafe { libc::munmap(at as *mut libc::c_void, len) };
}

fn advise_raw(at: usize, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the range lies in a mapping that this file made; none of the advices used here touches memory
    // outside it.
    if unsafe { libc::madvise(at as *mut libc::c_void, len, advice) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a fresh mapping without access accessible.
///
/// A program that called mlockall(MCL_FUTURE) has the kernel fill every new mapping with zeros at once, before
/// it can be registered; those would be taken for the store's bytes. Memory without access is not filled, and
/// what is not locked any more is not filled later.
fn open_up(at: usize, len: usize, prot: i32) -> Result<(), Error> {
    // SAFETY: the range was just mapped by this file; nobody else knows of it.
    unsafe {
        libc::munlock(at as *const libc::c_void, len);
        if libc::mprotect(at as *mut libc::c_void, len, prot) < 0 {
            return Err(Error::last_os("mprotect", ""));
        }
    }
    Ok(())
}

/// Reserves address space whose start is a multiple of 2 MiB, so that page tables can be given back.
fn reserve(len: usize) -> Result<usize, Error> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let raw = map(0, len + HUGE, libc::PROT_NONE, flags, -1)?;
    let start = raw.next_multiple_of(HUGE);
    if start > raw {
        unmap(raw, start - raw);
    }
    let tail = raw + len + HUGE - (start + len);
    if tail > 0 {
        unmap(start + len, tail);
    }
    Ok(start)
}

/// Maps a part of a file for the kernel to copy from, and to if it is `writable`. Nothing of it is brought in, and a child
/// does not get it. [`unmap`] ends it.
pub(crate) fn map_file(
    fd: BorrowedFd<'_>,
    offset: u64,
    len: usize,
    writable: bool,
) -> Option<usize> {
    let start = reserve(len).ok()?;
    let prot = if writable {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_READ
    };
    let flags = libc::MAP_FIXED | libc::MAP_NORESERVE | libc::MAP_SHARED;
    let mapped = map_part(start, len, libc::PROT_NONE, flags, fd.as_raw_fd(), offset)
        .and_then(|start| advise_raw(start, len, libc::MADV_DONTFORK))
        .is_ok_and(|()| open_up(start, len, prot).is_ok());
    if !mapped {
        unmap(start, len);
        return None;
    }
    Some(start)
}

fn memfd(flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated constant; the result is checked before it is owned.
    unsafe {
        let fd = libc::memfd_create(c"userfault".as_ptr(), libc::MFD_CLOEXEC | flags);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(File::from(OwnedFd::from_raw_fd(fd)))
        }
    }
}

/// Free hugetlb pages of 2 MiB that nobody has reserved.
pub fn hugetlb_free() -> u64 {
    let read = |name: &str| -> u64 {
        std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}

impl Memory {
    /// Maps `len` bytes (a multiple of the page) of memory of this kind.
    pub fn new(kind: Kind, len: usize, writable: bool) -> Result<Memory, Error> {
        let page = if kind == Kind::Hugetlb {
            HUGE
        } else {
            small_page()
        };
        debug_assert!(len.is_multiple_of(page));
        let prot = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let file = match kind {
            Kind::Private | Kind::Elsewhere => None,
            Kind::Small => Some(memfd(0).map_err(|_| Error::last_os("memfd_create", ""))?),
            Kind::Hugetlb => Some(memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB).map_err(|_| {
                Error::last_os(
                    "memfd_create of huge pages",
                    "reserve some: sysctl vm.nr_hugepages=N",
                )
            })?),
            Kind::HugeTmpfs => Some(huge_tmpfs::file()?),
        };
        if let Some(file) = &file {
            file.set_len(len as u64)
                .map_err(|_| Error::last_os("ftruncate of a region's memory", ""))?;
        }
        let main = reserve(len)?;
        let fixed = libc::MAP_FIXED | libc::MAP_NORESERVE;
        let mut memory = Memory {
            kind,
            main,
            view: 0,
            len,
            page,
            prot,
            file,
        };
        match &memory.file {
            None => {
                map(
                    main,
                    len,
                    libc::PROT_NONE,
                    fixed | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                )?;
                // Pages arrive one block at a time: the kernel must not make huge ones of them.
                memory.advise(main, len, libc::MADV_NOHUGEPAGE)?;
                open_up(main, len, prot)?;
            }
            Some(file) => {
                let fd = file.as_raw_fd();
                map(main, len, libc::PROT_NONE, fixed | libc::MAP_SHARED, fd)?;
                open_up(main, len, prot)?;
                let view = reserve(len)?;
                memory.view = view;
                map(view, len, libc::PROT_NONE, fixed | libc::MAP_SHARED, fd)?;
                open_up(view, len, libc::PROT_READ | libc::PROT_WRITE)?;
                memory.advise(view, len, libc::MADV_DONTFORK)?;
            }
        }
        if !put_back(Defect::ChildReadsZeros) {
            memory.advise(main, len, libc::MADV_DONTFORK)?;
        }
        Ok(memory)
    }

    /// The measure of memory that another process has mapped. Nothing of it can be reached from here.
    pub(crate) fn elsewhere(len: usize, page: usize) -> Memory {
        Memory {
            kind: Kind::Elsewhere,
            main: 0,
            view: 0,
            len,
            page,
            prot: libc::PROT_NONE,
            file: None,
        }
    }

    fn advise(&self, at: usize, len: usize, advice: i32) -> Result<(), Error> {
        advise_raw(at, len, advice).map_err(|_| Error::last_os("madvise", ""))
    }

    /// What the memory is made of.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Start of the user's mapping.
    pub fn main(&self) -> usize {
        self.main
    }

    /// Start of the view, 0 if there is none.
    pub fn view(&self) -> usize {
        self.view
    }

    /// Mapped length, bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if the memory is made of huge pages.
    pub fn huge(&self) -> bool {
        matches!(self.kind, Kind::Hugetlb | Kind::HugeTmpfs)
    }

    /// The unit in which the user's mapping is mapped, unmapped and tracked, bytes. The huge pages of a
    /// tmpfs are mapped small: their evidence is by 4 KiB, and what one part says is not said of the rest.
    pub fn page(&self) -> usize {
        self.page
    }

    /// True if there is a view.
    pub fn shared(&self) -> bool {
        self.view != 0
    }

    /// The descriptor of the memory, if it has one.
    pub fn fd(&self) -> Option<RawFd> {
        self.file.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Takes pages from the kernel before they are written, so that a full pool is an error code here
    /// and not a SIGBUS at the first store.
    pub fn claim(&self, offset: usize, len: usize) -> io::Result<()> {
        self.fallocate(0, offset, len)
    }

    /// Gives the pages of a range back to the kernel.
    pub fn punch(&self, offset: usize, len: usize) -> io::Result<()> {
        if self.file.is_none() {
            return self.zap(offset, len);
        }
        self.fallocate(
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
        )
    }

    fn fallocate(&self, mode: i32, offset: usize, len: usize) -> io::Result<()> {
        let Some(fd) = self.fd() else { return Ok(()) };
        loop {
            // SAFETY: fallocate takes numbers only.
            if unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Unmaps pages from the user's mapping, locked or not. Shared pages stay in memory.
    pub fn zap(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len);
        // SAFETY: the range lies in the user's mapping, which this value owns.
        if unsafe {
            libc::madvise(
                (self.main + offset) as *mut libc::c_void,
                len,
                libc::MADV_DONTNEED_LOCKED,
            )
        } < 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Unmaps pages from the view, if there is one. They stay in memory.
    pub fn zap_view(&self, offset: usize, len: usize) {
        assert!(offset + len <= self.len);
        if self.shared() {
            // SAFETY: the range lies in the view, which this value owns; the pages stay in the file, and
            // whoever reads or writes through the view meanwhile faults them in again.
            unsafe {
                libc::madvise(
                    (self.view + offset) as *mut libc::c_void,
                    len,
                    libc::MADV_DONTNEED,
                )
            };
        }
    }

    /// The bytes of a block through the view.
    ///
    /// # Safety
    /// The caller owns every block of the range, none of them is mapped for the user, and their pages
    /// are claimed.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn owned(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset + len <= self.len && self.shared());
        // SAFETY: in bounds of the view; the caller's ownership makes the slice the only access.
        unsafe { std::slice::from_raw_parts_mut((self.view + offset) as *mut u8, len) }
    }

    /// The bytes of the block that `owner` fills, through the view.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn owned_block(&self, _owner: &Filling, start: usize, len: usize) -> &mut [u8] {
        // SAFETY: a Filling owns its block exclusively, and the block is not mapped for the user.
        unsafe { self.owned(start, len) }
    }

    /// The bytes of a block that its owner has unmapped, through the view.
    pub(crate) fn resting_bytes(&self, start: usize, len: usize) -> &[u8] {
        // SAFETY: evictions and write-back call this for blocks they own and that are not mapped: nobody
        // else reads or writes their pages, through either mapping.
        unsafe { self.owned(start, len) }
    }

    /// True if bytes are better copied out of memory than looked at where they are: small pages are read from their
    /// file. To touch them through the view costs a fault, and when they are released an interrupt of every
    /// processor on which the program runs; a copy of 4 KiB costs less than either.
    pub(crate) fn is_copied_out(&self) -> bool {
        self.kind == Kind::Small
    }

    /// Copies bytes of blocks that the caller holds, and that are in memory, out.
    pub(crate) fn copy_held(&self, start: usize, into: &mut [u8]) {
        // SAFETY: write-back and pread call this for blocks they own in state Cleaning or Writing.
        unsafe { self.copy_out(start, into) }
    }

    /// Copies bytes into blocks that the caller holds, and that are in memory, through the view.
    pub(crate) fn write_held(&self, start: usize, from: &[u8]) {
        // SAFETY: pwrite calls this for blocks it owns in state Writing, from a buffer of its own.
        unsafe { self.copy_in(start, from) }
    }

    /// Copies bytes of pinned, resident private memory, which has no view.
    pub(crate) fn copy_private(&self, start: usize, into: &mut [u8]) {
        assert!(!self.shared() && start + into.len() <= self.len);
        // SAFETY: in bounds; the block is resident and pinned, so the touch needs no fill. Private
        // memory is read-only for everybody.
        unsafe {
            ptr::copy_nonoverlapping(
                (self.main + start) as *const u8,
                into.as_mut_ptr(),
                into.len(),
            )
        }
    }

    /// True if the view holds exactly these bytes. The caller owns the block, and its pages are in memory.
    pub(crate) fn holds(&self, start: usize, bytes: &[u8]) -> bool {
        assert!(start + bytes.len() <= self.len && self.shared());
        // SAFETY: in bounds of the view; a raw comparison, since the user's threads may still write the
        // pages: they make the answer false, or write what is there already.
        unsafe {
            libc::memcmp(
                (self.view + start) as *const libc::c_void,
                bytes.as_ptr().cast(),
                bytes.len(),
            ) == 0
        }
    }

    /// Lays a mapping of an empty file over a part of the user's mapping: a touch is SIGBUS.
    pub(crate) fn cover(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len);
        let empty = memfd(0)?;
        let flags = libc::MAP_FIXED | libc::MAP_SHARED | libc::MAP_NORESERVE;
        // At an offset of its own, so that neighbours are one entry of the process's map.
        self.replace(offset, len, self.prot, flags, empty.as_raw_fd())
    }

    /// Puts the memory back where [`Memory::cover`] took it away, without access.
    pub(crate) fn uncover(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len);
        let flags = libc::MAP_FIXED | libc::MAP_NORESERVE;
        match &self.file {
            Some(file) => {
                let flags = flags | libc::MAP_SHARED;
                self.replace(offset, len, libc::PROT_NONE, flags, file.as_raw_fd())
            }
            None => {
                let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                self.replace(offset, len, libc::PROT_NONE, flags, -1)?;
                advise_raw(self.main + offset, len, libc::MADV_NOHUGEPAGE)
            }
        }
    }

    fn replace(
        &self,
        offset: usize,
        len: usize,
        prot: i32,
        flags: i32,
        fd: RawFd,
    ) -> io::Result<()> {
        let at = map_part(self.main + offset, len, prot, flags, fd, offset as u64)?;
        advise_raw(at, len, libc::MADV_DONTFORK)
    }

    /// Lets the user touch what [`Memory::uncover`] put back.
    pub(crate) fn open_again(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len);
        open_up(self.main + offset, len, self.prot).map_err(|_| io::Error::last_os_error())
    }

    /// Makes a part of the user's mapping inaccessible for good.
    pub(crate) fn forbid(&self, offset: usize, len: usize) {
        assert!(offset + len <= self.len);
        // SAFETY: the range lies in the user's mapping, which this value owns.
        unsafe {
            libc::mprotect(
                (self.main + offset) as *mut libc::c_void,
                len,
                libc::PROT_NONE,
            )
        };
    }

    /// Copies bytes out, through the view if need be. Bytes that the user writes meanwhile come out old or new.
    ///
    /// # Safety
    /// The caller owns every block of the range, and they are in memory.
    pub unsafe fn copy_out(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= self.len && self.shared());
        if self.is_copied_out()
            && let Some(file) = &self.file
            && file.read_exact_at(into, offset as u64).is_ok()
        {
            return;
        }
        // SAFETY: in bounds, and `into` is the caller's own memory. Racing stores of the user can only
        // change bytes of the copy, which is what the caller is told.
        unsafe {
            ptr::copy_nonoverlapping(
                (self.view + offset) as *const u8,
                into.as_mut_ptr(),
                into.len(),
            )
        }
    }

    /// Copies bytes in through the view.
    ///
    /// # Safety
    /// As for [`Memory::copy_out`].
    pub unsafe fn copy_in(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= self.len && self.shared());
        // SAFETY: in bounds, and `from` is the caller's own memory, never the region's.
        unsafe {
            ptr::copy_nonoverlapping(from.as_ptr(), (self.view + offset) as *mut u8, from.len())
        }
    }

    /// Replaces the user's mapping by one that cannot be touched: a later touch is SIGSEGV.
    pub fn seal(&self) {
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // Replacing a mapping by one of the same size needs no new map entry; a failure would leave
        // memory that nobody serves, and that would read as zeros: better to stop here.
        map(self.main, self.len, libc::PROT_NONE, flags, -1)
            .expect("replacing a mapping by PROT_NONE");
    }

    /// Gives back the view and all pages. The user's mapping must be sealed.
    pub fn drop_view(&self) {
        if self.shared() {
            unmap(self.view, self.len);
        }
        if let Some(file) = &self.file {
            // The file itself lives as long as somebody holds the closed region; its pages must not.
            let _ = file.set_len(0);
        }
    }

    /// Gives back the user's address range. Nobody may hold a pointer into it.
    pub fn unmap_main(&self) {
        unmap(self.main, self.len);
    }
}
