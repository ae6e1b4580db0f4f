//! `userfault.Pin`.

use std::sync::Mutex;

use pyo3::prelude::*;

use crate::region::Region;

/// Blocks that stay in memory and mapped until release(), or the end of the with-block.
///
/// Made by Region.pin(). While it lasts, system calls, devices and impatient loops find the memory there. With
/// write=True devices may write it too (O_DIRECT, io_uring, RDMA), and every flush writes all of it.
#[pyclass(frozen, module = "userfault._native")]
pub struct Pin {
    pin: Mutex<Option<userfault_engine::Pin>>,
    range: (u64, u64),
    /// True if devices may write the memory.
    #[pyo3(get)]
    write: bool,
    // The memory must not go away under whoever relies on the pin.
    _region: Py<Region>,
}

impl Pin {
    pub fn new(pin: userfault_engine::Pin, write: bool, region: Py<Region>) -> Self {
        Self {
            range: pin.range(),
            pin: Mutex::new(Some(pin)),
            write,
            _region: region,
        }
    }

    fn end(&self, py: Python<'_>) {
        let pin = self
            .pin
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        py.detach(|| drop(pin));
    }
}

#[pymethods]
impl Pin {
    /// Ends the pin. Doing it again does nothing.
    fn release(&self, py: Python<'_>) {
        self.end(py);
    }

    /// First pinned byte of the region; a pin covers whole blocks.
    #[getter]
    fn offset(&self) -> u64 {
        self.range.0
    }

    /// How many bytes are pinned.
    #[getter]
    fn length(&self) -> u64 {
        self.range.1
    }

    /// True once the pin has ended.
    #[getter]
    fn released(&self) -> bool {
        self.pin
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .is_none()
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.end(py);
    }

    fn __repr__(&self) -> String {
        let (offset, length) = self.range;
        let state = match (self.released(), self.write) {
            (true, _) => "released",
            (false, true) => "for writing devices",
            (false, false) => "held",
        };
        format!("<Pin of {length} bytes at {offset}, {state}>")
    }
}
