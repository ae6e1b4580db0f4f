//! `userfault.PrefetchTicket`.

use pyo3::prelude::*;

use crate::errors;

/// A prefetch under way, as Region.prefetch() returns it. Dropping it does not stop the prefetch.
#[pyclass(frozen, module = "userfault._native")]
pub struct PrefetchTicket {
    ticket: userfault_engine::PrefetchTicket,
}

impl PrefetchTicket {
    pub fn new(ticket: userfault_engine::PrefetchTicket) -> Self {
        Self { ticket }
    }

    pub fn wait(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.ticket.wait())
            .map_err(|error| errors::engine_error(py, &error))
    }
}

#[pymethods]
impl PrefetchTicket {
    /// True if nothing of it is under way any more.
    fn done(&self) -> bool {
        self.ticket.is_done()
    }

    /// Waits for the end; raises PoisonedError for the first block that could not be had.
    fn result(&self, py: Python<'_>) -> PyResult<()> {
        self.wait(py)
    }

    fn __repr__(&self) -> &'static str {
        if self.ticket.is_done() {
            "<PrefetchTicket, done>"
        } else {
            "<PrefetchTicket, under way>"
        }
    }
}
