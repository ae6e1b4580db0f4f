//! `userfault._native.TrackedMemory`: memory that is made to be tracked.
//!
//! Unsafe: the buffer protocol hands out its address.

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use userfault_engine::Pages;
use userfault_engine::tracked::Tracked;

use crate::errors;

/// Memory of userfault.zeros(track=True); arrays over it are its buffers.
///
/// Raises MemoryError if the memory limit does not leave nbytes bytes.
#[pyclass(frozen, weakref, module = "userfault._native")]
pub struct TrackedMemory {
    memory: Arc<Tracked>,
    nbytes: usize,
}

#[pymethods]
impl TrackedMemory {
    #[new]
    fn new(py: Python<'_>, nbytes: usize, pages: &str) -> PyResult<Self> {
        let pages = match pages {
            "auto" => Pages::Auto,
            "4KiB" => Pages::Small,
            "2MiB" => Pages::Huge,
            _ => return Err(PyValueError::new_err(format!("pages is {pages:?}"))),
        };
        let memory = py
            .detach(|| Tracked::new(nbytes, pages))
            .map_err(|error| errors::engine_error(py, &error))?;
        Ok(Self { memory, nbytes })
    }

    /// What the memory is made of: "4KiB", "2MiB transparent" or "2MiB hugetlb".
    #[getter]
    fn pages(&self) -> &'static str {
        self.memory.kind().name()
    }

    /// Length in bytes.
    fn __len__(&self) -> usize {
        self.nbytes
    }

    /// # Safety
    /// `view` is Python's own, as the buffer protocol has it.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        // SAFETY: `view` is Python's; the memory lives as long as this object, and the view holds a
        // reference to it.
        let rc = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                this.memory.start() as *mut _,
                this.nbytes as ffi::Py_ssize_t,
                0,
                flags,
            )
        };
        if rc != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }
}
