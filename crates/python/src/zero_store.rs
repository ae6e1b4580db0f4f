//! `userfault.ZeroStore`.

use std::sync::Arc;

use pyo3::prelude::*;

use crate::store::Store;

/// A read-only store of length zero bytes, which takes no memory.
#[pyclass(extends = Store, frozen, module = "userfault._native")]
pub struct ZeroStore;

#[pymethods]
impl ZeroStore {
    #[new]
    fn new(length: u64) -> PyClassInitializer<Self> {
        Store::over(Arc::new(userfault_store::ZeroStore::new(length))).add_subclass(Self)
    }
}
