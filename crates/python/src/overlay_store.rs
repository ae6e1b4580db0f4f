//! `userfault.OverlayStore`: private changes over a store, or over nothing.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use crate::errors;
use crate::store::Store;

/// Length bytes of a store from offset on, with changes of their own: what is written goes to a scratch file in
/// folder that has no name, and ends with the process. Without a store the bytes are zeros.
///
/// Raises OSError if the folder takes no file.
#[pyclass(extends = Store, frozen, module = "userfault._native")]
pub struct OverlayStore {
    overlay: Arc<userfault_store::OverlayStore>,
}

#[pymethods]
impl OverlayStore {
    #[new]
    #[pyo3(signature = (store, *, offset, length, folder, name))]
    fn new(
        py: Python<'_>,
        store: Option<Bound<'_, Store>>,
        offset: u64,
        length: u64,
        folder: PathBuf,
        name: String,
    ) -> PyResult<PyClassInitializer<Self>> {
        let below = store.map(|store| store.get().inner.clone());
        let overlay = py
            .detach(|| userfault_store::OverlayStore::new(below, offset, length, &folder, name))
            .map_err(|error| errors::open_error(py, &error))?;
        let overlay = Arc::new(overlay);
        Ok(Store::over(overlay.clone()).add_subclass(Self { overlay }))
    }

    /// Bytes that differ from what lies below, as far as they have left memory.
    #[getter]
    fn changed(&self) -> u64 {
        self.overlay.changed()
    }
}
