//! `userfault.MemoryStore`.

use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::store::{Store, bytes_of};

/// What a memory store begins with.
#[derive(FromPyObject)]
enum Contents {
    /// So many zeros.
    Length(usize),
    /// A copy of these.
    Bytes(PyBuffer<u8>),
}

/// Bytes in this process's memory, for tests and examples: MemoryStore(length) or MemoryStore(data).
///
/// Its length never changes, and nothing of it outlives the process. It costs its whole length in memory,
/// beside what the memory limit counts.
#[pyclass(extends = Store, frozen, module = "userfault._native")]
pub struct MemoryStore {
    memory: Arc<userfault_store::MemoryStore>,
}

#[pymethods]
impl MemoryStore {
    #[new]
    #[pyo3(signature = (contents, /))]
    fn new(contents: Contents) -> PyResult<PyClassInitializer<Self>> {
        let (bytes, length) = match &contents {
            Contents::Length(length) => (&[][..], *length),
            Contents::Bytes(buffer) => (bytes_of(buffer)?, buffer.len_bytes()),
        };
        let mut data = Vec::new();
        data.try_reserve_exact(length)
            .map_err(|_| PyMemoryError::new_err(format!("no room for {length} bytes")))?;
        data.extend_from_slice(bytes);
        data.resize(length, 0);
        let memory = Arc::new(userfault_store::MemoryStore::new(data));
        Ok(Store::over(memory.clone()).add_subclass(Self { memory }))
    }

    /// All bytes as they are in the store now; flush the region first to see what it wrote.
    fn getvalue<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.memory.to_vec())
    }
}
