//! `userfault.FileStore`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use userfault_store::{FileMode, FileOptions, Locking};

use crate::errors;
use crate::store::Store;

/// A local file or block device.
///
/// mode: "r" (read-only), "r+" (must exist), "w" (created or emptied), "x" or "w-" (created, must not exist),
/// "a" (created if it does not exist). A file that is written is made at least length bytes long, sparse.
///
/// locking: a writer takes an exclusive flock(2), so a second writer is refused with InUseError, in this
/// process and in others. A reader takes none and may join a live writer; it sees each block as the file had it
/// when the block was read. True makes a reader exclude writers, and be refused while there is one. False takes
/// no lock and respects none. The lock is held as long as the object or a region on it lives.
///
/// direct: False keeps away from direct I/O, which is used where it is faster than the page cache.
#[pyclass(extends = Store, frozen, module = "userfault._native")]
pub struct FileStore {
    file: Arc<userfault_store::FileStore>,
}

#[pymethods]
impl FileStore {
    #[new]
    #[pyo3(signature = (path, mode="r", *, length=None, locking=None, direct=true))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        mode: &str,
        length: Option<u64>,
        locking: Option<bool>,
        direct: bool,
    ) -> PyResult<PyClassInitializer<Self>> {
        let options = FileOptions {
            mode: match mode {
                "r" => FileMode::Read,
                "r+" => FileMode::ReadWrite,
                "w" => FileMode::Truncate,
                "w-" | "x" => FileMode::CreateNew,
                "a" => FileMode::Create,
                _ => {
                    return Err(PyValueError::new_err(format!(
                        "mode is {mode:?}: it must be one of r, r+, w, w-, x, a"
                    )));
                }
            },
            min_len: length.unwrap_or(0),
            locking: match locking {
                None => Locking::Writers,
                Some(true) => Locking::Strict,
                Some(false) => Locking::Off,
            },
            direct,
        };
        let file = py
            .detach(|| userfault_store::FileStore::open(path, options))
            .map_err(|error| errors::open_error(py, &error))?;
        let file = Arc::new(file);
        let base = Store {
            inner: file.clone(),
            writer: Arc::new(AtomicBool::new(false)),
            file: Some(file.clone()),
        };
        Ok(PyClassInitializer::from(base).add_subclass(Self { file }))
    }

    /// The path as it was given.
    #[getter]
    fn path(&self) -> PathBuf {
        self.file.path().to_path_buf()
    }
}
