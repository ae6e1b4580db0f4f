//! Recording faults, for `userfault trace` and the simulator in `sim/`, whose `trace.rs` describes the format.
//!
//! With USERFAULT_TRACE=FILE in the environment the engine writes what it hears to that file: faults by time,
//! thread, region, block and kind. Hits it does not hear of. USERFAULT_TRACE_LIMIT=BYTES holds each region to that
//! limit meanwhile, so that more touches are faults. A second process of the same program, and a forked child,
//! write to FILE.PID.
//!
//! [`Recorder::note`] is called while a fault is open, also in a handler of SIGBUS: it takes no lock, allocates nothing and never waits. It
//! puts three words into a ring; a thread writes them out every [`PAUSE`]. When the ring is full, events are
//! counted and lost.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::lock::Mutex;

use crate::body::Body;
use crate::engine::Engine;
use crate::{say, threads};

/// Events that the ring holds.
const RING: usize = 1 << 16;

/// The longest that an event stays in the ring.
const PAUSE: Duration = Duration::from_millis(10);

/// What happened to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It was touched and absent.
    Missing = b'm' as isize,
    /// It was touched and rested.
    Rested = b'r' as isize,
    /// A protected page of it was written.
    Write = b'w' as isize,
    /// It was brought in, and nobody had touched it.
    Ahead = b'a' as isize,
}

/// One event. `turn` is its number plus one once its words are whole.
#[derive(Debug, Default)]
struct Slot {
    turn: AtomicU64,
    time: AtomicU64,
    thread_and_kind: AtomicU64,
    seat: AtomicU64,
}

#[derive(Debug)]
struct Sink {
    file: Option<BufWriter<File>>,
    path: PathBuf,
    lost: u64,
}

/// The recording of an engine.
#[derive(Debug)]
pub(crate) struct Recorder {
    began: Instant,
    ring: Box<[Slot]>,
    /// Events noted so far, and of these, events written.
    noted: AtomicU64,
    written: AtomicU64,
    lost: AtomicU64,
    /// Lines about regions that are still to be written.
    regions: Mutex<Vec<String>>,
    sink: Mutex<Sink>,
}

/// The limit that the environment sets for recordings, bytes.
pub(crate) fn limit() -> Option<u64> {
    std::env::var_os("USERFAULT_TRACE")?;
    std::env::var("USERFAULT_TRACE_LIMIT").ok()?.parse().ok()
}

impl Recorder {
    /// A recorder, if the environment asks for one and its file can be made.
    pub(crate) fn asked_for() -> Option<Recorder> {
        let path = PathBuf::from(std::env::var_os("USERFAULT_TRACE")?);
        match Recorder::new(path.clone()) {
            Ok(recorder) => Some(recorder),
            Err(error) => {
                say::line(&format!(
                    "userfault: nothing is recorded, {} cannot be made: {error}",
                    path.display()
                ));
                None
            }
        }
    }

    fn new(path: PathBuf) -> std::io::Result<Recorder> {
        let mut own = path.clone().into_os_string();
        own.push(format!(".{}", std::process::id()));
        let (file, path) = match File::create_new(&path) {
            Ok(file) => (file, path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                (File::create(&own)?, own.into())
            }
            Err(error) => return Err(error),
        };
        let mut file = BufWriter::new(file);
        file.write_all(b"userfault-trace 1\n")?;
        Ok(Recorder {
            began: Instant::now(),
            ring: (0..RING).map(|_| Slot::default()).collect(),
            noted: AtomicU64::new(0),
            written: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            regions: Mutex::default(),
            sink: Mutex::new(Sink {
                file: Some(file),
                path,
                lost: 0,
            }),
        })
    }

    /// Begins to write. False if the system has no thread left.
    pub(crate) fn start(&'static self) -> bool {
        threads::start("userfault-trace", 256 << 10, move || {
            loop {
                std::thread::sleep(PAUSE);
                self.write_out();
            }
        })
    }

    /// A region is opened: its line comes before its events.
    pub(crate) fn admit(&self, body: &Body, limit: u64) {
        self.regions.lock().push(format!(
            "region {} {} {} {limit} {}\n",
            body.id,
            body.block,
            body.all_blocks(),
            body.name.replace('\n', " ")
        ));
    }

    /// Notes an event.
    pub(crate) fn note(&self, kind: Kind, body: &Body, block: u32, thread: u32) {
        let mut number = self.noted.load(Ordering::Relaxed);
        loop {
            if number - self.written.load(Ordering::Acquire) >= RING as u64 {
                self.lost.fetch_add(1, Ordering::Relaxed);
                return;
            }
            match self.noted.compare_exchange_weak(
                number,
                number + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(now) => number = now,
            }
        }
        let slot = &self.ring[number as usize % RING];
        let time = self.began.elapsed().as_nanos() as u64;
        slot.time.store(time, Ordering::Relaxed);
        slot.thread_and_kind
            .store(u64::from(thread) << 8 | kind as u64, Ordering::Relaxed);
        slot.seat.store(
            u64::from(body.id) << 32 | u64::from(block),
            Ordering::Relaxed,
        );
        slot.turn.store(number + 1, Ordering::Release);
    }

    /// Writes what has been noted.
    pub(crate) fn write_out(&self) {
        let mut sink = self.sink.lock();
        // The end is taken before the regions are, so that no event overtakes the line of its region.
        let end = self.noted.load(Ordering::Acquire);
        let regions = std::mem::take(&mut *self.regions.lock());
        let sink = &mut *sink;
        let Some(file) = &mut sink.file else {
            // Nobody writes any more: what is noted goes nowhere.
            self.written.store(end, Ordering::Release);
            return;
        };
        let write = || -> std::io::Result<()> {
            for line in regions {
                file.write_all(line.as_bytes())?;
            }
            for number in self.written.load(Ordering::Relaxed)..end {
                let slot = &self.ring[number as usize % RING];
                if slot.turn.load(Ordering::Acquire) != number + 1 {
                    // Its thread is between the two stores.
                    break;
                }
                let thread_and_kind = slot.thread_and_kind.load(Ordering::Relaxed);
                let seat = slot.seat.load(Ordering::Relaxed);
                writeln!(
                    file,
                    "{} {} {} {} {}",
                    slot.time.load(Ordering::Relaxed),
                    thread_and_kind >> 8,
                    seat >> 32,
                    seat as u32,
                    char::from(thread_and_kind as u8)
                )?;
                self.written.store(number + 1, Ordering::Release);
            }
            let lost = self.lost.load(Ordering::Relaxed);
            if lost > sink.lost {
                writeln!(file, "lost {}", lost - sink.lost)?;
                sink.lost = lost;
            }
            file.flush()
        };
        if let Err(error) = write() {
            say::line(&format!(
                "userfault: the recording ends here, {} cannot be written: {error}",
                sink.path.display()
            ));
            sink.file = None;
        }
    }
}

impl Engine {
    /// Notes an event, if a recording is under way.
    pub(crate) fn trace(&self, kind: Kind, body: &Body, block: u32, thread: u32) {
        if let Some(recorder) = &self.recorder {
            recorder.note(kind, body, block, thread);
        }
    }
}

/// Writes out what has been recorded so far; for the end of a process.
pub fn write_out() {
    if let Some(recorder) = Engine::existing().and_then(|engine| engine.recorder.as_ref()) {
        recorder.write_out();
    }
}
