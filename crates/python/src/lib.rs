//! The only crate that knows Python: it converts, it never decides.
//!
//! One file for each class. Whatever may wait runs with the interpreter detached, so that other threads of
//! Python go on; errors become exceptions in `errors.rs` alone.

use pyo3::prelude::*;

mod checkpointer;
mod errors;
mod faulty_store;
mod file_store;
mod memory_store;
mod open_point;
mod overlay_store;
mod pin;
mod prefetch_ticket;
mod region;
mod served;
mod stats;
mod store;
mod tracked_memory;
mod userfaultfd;
mod zero_store;

/// The compiled part of `userfault`.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_class::<store::Store>()?;
    m.add_class::<file_store::FileStore>()?;
    m.add_class::<memory_store::MemoryStore>()?;
    m.add_class::<overlay_store::OverlayStore>()?;
    m.add_class::<zero_store::ZeroStore>()?;
    m.add_class::<faulty_store::FaultyStore>()?;
    m.add_class::<userfaultfd::Userfaultfd>()?;
    m.add_function(wrap_pyfunction!(userfaultfd::pagemap_scan, m)?)?;
    m.add_function(wrap_pyfunction!(userfaultfd::offered_features, m)?)?;
    m.add_function(wrap_pyfunction!(userfaultfd::abi_table, m)?)?;
    m.add_class::<region::Region>()?;
    m.add_class::<pin::Pin>()?;
    m.add_class::<prefetch_ticket::PrefetchTicket>()?;
    m.add_class::<stats::Stats>()?;
    m.add_function(wrap_pyfunction!(region::set_memory_limit, m)?)?;
    m.add_function(wrap_pyfunction!(stats::stats, m)?)?;
    m.add_class::<served::Served>()?;
    m.add_function(wrap_pyfunction!(stats::write_out_trace, m)?)?;
    m.add_class::<tracked_memory::TrackedMemory>()?;
    m.add_class::<checkpointer::Checkpointer>()?;
    m.add_class::<checkpointer::SavedPoint>()?;
    m.add_class::<open_point::OpenPoint>()?;
    m.add_class::<open_point::ArrayStore>()?;
    m.add_function(wrap_pyfunction!(open_point::list_points, m)?)?;
    m.add_function(wrap_pyfunction!(open_point::verify_points, m)?)?;
    Ok(())
}
