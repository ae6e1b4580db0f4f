//! Touching a region as programs do.
//!
//! Unsafe: raw reads and writes of memory that somebody else serves, and raw system calls on it. Every
//! function checks that it stays inside of the region; the region outlives the call because it is borrowed.

use std::os::fd::RawFd;

use userfault_engine::Region;

fn place(region: &Region, at: usize, len: usize) -> *mut u8 {
    assert!(at + len <= region.len());
    region.base().wrapping_add(at)
}

pub fn read(region: &Region, at: usize) -> u8 {
    // SAFETY: in bounds.
    unsafe { place(region, at, 1).read_volatile() }
}

pub fn write(region: &Region, at: usize, byte: u8) {
    // SAFETY: in bounds.
    unsafe { place(region, at, 1).write_volatile(byte) }
}

/// The word at any place, also across two blocks.
pub fn read_word(region: &Region, at: usize) -> u64 {
    // SAFETY: in bounds; x86 and arm64 load unaligned words.
    unsafe { place(region, at, 8).cast::<u64>().read_unaligned() }
}

pub fn write_word(region: &Region, at: usize, word: u64) {
    // SAFETY: in bounds.
    unsafe { place(region, at, 8).cast::<u64>().write_unaligned(word) }
}

/// Adds to a word that no other thread touches.
pub fn add_word(region: &Region, index: usize, by: u64) {
    let place = place(region, index * 8, 8).cast::<u64>();
    // SAFETY: in bounds and aligned.
    unsafe { place.write_volatile(place.read_volatile().wrapping_add(by)) }
}

/// A plain copy between two places of two regions.
pub fn copy(to: &Region, to_at: usize, from: &Region, from_at: usize, len: usize) {
    // SAFETY: both in bounds; `copy` allows overlap.
    unsafe { std::ptr::copy(place(from, from_at, len), place(to, to_at, len), len) }
}

/// The bytes of a part of a region, read by touching them.
pub fn bytes(region: &Region, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: in bounds.
    unsafe { std::ptr::copy_nonoverlapping(place(region, at, len), bytes.as_mut_ptr(), len) };
    bytes
}

/// The part of a region as a slice, for `pwrite` from it. Nobody may write it meanwhile.
pub fn slice(region: &Region, at: usize, len: usize) -> &[u8] {
    // SAFETY: in bounds, and the caller keeps writers away.
    unsafe { std::slice::from_raw_parts(place(region, at, len), len) }
}

/// As [`slice`], for `pread` into it.
#[allow(clippy::mut_from_ref)]
pub fn slice_mut(region: &Region, at: usize, len: usize) -> &mut [u8] {
    // SAFETY: in bounds, and the caller keeps everybody else away.
    unsafe { std::slice::from_raw_parts_mut(place(region, at, len), len) }
}

/// madvise(2) on a part of a region, as the program may do it.
pub fn madvise(region: &Region, at: usize, len: usize, advice: i32) -> i32 {
    // SAFETY: in bounds; what the advices do to the memory is what the test is about.
    unsafe { libc::madvise(place(region, at, len).cast(), len, advice) }
}

/// pread(2) of a file into a region: bytes, or -errno.
pub fn pread_into(region: &Region, at: usize, len: usize, fd: RawFd, offset: usize) -> isize {
    // SAFETY: in bounds.
    let count = unsafe {
        libc::pread(
            fd,
            place(region, at, len).cast(),
            len,
            offset as libc::off_t,
        )
    };
    if count < 0 {
        -(std::io::Error::last_os_error().raw_os_error().unwrap() as isize)
    } else {
        count
    }
}

/// pwrite(2) of a part of a region into a file: bytes, or -errno.
pub fn pwrite_from(region: &Region, at: usize, len: usize, fd: RawFd, offset: usize) -> isize {
    // SAFETY: in bounds.
    let count = unsafe {
        libc::pwrite(
            fd,
            place(region, at, len).cast(),
            len,
            offset as libc::off_t,
        )
    };
    if count < 0 {
        -(std::io::Error::last_os_error().raw_os_error().unwrap() as isize)
    } else {
        count
    }
}

/// mlock(2) of a part of a region: 0 or an errno.
pub fn mlock(region: &Region, at: usize, len: usize) -> i32 {
    // SAFETY: in bounds.
    if unsafe { libc::mlock(place(region, at, len).cast(), len) } == 0 {
        0
    } else {
        std::io::Error::last_os_error().raw_os_error().unwrap()
    }
}

/// write(2) of a part of a region to a descriptor: bytes, or -errno.
pub fn write_to(region: &Region, at: usize, len: usize, fd: RawFd) -> isize {
    // SAFETY: in bounds.
    let count = unsafe { libc::write(fd, place(region, at, len).cast(), len) };
    if count < 0 {
        -(std::io::Error::last_os_error().raw_os_error().unwrap() as isize)
    } else {
        count
    }
}

fn tail(region: &Region, len: usize) -> *mut u8 {
    assert!((region.len() + len).is_multiple_of(4096));
    region.base().wrapping_add(region.len())
}

/// The bytes behind the end of a region, up to the end of its last page.
pub fn behind(region: &Region, len: usize) -> Vec<u8> {
    // SAFETY: the mapping is rounded up to a page.
    unsafe { std::slice::from_raw_parts(tail(region, len), len) }.to_vec()
}

/// Writes the bytes behind the end of a region.
pub fn fill_behind(region: &Region, len: usize, byte: u8) {
    // SAFETY: the mapping is rounded up to a page.
    unsafe { tail(region, len).write_bytes(byte, len) }
}
