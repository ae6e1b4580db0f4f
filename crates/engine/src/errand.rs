//! Errands: work that calls a store on behalf of somebody who does not wait for ever.
//!
//! A thread that is inside of a store's call cannot be brought back. So what writes or syncs for a caller
//! (flush, close, evict, room for a pwrite, a round of the drain) is done by a thread of its own, which owns the blocks
//! and the buffer until the store has answered. The caller waits as long as it gets on. A call that has
//! not come back when its time is over is declared hung: the caller is told which one, the errand goes on by
//! itself, and what it finds out later is kept for the next caller.
//!
//! ```text
//!   caller   --------- waits ---------+--> result
//!   errand   claims, calls the store, releases --> the end
//!                       |
//!                       | no answer in time: declared
//!                       v
//!            caller gets an error; blocks and buffer stay the errand's
//!                       |
//!                       v the store answers after all
//!            releases; an error is kept for the next flush
//! ```
//!
//! While a call is declared, evictions write nothing more to its store (`Body::refuses_writes`), so that one
//! hung store does not gather one thread after the other.
//!
//! Locks: the state of the errands and the step of one errand are leaves.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::lock::{Condvar, Mutex};
use userfault_store::Store;

use crate::engine::Engine;
use crate::error::Error;
use crate::threads;

/// The least time that a write or a sync is given, however short a region's `retry_for` is.
pub(crate) const LEAST: Duration = Duration::from_secs(2);

/// Compressing needs more than the engine's own threads do. Bytes.
const STACK: usize = 1 << 20;

/// How often a caller looks at an errand that is in no call.
const LOOK: Duration = Duration::from_millis(500);

pub(crate) type Work = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    idle: usize,
}

/// The threads that run errands. They stay when they have nothing to do.
#[derive(Default)]
pub(crate) struct Errands {
    state: Mutex<State>,
    work: Condvar,
}

/// A call of a store under way.
struct Call {
    store: Arc<dyn Store>,
    what: &'static str,
    offset: u64,
    len: u64,
    began: Instant,
    patience: Duration,
    /// Where calls that were declared hung are counted.
    stuck: Arc<AtomicUsize>,
    declared: bool,
}

impl Call {
    fn declare(&mut self) -> Error {
        if !self.declared {
            self.declared = true;
            self.stuck.fetch_add(1, Ordering::Relaxed);
        }
        late(
            &*self.store,
            self.what,
            self.offset,
            self.len,
            self.patience,
        )
    }
}

#[derive(Default)]
struct Step {
    call: Option<Call>,
    over: bool,
    /// The caller does not wait any more.
    left: bool,
}

/// How far an errand is.
#[derive(Default)]
struct Progress {
    step: Mutex<Step>,
    changed: Condvar,
}

thread_local! {
    static MINE: RefCell<Option<Arc<Progress>>> = const { RefCell::new(None) };
}

/// The error of a call that has not come back.
pub(crate) fn late(
    store: &dyn Store,
    what: &'static str,
    offset: u64,
    len: u64,
    patience: Duration,
) -> Error {
    Error::Store {
        store: store.name(),
        what,
        offset,
        len,
        errno: libc::ETIMEDOUT,
        message: format!(
            "it has not come back after {patience:?}; the data is kept and stays dirty until the store has \
             answered"
        ),
    }
}

/// Runs a call of a store. If this thread is on an errand, its caller knows from when and for how long.
pub(crate) fn call<R>(
    store: &Arc<dyn Store>,
    (what, offset, len): (&'static str, u64, u64),
    patience: Duration,
    stuck: &Arc<AtomicUsize>,
    call: impl FnOnce() -> R,
) -> R {
    let Some(mine) = MINE.with_borrow(Clone::clone) else {
        return call();
    };
    mine.step.lock().call = Some(Call {
        store: store.clone(),
        what,
        offset,
        len,
        began: Instant::now(),
        patience,
        stuck: stuck.clone(),
        declared: false,
    });
    let result = call();
    let ended = mine.step.lock().call.take();
    if ended.is_some_and(|call| call.declared) {
        stuck.fetch_sub(1, Ordering::Relaxed);
    }
    result
}

impl Engine {
    /// Has `work` done by another thread, and waits for its result as long as no call of a store in it takes
    /// longer than it may. After that `later` gets the result when there is one.
    pub(crate) fn errand<T: Send + 'static>(
        &'static self,
        work: impl FnOnce() -> T + Send + 'static,
        later: impl FnOnce(T) + Send + 'static,
    ) -> Result<T, Error> {
        self.wait_for_errand(None, work, later)
            .map(|result| result.expect("without a limit there is a result or an error"))
    }

    /// Has `work` done by another thread, and waits for its result for so long.
    pub(crate) fn errand_for<T: Send + 'static>(
        &'static self,
        at_most: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        self.wait_for_errand(Some(at_most), work, drop)
            .unwrap_or(None)
    }

    fn wait_for_errand<T: Send + 'static>(
        &'static self,
        at_most: Option<Duration>,
        work: impl FnOnce() -> T + Send + 'static,
        later: impl FnOnce(T) + Send + 'static,
    ) -> Result<Option<T>, Error> {
        let began = Instant::now();
        let progress = Arc::new(Progress::default());
        let result = Arc::new(Mutex::new(None));
        let task: Work = {
            let (progress, result) = (progress.clone(), result.clone());
            Box::new(move || {
                MINE.set(Some(progress.clone()));
                let value = work();
                MINE.set(None);
                let mut step = progress.step.lock();
                if step.left {
                    drop(step);
                    later(value);
                } else {
                    *result.lock() = Some(value);
                    step.over = true;
                    progress.changed.notify_one();
                }
            })
        };
        self.errands.submit(self, task);
        let mut step = progress.step.lock();
        loop {
            if step.over {
                return Ok(result.lock().take());
            }
            let now = Instant::now();
            if at_most.is_some_and(|at_most| now >= began + at_most) {
                step.left = true;
                return Ok(None);
            }
            let until = match &mut step.call {
                None => now + LOOK,
                Some(call) if now < call.began + call.patience => {
                    (call.began + call.patience).min(now + LOOK)
                }
                Some(call) => {
                    let error = call.declare();
                    step.left = true;
                    return Err(error);
                }
            };
            let until = at_most.map_or(until, |at_most| until.min(began + at_most));
            progress.changed.wait_until(&mut step, until);
        }
    }
}

impl Errands {
    /// Has `task` done by another thread.
    pub(crate) fn submit(&'static self, engine: &'static Engine, task: Work) {
        let mut state = self.state.lock();
        state.queue.push_back(task);
        if state.queue.len() <= state.idle {
            drop(state);
            self.work.notify_one();
            return;
        }
        drop(state);
        if !threads::start("userfault-errand", STACK, || engine.errands.run()) {
            // Without a thread it is done here, and waited for however long it takes.
            let task = self.state.lock().queue.pop_back();
            if let Some(task) = task {
                task();
            }
        }
    }

    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(task) = state.queue.pop_front() {
                drop(state);
                task();
                state = self.state.lock();
            } else {
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}
