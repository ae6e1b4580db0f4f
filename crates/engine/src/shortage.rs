//! A shortage: faults that wait for memory, because nothing that is in memory can leave it.
//!
//! It ends by itself when the store takes writes again, when a pin ends, or when the kernel has memory. Until then
//! nothing is lost, and nothing goes on. So whoever can mend it is told soon, and not only when a block is given
//! up: a line on stderr says which store refuses and how long touches will wait.
//!
//! Locks: the table of one region at a time, by itself.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::body::Body;
use crate::engine::Engine;

/// How long a fault waits for memory before its block is given up, beside the region's `retry_for`.
pub(crate) const NO_ROOM_FOR: Duration = Duration::from_secs(60);

/// A fault has waited for so long when its region's shortage is told.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// One region's shortage is told so often, milliseconds.
const TOLD_EVERY: u32 = 60_000;

/// When a region's shortage was told, milliseconds of the engine; 0 says never.
#[derive(Debug, Default)]
pub(crate) struct Told(AtomicU32);

impl Told {
    /// True if it is time to tell.
    fn due(&self, now: u32) -> bool {
        let last = self.0.load(Ordering::Relaxed);
        (last == 0 || now.wrapping_sub(last) >= TOLD_EVERY)
            && self
                .0
                .compare_exchange(last, now.max(1), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

impl Engine {
    /// The error of a block that found no room for too long.
    pub(crate) fn why_no_room(&self, body: &Arc<Body>, refused: Option<io::Error>) -> io::Error {
        let cause = match (self.refusal(body, |_| true), refused) {
            (Some(error), _) => format!("what is in memory cannot be written back: {error}"),
            (None, Some(error)) => format!("the kernel has none: {error}"),
            (None, None) => "everything in memory is pinned".to_owned(),
        };
        io::Error::other(format!("no memory: {cause}"))
    }

    /// Says on stderr that a touch has waited for room for a while, if that is because a store refuses what
    /// would have to leave.
    pub(crate) fn tell_of_shortage(&self, body: &Arc<Body>, waited: Duration) {
        let now = self.now_ms();
        if waited < TOLD_AFTER {
            return;
        }
        if let Some(error) = self.refusal(body, |body| body.refuses_writes(now))
            && body.shortage_told.due(now)
        {
            crate::say::line(&format!(
                "userfault: {}: touches wait for memory, for {} s and then end with SIGBUS: {error}. Nothing is \
                 lost; they go on when it takes writes again",
                body.name,
                (NO_ROOM_FOR + body.retry_for).as_secs(),
            ));
        }
    }

    /// The error of a store that keeps in memory what would make room for `body`, of those that are `meant`.
    fn refusal(&self, body: &Arc<Body>, meant: impl Fn(&Body) -> bool) -> Option<String> {
        let error = |body: &Body| {
            let pending = body.lock().pending.as_ref().map(ToString::to_string);
            pending.filter(|_| meant(body))
        };
        if body.own_pool.is_some() {
            return error(body);
        }
        // All regions share the limit: what keeps the others' blocks in memory keeps this one out.
        error(body).or_else(|| self.bodies().iter().find_map(|body| error(body)))
    }
}
