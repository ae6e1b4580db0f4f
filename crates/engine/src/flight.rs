//! Reads in flight: one thread asks, another one puts in place, and none waits for a disk.
//!
//! A fault whose block is on a disk used to cost a hand-over: the thread that read its message had to wait for the
//! disk, and called another one to read the next message. With many touching threads that was most of a fault's
//! time. So where a store has a descriptor to read from (see [`Store::direct`](userfault_store::Store::direct)), the leader gives the read to the
//! kernel and goes on with the next message. The threads of [`Arrivals`], one more source of the fault loop,
//! take what has arrived and put it in place.
//!
//! ```text
//!   leader     message, claim, room, buffer --> departing --(at the end of the batch)--> in the air
//!   arrivals                                        copied into place, released <-- landed, whole
//!                                              read in the ordinary way <-- landed, anything else
//! ```
//!
//! What is in the page cache is read at once by the leader, as ever. Whatever else a read needs is the ordinary
//! way's: a file system that cannot begin a read without waiting (EAGAIN, EOPNOTSUPP), an error, a file that has
//! become shorter, a machine where these calls are forbidden.
//!
//! # Promises
//! * A flight has its fill's deadline, and the clock watches it as it watches a thread's read. The buffer and the
//!   store of a read that does not come back are kept until it does; it takes a place, never a thread.
//! * A store that hangs leaves others their places, or the ordinary way when all are taken. One region's fills in
//!   flight are not counted with those that threads wait for, but all of them together are bounded.
//! * Orders are given without the lead where anything may wait. Where nothing should, a leader who does not come
//!   back from giving them is relieved by the clock: see [`Away`](crate::workers::Away).
//!
//! Locks: a place and the list of free ones are leaves.
//!
//! Unsafe: hands buffers to the kernel. They belong to their flight, which stays in its place until it has landed.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use crate::admission::MOST_FILLS;
use crate::aio::{self, Aio, Arrival, Order};
use crate::clock::{Slot, Watch};
use crate::engine::Engine;
use crate::fill::{Filling, Tried};
use crate::lock::Mutex;
use crate::memory::Kind;
use crate::staging::{self, Lent};
use crate::stats::add;
use crate::workers::{FaultSource, Lead, Task};

/// Reads in the air at once.
const PLACES: usize = 256;

/// Fills of one region at once, in the air or not: others have places left, whatever its store does. More than the
/// threads that usually touch one: who has to wait here is read by a thread that waits for the disk. With 128 touching
/// threads and a cold file 192 instead of 96 made 1.62 times as many random reads, with 0.6 of the processor time.
const MOST_OF_ONE: usize = 192;

/// Their bytes, beyond as many fills as threads may wait for: each has a buffer, which counts against the limit.
const BYTES_OF_ONE: usize = 8 << 20;

/// Arrivals taken at once. The rest is left to others: what lands is put in place one after the other.
const TAKEN: usize = 8;

/// A read under way.
struct Flight {
    filling: Filling,
    buffer: Lent<'static>,
    watch: Watch,
}

#[derive(Default)]
struct Place {
    flight: Mutex<Option<Flight>>,
    slot: OnceLock<Slot>,
}

/// The reads in flight of an engine.
pub(crate) struct Flights {
    /// `None` once it is known that the machine has none.
    aio: OnceLock<Option<Aio>>,
    places: [Place; PLACES],
    free: Mutex<Vec<u16>>,
}

/// A read that is about to be given to the kernel.
pub(crate) struct Departing {
    place: u16,
    order: Order,
}

impl Flights {
    pub(crate) fn new() -> Flights {
        Flights {
            aio: OnceLock::new(),
            places: std::array::from_fn(|_| Place::default()),
            free: Mutex::new((0..PLACES as u16).rev().collect()),
        }
    }

    /// Empties the place of a read that has arrived, or never left. False: too late, the clock has given its block
    /// up.
    fn clear(&self, place: u64) -> (Filling, Lent<'static>, bool) {
        let flight = self.places[place as usize].flight.lock().take();
        let Flight {
            filling,
            buffer,
            watch,
        } = flight.expect("a place is in use until its read has arrived, once");
        let in_time = watch.end(&filling.body);
        // Only now: the watch is the place's.
        self.free.lock().push(place as u16);
        (filling, buffer, in_time)
    }
}

/// Fills of one region at once, by the size of its blocks.
pub(crate) fn most_of_one(block: usize) -> usize {
    (BYTES_OF_ONE / block).clamp(MOST_FILLS, MOST_OF_ONE)
}

impl Engine {
    /// The way to read in flight, if the machine has one.
    fn aio(&'static self) -> Option<&'static Aio> {
        self.flights
            .aio
            .get_or_init(|| {
                if !self.abilities.aio {
                    return None;
                }
                // Where it is forbidden, or too many are in use on the machine.
                let aio = Aio::new(PLACES).ok()?;
                self.arrivals.start(self).then_some(aio)
            })
            .as_ref()
    }

    /// Begins the read of a fill without waiting for it. Gives the fill back if its block has to be read in the
    /// ordinary way.
    pub(crate) fn depart(&'static self, filling: Filling, lead: &mut Lead) -> Result<(), Filling> {
        let (body, block) = (&filling.body, filling.block);
        let (start, len) = (body.start(block), body.block_len(block));
        let elsewhere = body.memory.kind() == Kind::Elsewhere;
        if !lead.held() || elsewhere || !body.by_copy() || body.grounded() {
            return Err(filling);
        }
        let offset = body.store_offset + start as u64;
        let Some((fd, offset)) = (body.stored(start, len) == len)
            .then(|| body.direct(offset, len))
            .flatten()
            .map(|(file, offset)| (file.as_raw_fd(), offset))
        else {
            return Err(filling);
        };
        if self.aio().is_none() {
            return Err(filling);
        }
        let Some(place) = self.flights.free.lock().pop() else {
            return Err(filling);
        };
        if let Err(tried) = self.room_for(&filling, lead) {
            self.flights.free.lock().push(place);
            self.end_try(filling, tried, lead);
            return Ok(());
        }
        let mut buffer = staging::lend(self, len);
        let order = Order {
            data: u64::from(place),
            fd,
            offset,
            into: (buffer.as_mut_ptr() as usize, len),
        };
        let here = &self.flights.places[usize::from(place)];
        let slot = here.slot.get_or_init(|| self.clock.slot());
        let watch = self
            .clock
            .watch_in(slot, self, (body, block), self.deadline(&filling), true);
        *here.flight.lock() = Some(Flight {
            filling,
            buffer,
            watch,
        });
        lead.departs(Departing { place, order });
        Ok(())
    }

    /// Gives what is about to depart to the kernel. What it does not take is read in the ordinary way.
    pub(crate) fn submit_departing(&'static self, departing: &mut Vec<Departing>) {
        let Some(aio) = self.aio() else {
            return;
        };
        crate::defects::submission_hangs();
        while !departing.is_empty() {
            let mut orders = [departing[0].order; aio::BATCH];
            let count = departing.len().min(aio::BATCH);
            for (order, departing) in orders.iter_mut().zip(&*departing) {
                *order = departing.order;
            }
            // SAFETY: the buffer is in its place, and so is what keeps the descriptor open, until `land` has been
            // told of the arrival; nobody else has the place.
            let taken = unsafe { aio.submit(&orders[..count]) };
            departing.drain(..taken);
            if taken == 0 {
                let refused = u64::from(departing.remove(0).place);
                let (filling, buffer, in_time) = self.flights.clear(refused);
                drop(buffer);
                filling.body.ground();
                self.return_to_gate(filling, in_time, &mut Lead::none(self));
            }
        }
    }

    /// Ends a flight. `result` is what the kernel says: bytes, or an error number below 0.
    pub(crate) fn land(&'static self, place: u64, result: i64, lead: &mut Lead) {
        if let Some(late) = crate::defects::arrival_is_late() {
            lead.give_up();
            std::thread::sleep(late);
        }
        let (filling, buffer, in_time) = self.flights.clear(place);
        let body = &filling.body;
        if !in_time || result != buffer.len() as i64 {
            let unable = [libc::EOPNOTSUPP, libc::EINVAL].map(|errno| -i64::from(errno));
            if unable.contains(&result) {
                body.ground();
            }
            drop(buffer);
            return self.return_to_gate(filling, in_time, lead);
        }
        add(&body.counters.bytes_read, result as u64);
        self.note_content(body, filling.block, &buffer);
        let tried = self.put_in_place(&filling, &buffer, lead);
        drop(buffer);
        self.settle(&filling, &tried);
        self.end_try(filling, tried, lead);
    }

    /// Has the block of a flight that came to nothing read in the ordinary way, by a thread that may wait; or if it
    /// has been given up meanwhile, ends it.
    fn return_to_gate(&'static self, filling: Filling, in_time: bool, lead: &mut Lead) {
        let body = filling.body.clone();
        if !in_time {
            self.came_back(&body, filling.block);
            self.settle(&filling, &Tried::Abandoned);
            return self.end_try(filling, Tried::Abandoned, lead);
        }
        self.give_back(&body, body.block_len(filling.block) as u64);
        self.fill_ended(&body, &mut body.lock());
        self.workers.submit(self, Task::Fill(filling));
    }
}

/// Where reads land.
pub(crate) struct Arrivals;

impl FaultSource for Arrivals {
    fn next(&self, engine: &'static Engine, tasks: &mut VecDeque<Task>) {
        // The first of these threads is started before the context is in its place.
        let Some(Some(aio)) = engine.flights.aio.get() else {
            std::thread::sleep(std::time::Duration::from_millis(1));
            return;
        };
        let mut arrived = [Arrival::default(); TAKEN];
        let count = aio.wait(&mut arrived);
        let landed = |arrival: &Arrival| Task::Land(arrival.data, arrival.result);
        tasks.extend(arrived[..count].iter().map(landed));
    }
}
