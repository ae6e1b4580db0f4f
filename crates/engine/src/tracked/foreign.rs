//! Reading memory that somebody else may unmap at any moment.
//!
//! Unsafe: process_vm_readv(2) on ourselves, which answers EFAULT where a load would be SIGSEGV.

use std::io;

/// Ranges of one call, at most (UIO_MAXIOV).
const RANGES: usize = 1024;

/// Copies the ranges `(address, bytes)` into `into`, one after the other. `into` has exactly the sum of
/// their lengths. Fails with EFAULT if one of them is not mapped any more; `into` is then half filled.
pub fn read_foreign(ranges: &[(usize, usize)], into: &mut [u8]) -> io::Result<()> {
    debug_assert_eq!(
        ranges.iter().map(|range| range.1).sum::<usize>(),
        into.len()
    );
    let mut done = 0;
    for some in ranges.chunks(RANGES) {
        let len: usize = some.iter().map(|range| range.1).sum();
        let remote: Vec<libc::iovec> = some
            .iter()
            .map(|&(address, len)| libc::iovec {
                iov_base: address as *mut libc::c_void,
                iov_len: len,
            })
            .collect();
        let local = libc::iovec {
            iov_base: into[done..done + len].as_mut_ptr().cast(),
            iov_len: len,
        };
        // SAFETY: the kernel writes at most `len` bytes to `local`, which `into` lends; the remote ranges
        // are only read, and checked by the kernel.
        let read = unsafe {
            libc::process_vm_readv(
                libc::getpid(),
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        if read as usize != len {
            // It stops at the first page that is not there.
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        done += len;
    }
    Ok(())
}
