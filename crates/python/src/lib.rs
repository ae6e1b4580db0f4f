//! The only crate that knows Python: it converts, it never decides.

mod userfaultfd;

use pyo3::prelude::*;

/// The compiled part of `userfault`.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_class::<userfaultfd::Userfaultfd>()?;
    m.add_function(wrap_pyfunction!(userfaultfd::pagemap_scan, m)?)?;
    m.add_function(wrap_pyfunction!(userfaultfd::offered_features, m)?)?;
    m.add_function(wrap_pyfunction!(userfaultfd::abi_table, m)?)?;
    Ok(())
}
