//! Which region an address belongs to, as a signal handler can ask: no lock, no allocation.
//!
//! A row of places. A place is written by whoever opens or closes a region, one at a time, and read by
//! handlers. A reader counts itself in before it looks at the region, and the region is not given up before
//! the last reader is out: [`Regions::dismiss`] takes it away and waits.
//!
//! The addresses of a closed region stay known until they are unmapped. A thread that was on its way to the
//! handler when the region was closed touches again then, and gets the SIGSEGV of closed memory.
//!
//! Unsafe: turns a pointer that came out of an `Arc` into a reference, while the count keeps it alive.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::lock::Mutex;

use crate::body::Body;
use crate::error::Error;
use crate::signals;

/// Regions at most.
const PLACES: usize = 1024;

/// How long a closed region's readers are waited for. One that is still there then is in a read that does not
/// come back, and the region stays for it, for good.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
    body: AtomicPtr<Body>,
    readers: AtomicU32,
}

/// The places.
pub(super) struct Regions {
    places: [Place; PLACES],
    /// One past the last place that was ever used.
    used: AtomicUsize,
    /// Held by whoever opens or closes.
    writing: Mutex<()>,
}

impl Default for Regions {
    fn default() -> Regions {
        Regions {
            places: [const {
                Place {
                    start: AtomicUsize::new(0),
                    end: AtomicUsize::new(0),
                    body: AtomicPtr::new(ptr::null_mut()),
                    readers: AtomicU32::new(0),
                }
            }; PLACES],
            used: AtomicUsize::new(0),
            writing: Mutex::new(()),
        }
    }
}

/// What lies at an address.
pub(super) enum Found<'a> {
    /// Nothing of ours.
    Nothing,
    /// A region that is closed.
    Closed,
    /// A region, which is not given up while this lives.
    Region(Reading<'a>),
}

/// A region that a handler looks at.
pub(super) struct Reading<'a> {
    place: &'a Place,
    pub(super) body: &'a Body,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.place.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Regions {
    pub(super) fn admit(&self, body: &Arc<Body>) -> Result<(), Error> {
        let _shield = signals::shield();
        let _writing = self.writing.lock();
        let used = self.used.load(Ordering::Relaxed);
        let free = (0..PLACES).find(|index| self.places[*index].end.load(Ordering::Relaxed) == 0);
        let Some(index) = free else {
            return Err(Error::Invalid(format!(
                "{PLACES} regions with fault=\"inline\" are open; close some, or use fault=\"threads\""
            )));
        };
        let place = &self.places[index];
        let kept = Arc::into_raw(body.clone()).cast_mut();
        place.start.store(body.memory.main(), Ordering::SeqCst);
        place.body.store(kept, Ordering::SeqCst);
        place
            .end
            .store(body.memory.main() + body.memory.len(), Ordering::SeqCst);
        self.used.store(used.max(index + 1), Ordering::SeqCst);
        Ok(())
    }

    /// The region at `address`. May be called in a handler.
    pub(super) fn at(&self, address: usize) -> Found<'_> {
        for place in &self.places[..self.used.load(Ordering::SeqCst)] {
            let within = || {
                (place.start.load(Ordering::SeqCst)..place.end.load(Ordering::SeqCst))
                    .contains(&address)
            };
            if !within() {
                continue;
            }
            place.readers.fetch_add(1, Ordering::SeqCst);
            // SAFETY: the pointer came out of an `Arc` that `dismiss` gives back only when it has taken
            // the pointer away and then seen no reader; this reader was counted before it looked.
            if let Some(body) = unsafe { place.body.load(Ordering::SeqCst).as_ref() } {
                let reading = Reading { place, body };
                let main = body.memory.main();
                if (main..main + body.memory.len()).contains(&address) {
                    return Found::Region(reading);
                }
                continue;
            }
            place.readers.fetch_sub(1, Ordering::SeqCst);
            if within() {
                return Found::Closed;
            }
        }
        Found::Nothing
    }

    pub(super) fn dismiss(&self, body: &Body) {
        let kept = self.take_away(body);
        // Only now: the last one to hold a body forgets its addresses, which takes the lock again.
        drop(kept);
    }

    /// Takes a region away from its readers; what kept it alive, once there are none any more.
    fn take_away(&self, body: &Body) -> Option<Arc<Body>> {
        let _shield = signals::shield();
        let _writing = self.writing.lock();
        let place = self
            .places
            .iter()
            .find(|place| ptr::eq(place.body.load(Ordering::SeqCst), body))?;
        let kept = place.body.swap(ptr::null_mut(), Ordering::SeqCst);
        let began = Instant::now();
        while place.readers.load(Ordering::SeqCst) > 0 {
            if let Some(doors) = &body.doors {
                doors.open_all();
            }
            if began.elapsed() > PATIENCE {
                // What it kept alive stays alive.
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        // SAFETY: the pointer is the one that `admit` took out of an `Arc`, and it is given back once.
        Some(unsafe { Arc::from_raw(kept) })
    }

    pub(super) fn forget(&self, start: usize) {
        let _shield = signals::shield();
        let _writing = self.writing.lock();
        for place in &self.places {
            if place.start.load(Ordering::SeqCst) == start
                && place.body.load(Ordering::SeqCst).is_null()
                && place.readers.load(Ordering::SeqCst) == 0
            {
                // The end goes first: without one there is nothing between.
                place.end.store(0, Ordering::SeqCst);
                place.start.store(0, Ordering::SeqCst);
            }
        }
    }
}
