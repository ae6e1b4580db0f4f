//! `userfault.Store`: what every store can do, whatever it is.
//!
//! Unsafe: a buffer of Python's is written to a store with the interpreter detached.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors;

/// The home of a region's bytes.
///
/// Stores are made by their own classes: FileStore, MemoryStore, ZeroStore, and for tests
/// userfault.testing.FaultyStore. Offsets and lengths are in bytes. A store that cannot do what it is asked
/// raises StoreError.
#[pyclass(subclass, frozen, module = "userfault._native")]
pub struct Store {
    /// The store itself.
    pub inner: Arc<dyn userfault_store::Store>,
    /// True while a writable region lives on it; shared with the stores that wrap this one.
    pub writer: Arc<AtomicBool>,
    /// The file whose lock ends with the region, if it is one.
    pub file: Option<Arc<userfault_store::FileStore>>,
}

impl Store {
    /// The base of a store's class.
    pub fn over(inner: Arc<dyn userfault_store::Store>) -> PyClassInitializer<Self> {
        Self {
            inner,
            writer: Arc::new(AtomicBool::new(false)),
            file: None,
        }
        .into()
    }

    fn raise(
        &self,
        py: Python<'_>,
        what: &str,
        range: (u64, u64),
        error: &std::io::Error,
    ) -> PyErr {
        errors::io_error(py, &self.inner.name(), what, range, error)
    }
}

/// The bytes of any C-contiguous buffer of bytes.
pub fn bytes_of(buffer: &PyBuffer<u8>) -> PyResult<&[u8]> {
    if !buffer.is_c_contiguous() {
        return Err(PyTypeError::new_err("the buffer must be C-contiguous"));
    }
    if buffer.len_bytes() == 0 {
        return Ok(&[]);
    }
    // SAFETY: the exporter keeps `len_bytes` bytes at `buf_ptr` alive while `buffer` lives. That another thread
    // changes them meanwhile is the caller's affair, as with any system call: each byte is read once.
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.len_bytes()) })
}

#[pymethods]
impl Store {
    /// Reads length bytes at offset; bytes past the end of the store are zeros.
    ///
    /// Raises StoreError, and MemoryError if there is no room for the answer.
    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let store = &self.inner;
        let mut data = Vec::new();
        data.try_reserve_exact(length).map_err(|_| {
            pyo3::exceptions::PyMemoryError::new_err(format!("no room for {length} bytes"))
        })?;
        data.resize(length, 0);
        py.detach(|| store.read(offset, &mut data))
            .map_err(|e| self.raise(py, "read", (offset, length as u64), &e))?;
        Ok(PyBytes::new(py, &data))
    }

    /// Writes all bytes of data at offset.
    ///
    /// Raises StoreError; ENOSPC if the data would pass the end, because a store never grows.
    fn write(&self, py: Python<'_>, offset: u64, data: PyBuffer<u8>) -> PyResult<()> {
        let (store, bytes) = (&self.inner, bytes_of(&data)?);
        py.detach(|| store.write(offset, bytes))
            .map_err(|e| self.raise(py, "write", (offset, bytes.len() as u64), &e))
    }

    /// Gives back the space of length bytes at offset, which read as zeros afterwards.
    ///
    /// Raises StoreError.
    fn punch(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        let store = &self.inner;
        py.detach(|| store.punch(offset, length))
            .map_err(|e| self.raise(py, "punch", (offset, length), &e))
    }

    /// Returns when everything written before is durable.
    ///
    /// Raises StoreError.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        let store = &self.inner;
        py.detach(|| store.sync())
            .map_err(|e| self.raise(py, "sync", (0, store.len()), &e))
    }

    /// Length in bytes.
    fn __len__(&self) -> PyResult<usize> {
        isize::try_from(self.inner.len())
            .map(|len| len as usize)
            .map_err(|_| PyValueError::new_err("the store is longer than an address space"))
    }

    /// What messages call the store: the path of a file.
    #[getter]
    fn name(&self) -> String {
        self.inner.name()
    }

    /// True if the store can be written.
    #[getter]
    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        let access = if this.inner.writable() {
            "writable"
        } else {
            "read-only"
        };
        Ok(format!(
            "<{} {:?}, {} bytes, {access}>",
            slf.get_type().name()?,
            this.inner.name(),
            this.inner.len()
        ))
    }
}
