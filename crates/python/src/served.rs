//! The base of `userfault.Served`: other processes' memory, served from a store.
//!
//! Unsafe: takes a descriptor over by its number.

use std::os::fd::{BorrowedFd, RawFd};
use std::time::{Duration, UNIX_EPOCH};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use userfault_engine::{Lies, OnError, ServeOptions};

use crate::errors;
use crate::stats::Stats;
use crate::store::Store;

/// Address, length, offset in the store, bytes of a page, shared or not or unknown.
type Item = (usize, usize, u64, usize, Option<bool>);

/// Process, address, length, offset in the store, bytes of a page.
type Owed = (u32, usize, usize, u64, usize);

/// Process, address, length, offset in the store.
type Written = (u32, usize, usize, u64);

/// offset in the store, length, errno, message, seconds since 1970
type ServedError = (u64, u64, i32, String, f64);

/// The base of userfault.Served; made by userfault.serve().
#[pyclass(subclass, frozen, module = "userfault._native")]
pub struct Served {
    served: userfault_engine::Served,
    store: Py<Store>,
}

#[pymethods]
impl Served {
    #[new]
    #[pyo3(signature = (fd, layout, store, *, name, block, on_error, retry_for, pid, track))]
    #[allow(
        clippy::too_many_arguments,
        reason = "one for each option of userfault.serve, by keyword"
    )]
    fn new(
        py: Python<'_>,
        fd: RawFd,
        layout: Vec<Item>,
        store: Bound<'_, Store>,
        name: String,
        block: Option<usize>,
        on_error: &str,
        retry_for: f64,
        pid: Option<u32>,
        track: bool,
    ) -> PyResult<Self> {
        if fd < 0 {
            return Err(errors::os_error(libc::EBADF, "Bad file descriptor", None));
        }
        // SAFETY: borrowed for the call alone; a number that is no open descriptor is an error of dup().
        let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        let layout: Vec<Lies> = layout
            .into_iter()
            .map(|(address, len, store_offset, page, shared)| Lies {
                address,
                len,
                store_offset,
                page,
                shared,
            })
            .collect();
        let options = ServeOptions {
            name,
            block,
            on_error: match on_error {
                "auto" => OnError::Auto,
                "retry" => OnError::Retry,
                "poison" => OnError::Poison,
                _ => return Err(PyValueError::new_err(format!("on_error is {on_error:?}"))),
            },
            retry_for: Duration::try_from_secs_f64(retry_for)
                .map_err(|e| PyValueError::new_err(format!("retry_for is {retry_for}: {e}")))?,
            pid,
            track,
        };
        let inner = store.get().inner.clone();
        let served = py
            .detach(|| userfault_engine::serve(copy, &layout, inner, options))
            .map_err(|error| errors::engine_error(py, &error))?;
        Ok(Self {
            served,
            store: store.unbind(),
        })
    }

    /// Where the bytes come from.
    #[getter]
    fn store(&self, py: Python<'_>) -> Py<Store> {
        self.store.clone_ref(py)
    }

    /// What messages call it.
    #[getter]
    fn name(&self) -> &str {
        self.served.name()
    }

    /// Bytes that the store still owes, in all processes.
    #[getter]
    fn owed_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.served.owed_bytes())
    }

    /// The living processes: their numbers, and the pid of those that are known.
    fn _processes(&self, py: Python<'_>) -> Vec<(u32, Option<u32>)> {
        py.detach(|| self.served.processes())
    }

    /// What is still owed: process, address, length, offset in the store, bytes of a page.
    fn _owed(&self, py: Python<'_>) -> Vec<Owed> {
        let owed = py.detach(|| self.served.owed());
        owed.into_iter()
            .map(|o| (o.process, o.address, o.len, o.store_offset, o.page))
            .collect()
    }

    /// Takes what was written: process, address, length, offset in the store.
    fn _take_written(&self, py: Python<'_>) -> PyResult<Vec<Written>> {
        let written = py
            .detach(|| self.served.take_written())
            .map_err(|error| errors::engine_error(py, &error))?;
        Ok(written
            .into_iter()
            .map(|w| (w.process, w.address, w.len, w.store_offset))
            .collect())
    }

    /// What was given up: offset in the store, length, errno, message, seconds since 1970.
    fn _errors(&self, py: Python<'_>) -> Vec<ServedError> {
        let errors = py.detach(|| self.served.errors());
        errors
            .into_iter()
            .map(|each| {
                let error = each.error;
                let time = error.time.duration_since(UNIX_EPOCH).unwrap_or_default();
                let errno = if error.errno == 0 {
                    libc::EIO
                } else {
                    error.errno
                };
                (
                    each.store_offset,
                    error.len,
                    errno,
                    error.message,
                    time.as_secs_f64(),
                )
            })
            .collect()
    }

    /// Figures of all processes together, also of those that have ended; `regions` counts the living.
    fn stats(&self, py: Python<'_>) -> Stats {
        py.detach(|| self.served.stats()).into()
    }

    /// How many events of each kind have been read, by name: fork, remap, remove, unmap. `refused` counts the
    /// fills that the kernel refused because an event was on its way; they were tried again.
    fn events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, count) in self.served.events() {
            dict.set_item(name, count)?;
        }
        Ok(dict)
    }

    /// Tries again what was given up; returns how many bytes were healed.
    ///
    /// Raises PoisonedError for the first block that still cannot be had.
    fn heal(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.served.heal())
            .map_err(|error| errors::engine_error(py, &error))
    }

    /// Begins to deliver what is owed without being asked, in the order of the store; touches go first.
    ///
    /// Returns at once; `owed_bytes` tells how far it is. What cannot be read is left out.
    fn prefetch(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.served.prefetch())
            .map_err(|error| errors::engine_error(py, &error))
    }

    /// Waits so many seconds until no process is left.
    fn _wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let at_most = Duration::try_from_secs_f64(seconds)
            .map_err(|e| PyValueError::new_err(format!("timeout is {seconds}: {e}")))?;
        py.detach(|| self.served.wait(Some(at_most)))
            .map_err(|error| errors::engine_error(py, &error))
    }

    /// Stops to serve. Closing again does nothing.
    ///
    /// A later touch of what is still owed is SIGBUS (a system call gets EFAULT). With poison=False it waits for
    /// another server, if the process kept a copy of its userfaultfd; **if it did not, it reads zeros.** Raises
    /// OSError, and goes on serving, where the kernel cannot poison (before Linux 6.6).
    #[pyo3(signature = (*, poison=true))]
    fn close(&self, py: Python<'_>, poison: bool) -> PyResult<()> {
        py.detach(|| self.served.close(poison))
            .map_err(|error| errors::engine_error(py, &error))
    }
}
