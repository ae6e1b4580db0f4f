//! A point on its way: what save() returns.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use userfault_engine::generation;
use userfault_engine::lock::{Condvar, Mutex};

use crate::error::Error;

type Outcome = Option<Result<(), Error>>;

/// A point that is being saved, or that has been, or that has failed.
#[derive(Debug)]
pub struct Point {
    step: u64,
    /// For each array, how it was followed.
    method: Vec<(String, &'static str)>,
    outcome: Mutex<Outcome>,
    /// Nanoseconds.
    stall: AtomicU64,
    extra_bytes: AtomicUsize,
    /// The process whose it is. A child that forked meanwhile may have inherited a held lock.
    generation: u32,
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
            outcome: Mutex::default(),
            stall: AtomicU64::new(0),
            extra_bytes: AtomicUsize::new(0),
            generation: generation(),
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
        Duration::from_nanos(self.stall.load(Ordering::Relaxed))
    }

    /// Staging memory that was in use at most, bytes.
    pub fn extra_bytes(&self) -> usize {
        self.extra_bytes.load(Ordering::Relaxed)
    }

    /// Bytes looked at so far, and in all.
    pub fn progress(&self) -> (u64, u64) {
        let total = self.total_bytes.load(Ordering::Relaxed);
        (self.done_bytes.load(Ordering::Relaxed).min(total), total)
    }

    /// The outcome, once there is one. In a forked child it is always that it was forked.
    pub fn outcome(&self) -> Option<Result<(), Error>> {
        if self.generation != generation() {
            return Some(Err(Error::Forked));
        }
        self.outcome.lock().clone()
    }

    /// Waits for the outcome, at most so long.
    pub fn wait(&self, at_most: Duration) -> Option<Result<(), Error>> {
        let until = Instant::now() + at_most.min(Duration::from_secs(1 << 30));
        if self.generation != generation() {
            return Some(Err(Error::Forked));
        }
        let mut outcome = self.outcome.lock();
        while outcome.is_none() && !self.changed.wait_until(&mut outcome, until).timed_out() {}
        outcome.clone()
    }

    pub(crate) fn stalled(&self, stall: Duration) {
        self.stall.store(stall.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(crate) fn used(&self, extra_bytes: usize) {
        self.extra_bytes.fetch_max(extra_bytes, Ordering::Relaxed);
    }

    /// Sets the outcome; the first one counts. True if this was it.
    pub(crate) fn end(&self, outcome: Result<(), Error>) -> bool {
        let mut state = self.outcome.lock();
        if state.is_some() {
            return false;
        }
        *state = Some(outcome);
        self.changed.notify_all();
        true
    }
}
