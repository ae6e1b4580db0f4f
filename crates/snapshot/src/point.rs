//! A point on its way: what save() returns.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::Error;

#[derive(Debug, Default)]
struct State {
    outcome: Option<Result<(), Error>>,
    stall: Duration,
    extra_bytes: usize,
}

/// A point that is being saved, or that has been, or that has failed.
#[derive(Debug)]
pub struct Point {
    step: u64,
    /// For each array, how it was followed.
    method: Vec<(String, &'static str)>,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes looked at so far.
    pub(crate) done_bytes: AtomicU64,
    /// Bytes to be looked at, as far as is known.
    pub(crate) total_bytes: AtomicU64,
}

impl Point {
    pub(crate) fn new(step: u64, method: Vec<(String, &'static str)>) -> Point {
        Point {
            step,
            method,
            state: Mutex::default(),
            changed: Condvar::new(),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
        }
    }

    /// The number that the program gave it.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// For each array, how it was followed: "tracked", "guarded" or "copied".
    pub fn method(&self) -> &[(String, &'static str)] {
        &self.method
    }

    /// How long save() kept its caller.
    pub fn stall(&self) -> Duration {
        self.state.lock().stall
    }

    /// Staging memory that was in use at most, bytes.
    pub fn extra_bytes(&self) -> usize {
        self.state.lock().extra_bytes
    }

    /// Bytes looked at so far, and in all.
    pub fn progress(&self) -> (u64, u64) {
        let total = self.total_bytes.load(Ordering::Relaxed);
        (self.done_bytes.load(Ordering::Relaxed).min(total), total)
    }

    /// The outcome, once there is one.
    pub fn outcome(&self) -> Option<Result<(), Error>> {
        self.state.lock().outcome.clone()
    }

    /// Waits for the outcome, at most so long.
    pub fn wait(&self, at_most: Duration) -> Option<Result<(), Error>> {
        let until = Instant::now() + at_most.min(Duration::from_secs(1 << 30));
        let mut state = self.state.lock();
        while state.outcome.is_none() && !self.changed.wait_until(&mut state, until).timed_out() {}
        state.outcome.clone()
    }

    pub(crate) fn stalled(&self, stall: Duration) {
        self.state.lock().stall = stall;
    }

    pub(crate) fn used(&self, extra_bytes: usize) {
        let mut state = self.state.lock();
        state.extra_bytes = state.extra_bytes.max(extra_bytes);
    }

    /// Sets the outcome; the first one counts. True if this was it.
    pub(crate) fn end(&self, outcome: Result<(), Error>) -> bool {
        let mut state = self.state.lock();
        if state.outcome.is_some() {
            return false;
        }
        state.outcome = Some(outcome);
        self.changed.notify_all();
        true
    }
}
