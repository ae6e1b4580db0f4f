//! The base of `userfault.testing.FaultyStore`, whose plan is written in Python.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use userfault_store::{Action, Call, Rule};

use crate::store::Store;

/// call, action, errno, seconds, bytes done, start, end, skip, count
type PlanLine = (
    String,
    String,
    i32,
    f64,
    Option<u64>,
    u64,
    Option<u64>,
    u64,
    Option<u64>,
);

/// Wraps another store and spoils its calls by plan; use userfault.testing.FaultyStore.
#[pyclass(extends = Store, subclass, frozen, module = "userfault._native")]
pub struct FaultyStore {
    faulty: Arc<userfault_store::FaultyStore>,
}

fn call_of(name: &str) -> PyResult<Call> {
    match name {
        "read" => Ok(Call::Read),
        "write" => Ok(Call::Write),
        "punch" => Ok(Call::Punch),
        "sync" => Ok(Call::Sync),
        _ => Err(PyValueError::new_err(format!(
            "call is {name:?}: it must be read, write, punch or sync"
        ))),
    }
}

fn name_of(call: Call) -> &'static str {
    match call {
        Call::Read => "read",
        Call::Write => "write",
        Call::Punch => "punch",
        Call::Sync => "sync",
    }
}

fn rules(plan: Vec<PlanLine>) -> PyResult<Vec<Rule>> {
    plan.into_iter()
        .map(
            |(call, action, errno, seconds, bytes, start, end, skip, count)| {
                let action = match action.as_str() {
                    "fail" => Action::Fail { errno },
                    "delay" => {
                        Action::Delay(Duration::try_from_secs_f64(seconds).map_err(|e| {
                            PyValueError::new_err(format!("seconds is {seconds}: {e}"))
                        })?)
                    }
                    "shorten" => Action::Shorten { bytes, errno },
                    "hang" => Action::Hang,
                    _ => return Err(PyValueError::new_err(format!("no such action: {action:?}"))),
                };
                let range = (start > 0 || end.is_some()).then(|| (start, end.unwrap_or(u64::MAX)));
                Ok(Rule {
                    call: call_of(&call)?,
                    action,
                    range,
                    skip,
                    count,
                })
            },
        )
        .collect()
}

#[pymethods]
impl FaultyStore {
    #[new]
    fn new(store: &Bound<'_, Store>, plan: Vec<PlanLine>) -> PyResult<PyClassInitializer<Self>> {
        let inner = store.get();
        let faulty = Arc::new(userfault_store::FaultyStore::new(
            inner.inner.clone(),
            rules(plan)?,
        ));
        // The inner store's writer is this one's: the bytes are the same.
        let base = Store {
            inner: faulty.clone(),
            writer: inner.writer.clone(),
            file: inner.file.clone(),
        };
        Ok(PyClassInitializer::from(base).add_subclass(Self { faulty }))
    }

    /// Replaces the plan; calls that hang go on hanging.
    fn set_plan(&self, plan: Vec<PlanLine>) -> PyResult<()> {
        self.faulty.set_plan(rules(plan)?);
        Ok(())
    }

    /// Lets every call go that hangs now, and takes the hangs out of the plan. Returns how many went.
    fn release(&self) -> usize {
        self.faulty.release()
    }

    /// How many calls hang now.
    #[getter]
    fn hung(&self) -> usize {
        self.faulty.hung()
    }

    /// The calls that came back, oldest first: name, offset and length in bytes, errno (0: it succeeded).
    fn finished_calls(&self) -> Vec<(&'static str, u64, u64, i32)> {
        self.faulty
            .calls()
            .into_iter()
            .map(|c| (name_of(c.call), c.offset, c.len, c.errno))
            .collect()
    }
}
