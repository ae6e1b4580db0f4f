//! The engine of a process: one userfaultfd, the registry of regions, and the pool of memory.
//!
//! It comes to life with the first region and lives until the process ends. A forked child makes its own.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use crate::lock::{Mutex, RwLock};
use userfault_store::Store;
use userfault_uffd::{Pagemap, Uffd};

use crate::abilities::Abilities;
use crate::body::Body;
use crate::clock::Clock;
use crate::defects::{Defect, put_back};
use crate::drain::{Drain, Next};
use crate::errand::Errands;
use crate::error::Error;
use crate::flight::{Arrivals, Flights};
use crate::fork::{self, Kept};
use crate::homeward::{AGE, Homes};
use crate::inline::{InlineSource, Touches};
use crate::limit;
use crate::pool::Pool;
use crate::room::Gate;
use crate::served::{Peers, Registry};
use crate::staging::Staging;
use crate::stats::Counters;
use crate::trace::Recorder;
use crate::workers::{Source, Workers};

/// Everything that the regions of a process share.
pub(crate) struct Engine {
    pub(crate) uffd: Uffd,
    pub(crate) abilities: Abilities,
    pub(crate) pagemap: Pagemap,
    by_address: RwLock<BTreeMap<usize, Arc<Body>>>,
    by_id: RwLock<HashMap<u32, Arc<Body>>>,
    next_id: AtomicU32,
    /// The process-wide limit.
    pub(crate) pool: Arc<Pool>,
    /// True until somebody sets a limit.
    pub(crate) auto_limit: Mutex<bool>,
    pub(crate) gate: Gate,
    pub(crate) workers: Workers,
    /// The threads of the second fault source: memory that is saved before its first write.
    pub(crate) guards: Workers,
    pub(crate) tracked: crate::tracked::Registry,
    /// The threads of the third fault source: the memory of other processes.
    pub(crate) servers: Workers,
    pub(crate) peers: Registry,
    /// The threads that answer what touching threads leave to others.
    pub(crate) touches: Workers,
    pub(crate) inline_source: InlineSource,
    /// The threads that put in place what was read in flight.
    pub(crate) arrivals: Workers,
    pub(crate) flights: Flights,
    pub(crate) clock: Clock,
    pub(crate) drain: Drain,
    /// The number of the regions' homes among its targets.
    pub(crate) homes: OnceLock<u64>,
    pub(crate) errands: Errands,
    pub(crate) staging: Staging,
    /// Counts of regions that are gone.
    pub(crate) past: Counters,
    hung: AtomicUsize,
    /// The locks of stores that take one read at a time, by the address of the store.
    read_turns: Mutex<HashMap<usize, Weak<Mutex<()>>>>,
    /// The debug option: clean blocks are hashed.
    pub(crate) hashing: bool,
    /// The recording of faults, if the environment asks for one.
    pub(crate) recorder: Option<Recorder>,
    pub(crate) tickets: AtomicU64,
    epoch: Instant,
}

static CURRENT: AtomicPtr<Engine> = AtomicPtr::new(std::ptr::null_mut());
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// Serialises the making of an engine. One for each of a few generations: a lock that another thread held
/// at a fork stays locked in the child, which therefore uses the next one.
static MAKING: [Mutex<()>; 64] = [const { Mutex::new(()) }; 64];

impl Engine {
    /// The engine of this process, if there is one.
    pub(crate) fn existing() -> Option<&'static Engine> {
        if GENERATION.load(Ordering::Acquire) != fork::generation() {
            return None;
        }
        crate::leak::get(&CURRENT)
    }

    /// The engine of this process.
    pub(crate) fn current() -> Result<&'static Engine, Error> {
        if let Some(engine) = Engine::existing() {
            return Ok(engine);
        }
        let _making = MAKING[fork::generation() as usize % MAKING.len()].lock();
        if let Some(engine) = Engine::existing() {
            return Ok(engine);
        }
        let engine = Engine::new()?;
        fork::keep(&[
            Kept::Descriptor(engine.uffd.as_raw_fd()),
            Kept::Descriptor(engine.pagemap.as_raw_fd()),
        ]);
        let engine = crate::leak::publish(&CURRENT, engine);
        engine.homes.get_or_init(|| {
            let homes = Arc::new(Homes::of(engine));
            engine.drain.add(homes, Next::In(AGE))
        });
        GENERATION.store(fork::generation(), Ordering::Release);
        if !(engine.workers.start(engine)
            && engine.clock.start(engine)
            && engine.drain.start(engine)
            && engine.recorder.as_ref().is_none_or(Recorder::start))
        {
            return Err(Error::last_os(
                "starting the engine's threads",
                "see ulimit -u and the pids cgroup",
            ));
        }
        Ok(engine)
    }

    fn new() -> Result<Engine, Error> {
        let (uffd, abilities) = Abilities::open()?;
        let pagemap = Pagemap::own().map_err(|_| {
            Error::last_os(
                "opening /proc/self/pagemap",
                "mount /proc in this container",
            )
        })?;
        Ok(Engine {
            uffd,
            abilities,
            pagemap,
            by_address: RwLock::default(),
            by_id: RwLock::default(),
            next_id: AtomicU32::new(1),
            pool: Arc::new(Pool::new(limit::auto())),
            auto_limit: Mutex::new(true),
            gate: Gate::new(),
            workers: Workers::of(&Source::Paging),
            guards: Workers::of(&Source::Guard),
            servers: Workers::of(&Peers),
            peers: Registry::default(),
            tracked: crate::tracked::Registry::default(),
            touches: Workers::of(&Touches),
            inline_source: InlineSource::default(),
            arrivals: Workers::of(&Arrivals),
            flights: Flights::new(),
            clock: Clock::default(),
            drain: Drain::default(),
            homes: OnceLock::new(),
            errands: Errands::default(),
            staging: Staging::default(),
            past: Counters::new(),
            hung: AtomicUsize::new(0),
            read_turns: Mutex::default(),
            hashing: crate::watch::asked_for(),
            recorder: Recorder::asked_for(),
            tickets: AtomicU64::new(1),
            epoch: Instant::now(),
        })
    }

    pub(crate) fn next_id(&self) -> u32 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Milliseconds since the engine came to life; the clock of seats and turns.
    pub(crate) fn now_ms(&self) -> u32 {
        self.ms_at(Instant::now())
    }

    /// The same for a moment that was now a little earlier.
    pub(crate) fn ms_at(&self, moment: Instant) -> u32 {
        moment.duration_since(self.epoch).as_millis() as u32
    }

    /// The body whose memory holds `address`.
    pub(crate) fn at(&self, address: usize) -> Option<Arc<Body>> {
        let regions = self.by_address.read();
        let (_, body) = regions.range(..=address).next_back()?;
        (address < body.memory.main() + body.memory.len()).then(|| body.clone())
    }

    pub(crate) fn by_id(&self, id: u32) -> Option<Arc<Body>> {
        self.by_id.read().get(&id).cloned()
    }

    pub(crate) fn bodies(&self) -> Vec<Arc<Body>> {
        self.by_id.read().values().cloned().collect()
    }

    pub(crate) fn admit(&self, body: &Arc<Body>) {
        self.by_id.write().insert(body.id, body.clone());
        self.by_address
            .write()
            .insert(body.memory.main(), body.clone());
    }

    pub(crate) fn dismiss(&self, body: &Body) {
        if put_back(Defect::UserfaultfdForEach) {
            crate::defects::close_the_one_of(body.id);
        }
        self.by_address.write().remove(&body.memory.main());
        self.by_id.write().remove(&body.id);
        self.past.absorb(&body.counters);
    }

    /// The lock that a store's reads take, if it cannot do several at once.
    pub(crate) fn read_turn(&self, store: &Arc<dyn Store>) -> Option<Arc<Mutex<()>>> {
        if store.concurrent_reads() {
            return None;
        }
        let mut turns = self.read_turns.lock();
        turns.retain(|_, turn| turn.strong_count() > 0);
        let place = turns.entry(Arc::as_ptr(store).addr()).or_default();
        Some(place.upgrade().unwrap_or_else(|| {
            let turn = Arc::new(Mutex::new(()));
            *place = Arc::downgrade(&turn);
            turn
        }))
    }

    /// Threads that a store does not let go of.
    pub(crate) fn hung(&self) -> usize {
        self.hung.load(Ordering::Relaxed)
    }

    pub(crate) fn note_hung(&self, more: bool) {
        if more {
            self.hung.fetch_add(1, Ordering::Relaxed);
        } else {
            self.hung.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
