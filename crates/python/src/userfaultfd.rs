//! `_native.Userfaultfd`: the kernel interface for Python, one call for one ioctl.
//!
//! Unsafe: the ioctls change memory that the caller names by address, and the Python class passes that duty
//! on in its documentation, as `ctypes` does.
//!
//! Every call runs with the interpreter
//! detached: a COPY may sleep on its source, a WRITEPROTECT on a lock that a faulting thread holds.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use userfault_uffd::abi::{self, page_region, uffd_msg};
use userfault_uffd::{KernelFaults, OpenError, OpenOptions, Outcome, Pagemap, Scan, Uffd, Way};

type Answer = (i64, i32);

/// `copy` takes an address or an object with the buffer protocol.
enum Source {
    Address(usize),
    Buffer(PyBuffer<u8>),
}

/// One userfaultfd; the typed and documented face is `userfault.Userfaultfd`.
#[pyclass(frozen, module = "userfault._native")]
pub struct Userfaultfd {
    uffd: Mutex<Option<Arc<Uffd>>>,
}

impl Userfaultfd {
    fn of(uffd: Uffd) -> Userfaultfd {
        Userfaultfd {
            uffd: Mutex::new(Some(Arc::new(uffd))),
        }
    }

    fn open(&self) -> PyResult<Arc<Uffd>> {
        let slot = self.uffd.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
            .ok_or_else(|| PyValueError::new_err("I/O operation on a closed userfaultfd"))
    }

    /// Runs one call with the interpreter detached.
    fn call(
        &self,
        py: Python<'_>,
        ioctl: impl FnOnce(&Uffd) -> Outcome + Send,
    ) -> PyResult<Answer> {
        let uffd = self.open()?;
        let outcome = py.detach(move || ioctl(&uffd));
        Ok((outcome.done, outcome.errno))
    }
}

fn os_error(errno: i32, message: String) -> PyErr {
    PyOSError::new_err((errno, message))
}

fn io_error(error: &io::Error) -> PyErr {
    os_error(error.raw_os_error().unwrap_or(libc::EIO), error.to_string())
}

#[pymethods]
impl Userfaultfd {
    #[new]
    #[pyo3(signature = (require, prefer, kernel_faults, nonblocking, way))]
    fn new(
        py: Python<'_>,
        require: u64,
        prefer: u64,
        kernel_faults: Option<bool>,
        nonblocking: bool,
        way: Option<&str>,
    ) -> PyResult<Userfaultfd> {
        let options = OpenOptions {
            kernel_faults: match kernel_faults {
                Some(true) => KernelFaults::Required,
                Some(false) => KernelFaults::Unwanted,
                None => KernelFaults::Preferred,
            },
            nonblocking,
            way: match way {
                None => None,
                Some("syscall") => Some(Way::Syscall),
                Some("device") => Some(Way::Device),
                Some(other) => {
                    let message = format!("way must be 'syscall', 'device' or None, not {other:?}");
                    return Err(PyValueError::new_err(message));
                }
            },
            require,
            prefer,
        };
        py.detach(|| Uffd::open(&options))
            .map(Userfaultfd::of)
            .map_err(|error: OpenError| os_error(error.errno(), error.to_string()))
    }

    /// Takes a descriptor over whose handshake is done.
    #[staticmethod]
    fn from_fd(fd: RawFd, features: u64) -> PyResult<Userfaultfd> {
        // SAFETY: F_GETFD takes a number and touches no memory.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(io_error(&io::Error::last_os_error()));
        }
        // SAFETY: it is open, and the caller gives it away.
        Ok(Userfaultfd::of(Uffd::from_fd(
            unsafe { OwnedFd::from_raw_fd(fd) },
            features,
        )))
    }

    /// True after close or detach.
    #[getter]
    fn closed(&self) -> bool {
        self.uffd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
    }

    /// The features that were asked for in the handshake.
    #[getter]
    fn features(&self) -> PyResult<u64> {
        Ok(self.open()?.features().enabled)
    }

    /// The features that the kernel has; 0 if the descriptor was handed over.
    #[getter]
    fn offered(&self) -> PyResult<u64> {
        Ok(self.open()?.features().offered)
    }

    /// The mask of ioctls that the descriptor takes; 0 if it was handed over.
    #[getter]
    fn ioctls(&self) -> PyResult<u64> {
        Ok(self.open()?.features().ioctls)
    }

    /// True if system calls on missing pages wait, False if they get EFAULT.
    #[getter]
    fn kernel_faults(&self) -> PyResult<bool> {
        Ok(self.open()?.kernel_faults())
    }

    /// "syscall", "device" or "given".
    #[getter]
    fn way(&self) -> PyResult<&'static str> {
        Ok(match self.open()?.way() {
            Way::Syscall => "syscall",
            Way::Device => "device",
            Way::Given => "given",
        })
    }

    /// The descriptor.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.open()?.as_raw_fd())
    }

    /// Closes the descriptor, after the calls that other threads have under way.
    fn close(&self, py: Python<'_>) {
        let taken = self
            .uffd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // Closing wakes every sleeper and walks the page tables.
        py.detach(move || drop(taken));
    }

    /// Gives the descriptor away without closing it.
    fn detach(&self) -> PyResult<RawFd> {
        let mut slot = self.uffd.lock().unwrap_or_else(PoisonError::into_inner);
        let uffd = slot
            .take()
            .ok_or_else(|| PyValueError::new_err("I/O operation on a closed userfaultfd"))?;
        match Arc::try_unwrap(uffd) {
            Ok(uffd) => Ok(uffd.into_raw_fd()),
            Err(shared) => {
                *slot = Some(shared);
                Err(PyValueError::new_err(
                    "another thread has a call under way on this userfaultfd",
                ))
            }
        }
    }

    /// UFFDIO_REGISTER of `length` bytes at the address `start`: the mask of ioctls, and the errno.
    fn register(&self, py: Python<'_>, start: usize, length: usize, mode: u64) -> PyResult<Answer> {
        self.call(py, move |uffd| uffd.register(start, length, mode))
    }

    /// UFFDIO_UNREGISTER of `length` bytes at the address `start`: bytes done and errno.
    fn unregister(&self, py: Python<'_>, start: usize, length: usize) -> PyResult<Answer> {
        // SAFETY: the caller names the memory and answers for it, as the class documents.
        self.call(py, move |uffd| unsafe { uffd.unregister(start, length) })
    }

    /// UFFDIO_WAKE of `length` bytes at the address `start`: bytes done and errno.
    fn wake(&self, py: Python<'_>, start: usize, length: usize) -> PyResult<Answer> {
        self.call(py, move |uffd| uffd.wake(start, length))
    }

    /// UFFDIO_COPY of `length` bytes to `dst`, from an address or a buffer: bytes done and errno. `ValueError`
    /// if the buffer is shorter.
    fn copy(
        &self,
        py: Python<'_>,
        dst: usize,
        src: &Bound<'_, PyAny>,
        length: Option<usize>,
        mode: u64,
    ) -> PyResult<Answer> {
        let source = match src.extract::<usize>() {
            Ok(address) => Source::Address(address),
            Err(_) => Source::Buffer(PyBuffer::get(src)?),
        };
        let (address, length) = match (&source, length) {
            (Source::Address(_), None) => {
                return Err(PyValueError::new_err(
                    "copy from an address needs a length in bytes",
                ));
            }
            (Source::Address(address), Some(length)) => (*address, length),
            (Source::Buffer(buffer), length) => {
                let length = length.unwrap_or(buffer.len_bytes());
                if !buffer.is_c_contiguous() || length > buffer.len_bytes() {
                    let message = format!(
                        "copy of {length} bytes needs a contiguous source of at least as many, not {}",
                        buffer.len_bytes()
                    );
                    return Err(PyValueError::new_err(message));
                }
                (buffer.buf_ptr() as usize, length)
            }
        };
        // SAFETY: a buffer is held until the call is over, and is long enough; an address is the caller's
        // to answer for, and so is the destination, as the class documents.
        let answer = self.call(py, move |uffd| unsafe {
            uffd.copy(dst, address, length, mode)
        });
        drop(source);
        answer
    }

    /// UFFDIO_ZEROPAGE of `length` bytes at the address `start`: bytes done and errno.
    fn zeropage(&self, py: Python<'_>, start: usize, length: usize, mode: u64) -> PyResult<Answer> {
        // SAFETY: the caller names the memory and answers for it, as the class documents.
        self.call(py, move |uffd| unsafe {
            uffd.zeropage(start, length, mode)
        })
    }

    /// UFFDIO_WRITEPROTECT of `length` bytes at the address `start`: bytes done and errno.
    fn writeprotect(
        &self,
        py: Python<'_>,
        start: usize,
        length: usize,
        mode: u64,
    ) -> PyResult<Answer> {
        self.call(py, move |uffd| uffd.writeprotect(start, length, mode))
    }

    /// UFFDIO_CONTINUE of `length` bytes at the address `start`: bytes done and errno.
    fn continue_(
        &self,
        py: Python<'_>,
        start: usize,
        length: usize,
        mode: u64,
    ) -> PyResult<Answer> {
        // SAFETY: the caller names the memory and answers for it, as the class documents.
        self.call(py, move |uffd| unsafe {
            uffd.continue_(start, length, mode)
        })
    }

    /// UFFDIO_POISON of `length` bytes at the address `start`: bytes done and errno.
    fn poison(&self, py: Python<'_>, start: usize, length: usize, mode: u64) -> PyResult<Answer> {
        // SAFETY: the caller names the memory and answers for it, as the class documents.
        self.call(py, move |uffd| unsafe { uffd.poison(start, length, mode) })
    }

    /// UFFDIO_MOVE of `length` bytes from `src` to `dst`: bytes done and errno.
    #[pyo3(name = "move")]
    fn move_(
        &self,
        py: Python<'_>,
        dst: usize,
        src: usize,
        length: usize,
        mode: u64,
    ) -> PyResult<Answer> {
        // SAFETY: the caller names the memory and answers for it, as the class documents.
        self.call(py, move |uffd| unsafe {
            uffd.r#move(dst, src, length, mode)
        })
    }

    /// The raw bytes of at most `limit` messages that wait, 32 bytes each; none on EAGAIN.
    fn read_raw<'py>(&self, py: Python<'py>, limit: usize) -> PyResult<Bound<'py, PyBytes>> {
        let uffd = self.open()?;
        let fd = uffd.as_raw_fd();
        let size = size_of::<uffd_msg>();
        let read = py.detach(move || {
            // Big enough for any batch, and on the stack of a thread that faults into nothing.
            let mut buffer = [0u8; 64 * size_of::<uffd_msg>()];
            let wanted = limit.clamp(1, 64) * size;
            // SAFETY: at most as many bytes as the buffer has; `uffd` keeps the descriptor open.
            let read = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), wanted) };
            let result = if read < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(read as usize)
            };
            drop(uffd);
            (buffer, result)
        });
        match read {
            (buffer, Ok(length)) => Ok(PyBytes::new(py, &buffer[..length])),
            (_, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(PyBytes::new(py, b""))
            }
            (_, Err(error)) => Err(io_error(&error)),
        }
    }
}

/// What PAGEMAP_SCAN is asked: flags, inverted, mask, any-of mask, return mask.
type Question = (u64, u64, u64, u64, u64);

/// Regions as start, end and categories; and how far the walk came.
type ScanAnswer = (Vec<(u64, u64, u64)>, usize);

/// PAGEMAP_SCAN of the bytes from `start` to `end` of a process, to the end however often the buffer fills, or until
/// `max_pages` are found. Gives the regions and how far the walk came.
#[pyfunction]
pub fn pagemap_scan(
    py: Python<'_>,
    pid: Option<u32>,
    start: usize,
    end: usize,
    question: Question,
    max_pages: u64,
    vector: bool,
) -> PyResult<ScanAnswer> {
    let (flags, inverted, all_of, any_of, report) = question;
    py.detach(move || -> io::Result<_> {
        let pagemap = match pid {
            None => Pagemap::own()?,
            Some(pid) => Pagemap::of(pid)?,
        };
        let mut found = Vec::new();
        let mut buffer = [page_region::default(); 256];
        let room = if vector {
            &mut buffer[..]
        } else {
            &mut buffer[..0]
        };
        let (mut at, mut left) = (start, max_pages);
        loop {
            let scan = Scan {
                flags,
                inverted,
                all_of,
                any_of,
                report,
                max_pages: left,
            };
            let step = pagemap.scan(at..end, &scan, room)?;
            let pages: u64 = room[..step.regions]
                .iter()
                .map(|r| (r.end - r.start) / pagemap.page() as u64)
                .sum();
            found.extend(
                room[..step.regions]
                    .iter()
                    .map(|r| (r.start, r.end, r.categories)),
            );
            let full = max_pages != 0 && pages >= left;
            let stuck = step.walk_end <= at;
            at = step.walk_end;
            left = left.saturating_sub(pages);
            if full || stuck || at >= end {
                return Ok((found, at));
            }
        }
    })
    .map_err(|error| io_error(&error))
}

/// Every number, size and offset of the Rust side: name and value.
#[pyfunction]
pub fn abi_table() -> Vec<(String, u64)> {
    let constants = abi::CONSTANTS
        .iter()
        .map(|(name, value)| ((*name).to_owned(), *value));
    let layouts = abi::LAYOUTS.iter().chain([&abi::MESSAGE_LAYOUT]);
    let layouts = layouts.flat_map(|layout| {
        let size = (format!("sizeof {}", layout.name), layout.size as u64);
        let fields = layout.fields.iter().flat_map(|&(field, offset, size)| {
            let name = format!("{}.{}", layout.name, field.trim_start_matches("r#"));
            [
                (format!("offsetof {name}"), offset as u64),
                (format!("sizeof {name}"), size as u64),
            ]
        });
        std::iter::once(size).chain(fields)
    });
    constants.chain(layouts).collect()
}

/// All features that this machine's kernel has; `OSError` if there is no userfaultfd to ask.
#[pyfunction]
pub fn offered_features(py: Python<'_>) -> PyResult<u64> {
    py.detach(userfault_uffd::negotiate::offered)
        .map_err(|errno| io_error(&io::Error::from_raw_os_error(errno)))
}
