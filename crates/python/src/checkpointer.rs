//! `userfault._native.Checkpointer` and `SavedPoint`: saving, and a save on its way.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use userfault_snapshot::{Array, Compress, Options, Point};

use crate::errors;

/// How long a wait goes on before signals are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// name, description (JSON), address, bytes, always copied
type ArrayArguments = (String, String, usize, usize, bool);

/// The base of userfault.Checkpointer. Whoever makes one keeps the arrays' memory alive until it has ended.
#[pyclass(subclass, frozen, weakref, module = "userfault._native")]
pub struct Checkpointer {
    inner: userfault_snapshot::Checkpointer,
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|error| PyValueError::new_err(format!("{name} is {value}: {error}")))
}

/// Runs `wait` again and again, detached, until it has an answer; a signal ends it.
fn patiently<T: Send>(
    py: Python<'_>,
    timeout: Option<f64>,
    wait: impl Fn(Duration) -> Option<T> + Send + Sync,
) -> PyResult<Option<T>> {
    let until = match timeout {
        Some(timeout) => Some(std::time::Instant::now() + seconds("timeout", timeout.max(0.0))?),
        None => None,
    };
    loop {
        let left = until.map(|until| until.saturating_duration_since(std::time::Instant::now()));
        let step = left.map_or(LOOK, |left| left.min(LOOK));
        if let Some(answer) = py.detach(|| wait(step)) {
            return Ok(Some(answer));
        }
        py.check_signals()?;
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(None);
        }
    }
}

#[pymethods]
impl Checkpointer {
    #[new]
    #[pyo3(signature = (
        directory, arrays, *, max_to_keep, compress, durable, max_rate, staging, drain, timeout
    ))]
    #[allow(
        clippy::too_many_arguments,
        reason = "one for each option of userfault.Checkpointer, by keyword"
    )]
    fn new(
        py: Python<'_>,
        directory: std::path::PathBuf,
        arrays: Vec<ArrayArguments>,
        max_to_keep: Option<usize>,
        compress: Option<&str>,
        durable: bool,
        max_rate: Option<f64>,
        staging: usize,
        drain: bool,
        timeout: f64,
    ) -> PyResult<Self> {
        let options = Options {
            max_to_keep,
            compress: match compress {
                None => None,
                Some("lz4") => Some(Compress::Lz4),
                Some("zstd") => Some(Compress::Zstd),
                Some(other) => {
                    return Err(PyValueError::new_err(format!("compress is {other:?}")));
                }
            },
            durable,
            max_rate,
            staging,
            drain,
            timeout: seconds("timeout", timeout)?,
            fault: None,
        };
        let arrays = arrays
            .into_iter()
            .map(|(name, description, start, nbytes, always_copy)| Array {
                name,
                description,
                start,
                nbytes,
                always_copy,
            })
            .collect();
        let inner = py
            .detach(|| userfault_snapshot::Checkpointer::open(directory, arrays, options))
            .map_err(|error| errors::snapshot_error(py, &error))?;
        Ok(Self { inner })
    }

    /// Takes a point; returns at the cut.
    fn _save(&self, py: Python<'_>, step: Option<u64>, meta: String) -> PyResult<SavedPoint> {
        let point = py
            .detach(|| self.inner.save(step, meta))
            .map_err(|error| errors::snapshot_error(py, &error))?;
        Ok(SavedPoint { point })
    }

    /// Finished points, oldest first: step, seconds since 1970.
    fn _points(&self, py: Python<'_>) -> PyResult<Vec<(u64, f64)>> {
        let points = self
            .inner
            .points()
            .map_err(|error| errors::snapshot_error(py, &error))?;
        Ok(points
            .iter()
            .map(|point| (point.step, point.time))
            .collect())
    }

    /// Waits until nothing is under way; False if that takes longer than timeout seconds.
    fn _wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        match patiently(py, timeout, |step| self.inner.wait(step))? {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) => Err(errors::snapshot_error(py, &error)),
        }
    }

    /// Asks for all but the newest keep points to be dropped.
    fn _prune(&self, py: Python<'_>, keep: usize) -> PyResult<()> {
        py.detach(|| self.inner.prune(keep))
            .map_err(|error| errors::snapshot_error(py, &error))
    }

    /// Has the kernel note the next write to every page, and nothing else: for measurements.
    fn _rearm(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.rearm())
            .map_err(|error| errors::snapshot_error(py, &error))
    }

    /// Takes no more saves. True once the threads have ended, False after timeout seconds.
    fn _close(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        self.inner.close();
        let ended = patiently(py, Some(timeout), |step| {
            self.inner.ended(step).then_some(())
        })?;
        Ok(ended.is_some())
    }
}

/// A point that is being saved.
#[pyclass(frozen, module = "userfault._native")]
pub struct SavedPoint {
    point: Arc<Point>,
}

#[pymethods]
impl SavedPoint {
    /// The number that the program gave it.
    #[getter]
    fn step(&self) -> u64 {
        self.point.step()
    }

    /// How long save() kept its caller, in seconds.
    #[getter]
    fn stall(&self) -> f64 {
        self.point.stall().as_secs_f64()
    }

    /// For each array how it was followed: "tracked", "guarded" or "copied".
    #[getter]
    fn method(&self) -> Vec<(String, &'static str)> {
        self.point.method().to_vec()
    }

    /// Bytes of staging memory that were in use at most.
    #[getter]
    fn extra_bytes(&self) -> usize {
        self.point.extra_bytes()
    }

    /// Bytes looked at so far, and in all.
    fn progress(&self) -> (u64, u64) {
        self.point.progress()
    }

    /// True once it is finished or has failed.
    fn done(&self) -> bool {
        self.point.outcome().is_some()
    }

    /// Waits at most timeout seconds: False if it is not done; else its exception or None.
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<(bool, Option<PyErr>)> {
        let outcome = patiently(py, timeout, |step| self.point.wait(step))?;
        Ok(match outcome {
            None => (false, None),
            Some(Ok(())) => (true, None),
            Some(Err(error)) => (true, Some(errors::snapshot_error(py, &error))),
        })
    }
}
