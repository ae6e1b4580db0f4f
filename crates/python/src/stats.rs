//! `userfault.Stats`.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Makes the class, its dictionary and its repr from one list of figures.
macro_rules! figures {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)+) => {
        /// Figures of one region or of the whole process, as they were when they were asked for.
        ///
        /// Sizes are in bytes, times in seconds; counts begin when the region was opened or the process began.
        #[pyclass(frozen, module = "userfault._native")]
        pub struct Stats {
            $($(#[$doc])* #[pyo3(get)] $name: $type,)+
            without: Vec<&'static str>,
        }

        impl From<userfault_engine::Stats> for Stats {
            fn from(from: userfault_engine::Stats) -> Self {
                Self { $($name: $value(&from),)+ without: from.without }
            }
        }

        #[pymethods]
        impl Stats {
            /// All figures by name.
            fn as_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                let dict = PyDict::new(py);
                $(dict.set_item(stringify!($name), self.$name)?;)+
                Ok(dict)
            }

            /// What the engine does without: "wp_async", "continue_wp", "poison", "aio". The kernel lacks them, or
            /// USERFAULT_WITHOUT names them. Empty before the first region.
            #[getter]
            fn without<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
                PyTuple::new(py, &self.without)
            }

            fn __repr__(&self) -> String {
                let figures = [$(format!("{}={:?}", stringify!($name), self.$name),)+];
                format!("Stats({})", figures.join(", "))
            }
        }
    };
}

fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}

type S = userfault_engine::Stats;

figures! {
    /// The memory limit that holds, in bytes.
    limit: u64 = |s: &S| s.limit;
    /// Bytes in use, counted against the limit.
    used: u64 = |s: &S| s.used;
    /// Bytes in memory and mapped.
    resident: u64 = |s: &S| s.resident;
    /// Bytes in memory, but unmapped: a touch brings them back without a read.
    resting: u64 = |s: &S| s.resting;
    /// Bytes that differ from the store, as far as is known without asking the kernel.
    dirty: u64 = |s: &S| s.dirty;
    /// Bytes that are pinned.
    pinned: u64 = |s: &S| s.pinned;
    /// Bytes of buffers between stores and memory.
    staging: u64 = |s: &S| s.staging;
    /// Bytes of page tables.
    page_tables: u64 = |s: &S| s.page_tables;
    /// Of the bytes in memory, those on hugetlb pages.
    hugetlb: u64 = |s: &S| s.hugetlb;
    /// Open regions.
    regions: u64 = |s: &S| s.regions;
    /// Faults on blocks that were not in memory.
    faults_missing: u64 = |s: &S| s.faults_missing;
    /// Faults on blocks that were in memory, but unmapped.
    faults_minor: u64 = |s: &S| s.faults_minor;
    /// Faults on write-protected pages.
    faults_write_protect: u64 = |s: &S| s.faults_write_protect;
    /// Resting blocks that came back.
    hits: u64 = |s: &S| s.hits;
    /// Bytes read from the store.
    bytes_read: u64 = |s: &S| s.bytes_read;
    /// Bytes written to the store.
    bytes_written: u64 = |s: &S| s.bytes_written;
    /// Blocks that left memory.
    evictions: u64 = |s: &S| s.evictions;
    /// Faults that had to wait for memory or for another owner of their block.
    waits: u64 = |s: &S| s.waits;
    /// Seconds that faults waited for memory, together.
    wait: f64 = |s: &S| seconds(s.wait_ns);
    /// Blocks that were given up, and write-backs that failed.
    errors: u64 = |s: &S| s.errors;
    /// Half of all faults took less, in seconds.
    latency_p50: f64 = |s: &S| seconds(s.latency_p50_ns);
    /// 99 of 100 faults took less, in seconds.
    latency_p99: f64 = |s: &S| seconds(s.latency_p99_ns);
    /// The slowest fault took this long, in seconds.
    latency_max: f64 = |s: &S| seconds(s.latency_max_ns);
}

/// Figures of the whole process, read without disturbing it.
#[pyfunction]
pub fn stats(py: Python<'_>) -> Stats {
    py.detach(userfault_engine::stats).into()
}

/// Writes out what has been recorded for `userfault trace` so far.
#[pyfunction]
pub fn write_out_trace(py: Python<'_>) {
    py.detach(userfault_engine::write_out_trace);
}
