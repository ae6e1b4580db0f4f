//! Making room: every byte of memory is asked for here before it is used.
//!
//! A region with a limit of its own asks its own pool first, then the process's. Under a cgroup's limit
//! the gate also looks at the cgroup's headroom, since the kernel kills where it could say no.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use crate::lock::Mutex;
use userfault_uffd::abi::UFFDIO_WRITEPROTECT_MODE_DONTWAKE;

use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::error::Error;
use crate::evict;
use crate::kernel::Evidence;
use crate::limit::{self, CGROUP_MARGIN, Cgroup};
use crate::memory::Kind;
use crate::policy::{Queue, Rank, Seat};
use crate::pool::{Pool, Queues, Victim};
use crate::signals;
use crate::staging;
use crate::workers::Lead;

/// A shrinking limit gives up when nothing has left memory for so long.
const NOTHING_LEAVES: Duration = Duration::from_millis(250);

/// Headroom is looked at once for so much growth, bytes.
const STRIDE: i64 = 16 << 20;

/// Entries that may be looked at in vain: stale ones, and blocks that are owned for a moment.
const NEVER_MIND: usize = 64;

/// Blocks that leave ahead of need before those are told who wait for room.
const AT_ONCE: u32 = 16;

/// Looking for somebody who leaves: what was tried in vain since the last one left.
#[derive(Debug, Default)]
struct Search {
    /// Resting blocks that could not leave, one after the other. There may be as many as memory holds.
    passed: usize,
    /// Others, and times that there was nobody at all.
    fruitless: usize,
}

/// Watches a cgroup's headroom.
pub(crate) struct Gate {
    cgroup: Option<Cgroup>,
    /// Bytes that may be used before headroom is looked at again.
    allowance: AtomicI64,
    looking: Mutex<()>,
}

impl Gate {
    pub(crate) fn new() -> Gate {
        let cgroup = Cgroup::current().filter(|cgroup| cgroup.limit().is_some());
        Gate {
            cgroup,
            allowance: AtomicI64::new(0),
            looking: Mutex::new(()),
        }
    }

    /// True if the machine leaves `bytes` more. `own` is what the engine holds already.
    fn pass(&self, bytes: u64) -> bool {
        let Some(cgroup) = &self.cgroup else {
            return true;
        };
        if self.allowance.fetch_sub(bytes as i64, Ordering::Relaxed) >= bytes as i64 {
            return true;
        }
        let _looking = self.looking.lock();
        let room =
            cgroup.headroom().unwrap_or(u64::MAX) as i64 - CGROUP_MARGIN as i64 - bytes as i64;
        if room > 0 {
            self.allowance.store(room.min(STRIDE), Ordering::Relaxed);
            return true;
        }
        self.allowance.fetch_add(bytes as i64, Ordering::Relaxed);
        false
    }

    /// As `pass`, for a handler: only what is known already.
    pub(crate) fn pass_in_handler(&self, bytes: u64) -> bool {
        if self.cgroup.is_none()
            || self.allowance.fetch_sub(bytes as i64, Ordering::Relaxed) >= bytes as i64
        {
            return true;
        }
        self.allowance.fetch_add(bytes as i64, Ordering::Relaxed);
        false
    }

    pub(crate) fn give_back(&self, bytes: u64) {
        if self.cgroup.is_some() {
            // What was given back can be taken again; more than a stride is not saved up.
            let _ =
                self.allowance
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |allowance| {
                        Some((allowance + bytes as i64).min(STRIDE))
                    });
        }
    }
}

impl Engine {
    /// Takes `bytes` for a block of `body`, or names the pool that is full.
    pub(crate) fn reserve<'a>(&'a self, body: &'a Body, bytes: u64) -> Result<(), &'a Pool> {
        let own = body.own_pool.as_deref();
        if let Some(own) = own
            && !own.reserve(bytes)
        {
            return Err(own);
        }
        let in_cgroup = body.memory.kind() != Kind::Hugetlb;
        let fits = self.pool.reserve(bytes);
        // A pool that holds next to nothing may always grow to what it needs to run.
        if fits && (!in_cgroup || self.gate.pass(bytes)) {
            return Ok(());
        }
        if fits {
            self.pool.give_back(bytes);
            self.pool.refuse(self.now_ms());
        }
        if let Some(own) = own {
            own.give_back(bytes);
        }
        Err(&self.pool)
    }

    /// True if memory is full, and holds too few blocks for every thread that touches `body` to go on for a while.
    /// `waiting` of them wait to be let in.
    ///
    /// What is full may be the region's own limit or the process's, which bounds all regions: by default it is a share
    /// of what the machine and a control group leave, and may be less than a region was allowed.
    pub(crate) fn is_short(&self, body: &Body, waiting: usize) -> bool {
        let now = self.now_ms();
        let Some(own) = body.own_pool.as_deref() else {
            return self.pool.is_full(now) && self.pool.has_few(now, waiting, None);
        };
        // Other regions' blocks leave for this one as well: all that are in memory count.
        let all = || (self.pool.figures().used / body.block as u64) as usize;
        (own.is_full(now) && own.has_few(now, waiting, None))
            || (self.pool.is_full(now) && own.has_few(now, waiting, Some(all())))
    }

    /// Takes `bytes` for memory that is never evicted; regions make room. Fails if the limit, or the
    /// control group, does not leave them.
    pub(crate) fn reserve_tracked(&'static self, bytes: u64, in_cgroup: bool) -> Result<(), Error> {
        self.errand(
            move || self.reserve_tracked_now(bytes, in_cgroup),
            move |result| {
                if result.is_ok() {
                    self.give_back_tracked(bytes, in_cgroup);
                }
            },
        )?
    }

    fn reserve_tracked_now(&'static self, bytes: u64, in_cgroup: bool) -> Result<(), Error> {
        let (mut lead, mut search) = (Lead::none(self), Search::default());
        loop {
            let fits = self.pool.reserve(bytes);
            if fits && (!in_cgroup || self.gate.pass(bytes)) {
                return Ok(());
            }
            if fits {
                self.pool.give_back(bytes);
            }
            self.one_leaves(&self.pool, 0, &mut search, &mut lead);
            if search.fruitless > NEVER_MIND {
                let figures = self.pool.figures();
                return Err(Error::Memory {
                    asked: bytes,
                    limit: figures.limit.saturating_sub(figures.used),
                    what: "tracked memory, which never leaves memory,".into(),
                });
            }
        }
    }

    /// Gives back what [`Engine::reserve_tracked`] took.
    pub(crate) fn give_back_tracked(&self, bytes: u64, in_cgroup: bool) {
        self.pool.give_back(bytes);
        if in_cgroup {
            self.gate.give_back(bytes);
        }
    }

    /// Gives back the bytes of a block.
    pub(crate) fn give_back(&self, body: &Body, bytes: u64) {
        if let Some(own) = &body.own_pool {
            own.give_back(bytes);
        }
        self.pool.give_back(bytes);
        if body.memory.kind() != Kind::Hugetlb {
            self.gate.give_back(bytes);
        }
    }

    /// Charges page tables that came into use to the pools, and gives back those that went.
    pub(crate) fn settle_tables(&self, body: &Body) {
        let spans = body.lock().settle_spans();
        self.charge_tables(body, spans);
    }

    /// Charges the page tables of so many spans, or gives them back.
    pub(crate) fn charge_tables(&self, body: &Body, spans: i64) {
        self.charge(body, spans * body.span_tables() as i64);
    }

    /// Charges bytes of page tables to the pools that pay for a region, or gives so many back.
    pub(crate) fn charge(&self, body: &Body, bytes: i64) {
        if bytes == 0 {
            return;
        }
        for pool in [body.own_pool.as_deref(), Some(&*self.pool)]
            .into_iter()
            .flatten()
        {
            if bytes > 0 {
                pool.charge(bytes.unsigned_abs())
            } else {
                pool.discharge(bytes.unsigned_abs())
            }
        }
    }

    /// True if the page tables of a region can be given back before it is closed: if the kernel frees them, and
    /// no write-protect marker need stay that nobody may lift who does not own its block.
    pub(crate) fn frees_tables(&self, body: &Body) -> bool {
        self.abilities.frees_tables && self.evidence(body) != Evidence::Table
    }

    /// Gives back the page tables of a block's span, of which nothing is in memory, and lets go of the
    /// mappings (see [`Table::hold_idle_span`](crate::table::Table::hold_idle_span)).
    ///
    /// Write-protect markers keep a table in use, so they are lifted first; then unmapping the whole span
    /// frees the table. Both are safe beside a fill that begins meanwhile: a page without its marker counts
    /// as dirty, and a page that is unmapped again faults again. Where the table knows what was written the
    /// first would lose writes: see [`Engine::frees_tables`].
    pub(crate) fn release_tables(&self, body: &Body, block: u32) {
        let (start, len) = body.span(block);
        if self.evidence(body) == Evidence::Kernel {
            let _ = self.uffd_of(body).writeprotect(
                body.memory.main() + start,
                len,
                UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
            );
        }
        if body.memory.kind() != Kind::Hugetlb {
            let _ = body.memory.zap(start, len);
            body.memory.zap_view(start, len);
        }
        self.settle_tables(body);
        let mut table = body.lock();
        table.holds -= 1;
        body.changed(&table);
    }

    /// Takes `bytes` for a block of `body`, evicting others as needed. False: not now.
    ///
    /// The caller may own blocks, but holds no lock; nothing here waits for an owned block.
    pub(crate) fn make_room(&self, body: &Body, bytes: u64, thread: u32, lead: &mut Lead) -> bool {
        let mut search = Search::default();
        loop {
            let full = match self.reserve(body, bytes) {
                Ok(()) => return true,
                Err(pool) => pool,
            };
            if self.one_leaves(full, thread, &mut search, lead).is_none() || lead.too_late {
                return false;
            }
            // Everything that could leave has been looked at and cannot: pinned, or owned.
            if search.fruitless > NEVER_MIND + full.entries() / 4 {
                return false;
            }
        }
    }

    /// As [`Engine::make_room`], for a caller who is told when a store does not come back.
    pub(crate) fn make_room_patiently(
        &'static self,
        body: &Arc<Body>,
        bytes: u64,
    ) -> Result<bool, Error> {
        if self.reserve(body, bytes).is_ok() {
            return Ok(true);
        }
        let (mine, late) = (body.clone(), body.clone());
        self.errand(
            move || self.make_room(&mine, bytes, 0, &mut Lead::none(self)),
            move |room| {
                if room {
                    self.give_back(&late, bytes);
                }
            },
        )
    }

    /// Has the next victim of `full` unmapped or released. False if that one could not leave, `None` if
    /// nobody can now.
    fn one_leaves(
        &self,
        full: &Pool,
        thread: u32,
        search: &mut Search,
        lead: &mut Lead,
    ) -> Option<bool> {
        let now = self.now_ms();
        search.passed = search.passed.max(full.stuck(now));
        let victim = self.victim_of(full, thread, search.passed);
        let left = match victim {
            Victim::NotNow => {
                search.fruitless += 1;
                return None;
            }
            Victim::Zap(seat, count) => self.with_seat(seat, |victim| {
                let left = evict::zap(self, victim, seat.block..seat.block + count);
                if left && search.passed > 0 {
                    // It rests behind all those that cannot leave: do not wait for its turn.
                    evict::release(self, victim, seat.block, lead);
                }
                left
            }),
            Victim::Release(seat) => {
                let left = self.with_seat(seat, |victim| {
                    evict::release(self, victim, seat.block, lead)
                });
                // An entry whose block came back by a touch says nothing of others.
                let stays = || {
                    self.with_seat(seat, |victim| {
                        victim.lock().state(seat.block) == State::Resting
                    })
                };
                if left {
                    if std::mem::take(&mut search.passed) > 0 {
                        full.found_stuck(0, now);
                    }
                } else if stays() {
                    search.passed += 1;
                    full.found_stuck(search.passed, now);
                    return Some(false);
                }
                left
            }
        };
        search.fruitless = if left { 0 } else { search.fruitless + 1 };
        Some(left)
    }

    /// Evicts until the pools that handlers use have some room to spare. Says so from time to time by `made`.
    pub(crate) fn make_room_ahead(&'static self, made: impl Fn()) {
        let mut lead = Lead::none(self);
        let own = self
            .bodies()
            .into_iter()
            .filter(|body| body.doors.is_some())
            .filter_map(|body| body.own_pool.clone());
        for pool in own.chain([self.pool.clone()]) {
            let (mut search, mut left) = (Search::default(), 0);
            while pool.wants_headroom() && search.fruitless < NEVER_MIND {
                match self.one_leaves(&pool, 0, &mut search, &mut lead) {
                    Some(true) => {
                        left += 1;
                        if left % AT_ONCE == 0 {
                            made();
                        }
                    }
                    Some(false) => {}
                    None => break,
                }
            }
            made();
        }
    }

    /// Makes the kernel's own room for `body`: it refused memory that the limit allows, since others take
    /// huge pages from the same pool. True if some was released; the next claim may still fail.
    pub(crate) fn make_way(&self, body: &Body, thread: u32, lead: &mut Lead) -> bool {
        let pool = self.pool_of(body);
        for _ in 0..64 + pool.entries() * 2 {
            match pool.choose(thread, self.now_ms(), 0) {
                Victim::NotNow => return false,
                Victim::Zap(seat, count) => {
                    let blocks = seat.block..seat.block + count;
                    self.with_seat(seat, |victim| evict::zap(self, victim, blocks));
                }
                Victim::Release(seat) => {
                    let ours = self.with_seat(seat, |victim| {
                        evict::release(self, victim, seat.block, lead)
                            && victim.memory.kind() == body.memory.kind()
                    });
                    if ours {
                        return true;
                    }
                }
            }
        }
        false
    }

    /// Evicts until the process is no longer over its limit, or nothing has left for a while: blocks are
    /// owned for moments, and those just mapped are kept for their threads. A store that does not come back
    /// is left behind.
    pub(crate) fn shrink(&'static self) {
        let _ = self.errand(move || self.shrink_now(), drop);
    }

    fn shrink_now(&'static self) {
        staging::shrink(self);
        let mut lead = Lead::none(self);
        let (mut progress, mut search) = (Instant::now(), Search::default());
        while self.pool.over() && progress.elapsed() < NOTHING_LEAVES {
            match self.one_leaves(&self.pool, 0, &mut search, &mut lead) {
                Some(true) => progress = Instant::now(),
                Some(false) => {}
                None => {
                    std::thread::sleep(Duration::from_millis(1));
                    search = Search::default();
                }
            }
        }
    }

    /// Who leaves `full`. When the process is full, regions with pools of their own give too.
    fn victim_of(&self, full: &Pool, thread: u32, passed: usize) -> Victim {
        match full.choose(thread, self.now_ms(), passed) {
            Victim::NotNow if std::ptr::eq(full, &*self.pool) => self
                .bodies()
                .iter()
                .filter_map(|body| body.own_pool.clone())
                .map(|pool| pool.choose(thread, self.now_ms(), passed))
                .find(|victim| *victim != Victim::NotNow)
                .unwrap_or(Victim::NotNow),
            victim => victim,
        }
    }

    fn with_seat(&self, seat: Seat, act: impl FnOnce(&Body) -> bool) -> bool {
        self.by_id(seat.region).is_some_and(|body| act(&body))
    }

    /// The pool whose queues a region's blocks are in.
    pub(crate) fn pool_of<'a>(&'a self, body: &'a Body) -> &'a Pool {
        body.own_pool.as_deref().unwrap_or(&self.pool)
    }

    /// Puts a block into its pool's queues, and sweeps out stale entries when they pile up.
    pub(crate) fn seat(&self, body: &Body, block: u32, queue: Queue) {
        self.seat_given(body, block, queue, None);
    }

    /// The same for a block that was just given to a thread.
    pub(crate) fn seat_given(&self, body: &Body, block: u32, queue: Queue, thread: Option<u32>) {
        let pool = self.pool_of(body);
        let (seat, len) = (body.seat(block), body.block_len(block));
        let queues = pool.seat(queue, seat, len, self.now_ms(), thread);
        self.sweep_stale(body, queues);
    }

    /// Sweeps stale entries out of the queues of a region's pool, when there are many more of them than blocks.
    pub(crate) fn sweep_stale(&self, body: &Body, queues: Queues) {
        let block = body.block as u64;
        if queues.entries as u64 * block > 4 * queues.limit + 64 * block {
            let mut seen = std::collections::HashSet::new();
            self.pool_of(body).sweep(|seat, queue| {
                let state = self
                    .by_id(seat.region)
                    .map(|body| body.lock().state(seat.block));
                // While a block is cleaned or written to, its state does not say whether it is mapped or rests.
                let owned = matches!(state, Some(State::Cleaning | State::Writing));
                let rests = queue == Queue::Resting;
                let fits = match state {
                    Some(State::Resting) => rests,
                    Some(State::Resident | State::Filling) => !rests,
                    _ => owned,
                };
                fits && seen.insert((seat, rests))
            });
        }
    }
}

/// Sets the limit of the process; `None` is "auto". Returns the old one. Shrinking evicts at once.
pub fn set_memory_limit(limit: Option<u64>) -> Result<u64, Error> {
    let _shield = signals::shield();
    let engine = Engine::current()?;
    if limit == Some(0) {
        return Err(Error::Invalid(
            "a memory limit of 0 bytes: at least four blocks are needed to run".into(),
        ));
    }
    let old = engine.pool.set_limit(limit.unwrap_or_else(limit::auto));
    *engine.auto_limit.lock() = limit.is_none();
    engine.shrink();
    Ok(old)
}

/// Claims a block for eviction out of `from`. One that its owner will give back to the same queue keeps a
/// place there; the entry of one that has gone elsewhere is dropped. One that is being brought in has gone
/// elsewhere too: its entry is from before, and the fill that looks for room would find itself as its only
/// victim again and again. One that is pinned gets its place back when the pin ends: a queue of pinned
/// blocks would hide that it has nobody to give, and others, which may, would not be asked.
pub(crate) fn claim_victim(engine: &Engine, body: &Body, block: u32, from: State) -> bool {
    let mut table = body.lock();
    let state = table.state(block);
    if state == from && table.claim(block, Purpose::Evict) {
        return true;
    }
    let (closed, refilling) = (table.closed, table.refilling(block));
    if state == from
        && let Some(pins) = table.pins.get_mut(&block)
    {
        pins.unseated = true;
        return false;
    }
    drop(table);
    // Evictions and fills put their block into a queue themselves at the end. An entry kept here for them
    // would name a block that is not in the queue's state any more. A refill gives back what it took.
    let stays = state == from
        || matches!(state, State::Cleaning | State::Writing)
        || (from == State::Resident && refilling);
    if !closed && stays {
        let queue = if from == State::Resting {
            Queue::Resting
        } else {
            // It is in use, whatever else is known of it.
            Queue::Mapped(Rank::Proven)
        };
        engine.seat(body, block, queue);
    }
    false
}
