//! The only crate that knows Python: it converts, it never decides.

use pyo3::prelude::*;

/// The compiled part of `userfault`.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
