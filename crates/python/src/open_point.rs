//! `userfault._native.OpenPoint` and `ArrayStore`: reading points.
//!
//! Unsafe: bytes are read into a buffer of Python's with the interpreter detached.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use userfault_snapshot::{ArrayReader, Directory};

use crate::errors;
use crate::store::Store;

/// A finished point, open for reading; nothing is loaded but its index's root.
///
/// Raises CorruptError if its files do not hold what they should, FileNotFoundError if there is none.
#[pyclass(frozen, module = "userfault._native")]
pub struct OpenPoint {
    point: userfault_snapshot::OpenPoint,
}

#[pymethods]
impl OpenPoint {
    #[new]
    fn new(py: Python<'_>, directory: PathBuf, step: Option<u64>) -> PyResult<Self> {
        let point = py
            .detach(|| userfault_snapshot::OpenPoint::open(&directory, step))
            .map_err(|error| errors::snapshot_error(py, &error))?;
        Ok(Self { point })
    }

    /// The number that the program gave it.
    #[getter]
    fn step(&self) -> u64 {
        self.point.summary().step
    }

    /// Seconds since 1970 at the cut.
    #[getter]
    fn time(&self) -> f64 {
        self.point.summary().time
    }

    /// What the program kept with it, a JSON text.
    #[getter]
    fn meta(&self) -> &str {
        self.point.meta()
    }

    /// Name, description (JSON) and number of the data of each array.
    fn arrays(&self) -> Vec<(String, String, usize)> {
        let arrays = self.point.arrays().iter();
        arrays
            .map(|array| (array.name.clone(), array.description.clone(), array.data))
            .collect()
    }

    /// The bytes of one of its data, as a store that begins with the lead.
    fn store(&self, py: Python<'_>, data: usize) -> PyResult<Py<ArrayStore>> {
        if data >= self.point.data().len() {
            return Err(PyValueError::new_err(format!("there is no data {data}")));
        }
        let reader = py
            .detach(|| self.point.reader(data))
            .map_err(|error| errors::snapshot_error(py, &error))?;
        let reader = Arc::new(reader);
        Py::new(
            py,
            Store::over(reader.clone()).add_subclass(ArrayStore { reader }),
        )
    }
}

/// The bytes of an array of a point, read-only; every byte is checked when it is read.
#[pyclass(extends = Store, frozen, module = "userfault._native")]
pub struct ArrayStore {
    reader: Arc<ArrayReader>,
}

#[pymethods]
impl ArrayStore {
    /// Bytes of zeros before the array.
    #[getter]
    fn lead(&self) -> u64 {
        self.reader.record().lead
    }

    /// Bytes of the array.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.reader.record().nbytes
    }

    /// Bytes of a block.
    #[getter]
    fn block(&self) -> u64 {
        self.reader.record().block
    }

    /// Fills a buffer of any shape with the array's bytes from offset on, with so many threads.
    ///
    /// Raises StoreError if a block cannot be read, or is not what was saved.
    fn read_into(
        &self,
        py: Python<'_>,
        buffer: PyBuffer<u8>,
        offset: u64,
        threads: usize,
    ) -> PyResult<()> {
        if buffer.readonly() || !buffer.is_c_contiguous() {
            return Err(PyTypeError::new_err(
                "the buffer must be writable and C-contiguous",
            ));
        }
        let len = buffer.len_bytes();
        let nbytes = self.reader.record().nbytes;
        if offset > nbytes || len as u64 > nbytes - offset {
            return Err(PyValueError::new_err(format!(
                "{len} bytes at offset {offset} lie outside of the array of {nbytes} bytes"
            )));
        }
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the exporter keeps `len` writable bytes alive while `buffer` lives. That another thread
        // touches them meanwhile is the caller's affair, as with readinto().
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.buf_ptr().cast::<u8>(), len) };
        let reader = &self.reader;
        py.detach(|| reader.read_array(offset, bytes, threads))
            .map_err(|error| {
                let name = userfault_store::Store::name(&**reader);
                errors::io_error(py, &name, "read", (offset, len as u64), &error)
            })
    }

    /// For each block its hash, 0 for zeros.
    ///
    /// Raises CorruptError if the index is damaged.
    fn hashes(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        let reader = &self.reader;
        py.detach(|| {
            (0..reader.record().blocks())
                .map(|block| reader.entry(block).map(|entry| entry.hash))
                .collect::<Result<Vec<u64>, _>>()
        })
        .map_err(|error| errors::snapshot_error(py, &error))
    }
}

/// The finished points of a directory, oldest first: step, seconds since 1970, segments needed.
///
/// Raises FileNotFoundError if there is no checkpoint, CorruptError if the manifest is damaged.
#[pyfunction]
pub fn list_points(py: Python<'_>, directory: PathBuf) -> PyResult<Vec<(u64, f64, usize)>> {
    let listed = py
        .detach(|| Directory::read(&directory))
        .map_err(|error| errors::snapshot_error(py, &error))?;
    Ok(listed
        .points()
        .iter()
        .map(|point| (point.step, point.time, point.segments.len()))
        .collect())
}

/// step, array, offset in it, file, what is wrong
type Damage = (Option<u64>, Option<String>, Option<u64>, PathBuf, String);

/// Checks every byte of a directory's points, or of one: points, bytes, damage, unused bytes that are not zero.
///
/// Raises FileNotFoundError if there is no checkpoint.
#[pyfunction]
pub fn verify_points(
    py: Python<'_>,
    directory: PathBuf,
    step: Option<u64>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(usize, u64, Vec<Damage>, Vec<Damage>)> {
    let mut raised = None;
    let mut since = 0;
    let result = py.detach(|| {
        userfault_snapshot::verify(&directory, step, &mut |bytes| {
            since += bytes;
            if since < 16 << 20 {
                return true;
            }
            let told = Python::attach(|py| {
                py.check_signals()?;
                if let Some(progress) = &progress {
                    progress.call1(py, (since,))?;
                }
                Ok::<(), PyErr>(())
            });
            since = 0;
            match told {
                Ok(()) => true,
                Err(error) => {
                    raised = Some(error);
                    false
                }
            }
        })
    });
    if let Some(error) = raised {
        return Err(error);
    }
    let verified = result.map_err(|error| errors::snapshot_error(py, &error))?;
    let lines = |found: Vec<userfault_snapshot::Damage>| {
        found
            .into_iter()
            .map(|each| (each.step, each.array, each.offset, each.path, each.detail))
            .collect()
    };
    Ok((
        verified.points,
        verified.bytes,
        lines(verified.damage),
        lines(verified.unused),
    ))
}
