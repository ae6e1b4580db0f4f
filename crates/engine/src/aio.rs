//! Native asynchronous reads of Linux: io_submit(2) and io_getevents(2), no more of them than a flight needs.
//!
//! Why not io_uring: measured beside it on two processors, with sixteen threads that touch a cold file, it is the
//! slower one. Its completions are run by the thread that submitted them, so that one thread asks for reads and
//! puts them in place; here they are there for whoever asks, and one thread asks while another one puts in place.
//! Containers forbid io_uring by default, too; these calls are allowed.
//!
//! Unsafe: system calls with plain structs; a read writes to memory that its caller must leave alone until the read
//! has arrived.

use std::io;
use std::os::fd::RawFd;

/// IOCB_CMD_PREAD.
const PREAD: u16 = 0;

/// The kernel's struct iocb.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Iocb {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    flags: i32,
    #[cfg(target_endian = "big")]
    key: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    eventfd: u32,
}

/// A read that has arrived: the kernel's struct io_event.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Arrival {
    /// What was given with the order.
    pub(crate) data: u64,
    order: u64,
    /// Bytes, or an error number below 0.
    pub(crate) result: i64,
    more: i64,
}

/// An order to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order {
    /// Comes back with the arrival.
    pub(crate) data: u64,
    pub(crate) fd: RawFd,
    pub(crate) offset: u64,
    /// Address and length of the buffer.
    pub(crate) into: (usize, usize),
}

/// Orders that are submitted at once.
pub(crate) const BATCH: usize = 16;

/// A context for reads under way. It lives as long as the process.
#[derive(Debug)]
pub(crate) struct Aio {
    context: u64,
}

impl Aio {
    /// A context with room for `reads` at once.
    pub(crate) fn new(reads: usize) -> io::Result<Aio> {
        let mut context = 0u64;
        // SAFETY: a new context is written to a local.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, reads, &raw mut context) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Aio { context })
    }

    /// Gives up to [`BATCH`] orders to the kernel; how many it has taken, from the first on. An order that would have to
    /// wait before it is under way is not waited for: it arrives at once, as EAGAIN.
    ///
    /// # Safety
    /// Descriptors stay open, and buffers are left alone, until the orders that were taken have arrived.
    pub(crate) unsafe fn submit(&self, orders: &[Order]) -> usize {
        let mut blocks = [Iocb::default(); BATCH];
        let mut pointers = [std::ptr::null::<Iocb>(); BATCH];
        let count = orders.len().min(BATCH);
        for (index, order) in orders[..count].iter().enumerate() {
            blocks[index] = Iocb {
                data: order.data,
                opcode: PREAD,
                flags: libc::RWF_NOWAIT,
                fd: order.fd as u32,
                buffer: order.into.0 as u64,
                len: order.into.1 as u64,
                offset: order.offset as i64,
                ..Iocb::default()
            };
            pointers[index] = &raw const blocks[index];
        }
        // SAFETY: the blocks are only read, during the call; the caller answers for what they name.
        let taken = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                count,
                pointers.as_mut_ptr(),
            )
        };
        usize::try_from(taken).unwrap_or(0)
    }

    /// Sleeps until some read has arrived; how many of `into` are filled in.
    pub(crate) fn wait(&self, into: &mut [Arrival]) -> usize {
        // SAFETY: room for as many arrivals as the kernel is told.
        let got = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1usize,
                into.len(),
                into.as_mut_ptr(),
                std::ptr::null::<libc::timespec>(),
            )
        };
        usize::try_from(got).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_is_submitted_arrives_with_its_bytes_and_its_name() {
        let path = std::env::temp_dir().join(format!("userfault-aio-{}", std::process::id()));
        let mut file = std::fs::File::create_new(&path).expect("a new file");
        file.write_all(&[7; 8192]).unwrap();
        file.sync_all().unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let _ = std::fs::remove_file(&path);
        let mut bytes = [[0u8; 4096]; 2];
        let aio = Aio::new(8).expect("native asynchronous reads");
        let orders = [0, 1].map(|index| Order {
            data: 40 + index as u64,
            fd: file.as_raw_fd(),
            offset: 4096 * index as u64,
            into: (bytes[index].as_mut_ptr() as usize, 4096),
        });
        // SAFETY: the buffers are looked at when both orders have arrived.
        let taken = unsafe { aio.submit(&orders) };
        let mut arrived = Vec::new();
        while arrived.len() < taken {
            let mut some = [Arrival::default(); 4];
            let count = aio.wait(&mut some);
            arrived.extend(
                some[..count]
                    .iter()
                    .map(|arrival| (arrival.data, arrival.result)),
            );
        }
        arrived.sort_unstable();
        // A file system without reads that do not wait takes none, and says so.
        if taken == 2 && arrived.iter().all(|(_, result)| *result == 4096) {
            assert_eq!(arrived, [(40, 4096), (41, 4096)]);
            assert!(bytes.iter().flatten().all(|byte| *byte == 7));
        } else {
            assert!(taken == 0 || arrived.iter().any(|(_, result)| *result < 0));
        }
    }
}
