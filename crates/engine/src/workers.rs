//! The fault loop: threads that answer faults, one of which reads messages.
//!
//! Exactly one thread, the leader, sleeps in read(2) on the userfaultfd. It answers what it read itself,
//! without a hop to another thread, as long as that needs no waiting. Before it waits (for a store, for
//! a write-back) it hands the lead, and the messages it has not answered yet, to another thread. So a
//! fault that is answered from the page cache costs no wake-up, and a slow store stops nobody else. A read that the
//! kernel can do by itself is not waited for at all (see `flight`): the leader gives all that a batch of messages
//! needs to the kernel at once, and stays the leader.
//!
//! All signals are blocked in these threads, and they live until the process ends. They never touch
//! memory that they serve.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use crate::lock::{Condvar, Mutex};
use userfault_uffd::abi::{
    UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE,
};
use userfault_uffd::{Message, MessageBuffer};

use crate::block::Fault;
use crate::body::Body;
use crate::clock::Watch;
use crate::engine::Engine;
use crate::fill::Filling;
use crate::flight::Departing;
use crate::inline::{Left, Request};
use crate::readahead::Window;
use crate::signals;
use crate::threads;

/// Threads at most, beside those that a hung store holds.
const MOST_THREADS: usize = 256;

/// How long a leader may take to give reads to the kernel, milliseconds.
const LONGEST_ABSENCE_MS: u32 = 20;

/// Messages read at once.
pub(crate) const BATCH: usize = 16;

/// A thread that sleeps on a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Touch {
    pub(crate) address: usize,
    pub(crate) fault: Fault,
    /// It is going to write.
    pub(crate) write: bool,
    /// The sleeper's thread id.
    pub(crate) thread: u32,
    /// The served process whose memory it is (see `served`); 0 is this one.
    pub(crate) process: u32,
    /// When the message was read.
    pub(crate) read: Instant,
    /// The toucher has noted its walk already.
    pub(crate) noted: bool,
}

impl Touch {
    /// A message that is a fault. Own regions ask for no events, so there every message is one.
    pub(crate) fn from_message(message: &Message, process: u32, read: Instant) -> Option<Touch> {
        let Message::Pagefault {
            flags,
            address,
            ptid,
        } = *message
        else {
            return None;
        };
        let fault = if flags & UFFD_PAGEFAULT_FLAG_WP != 0 {
            Fault::WriteProtect
        } else if flags & UFFD_PAGEFAULT_FLAG_MINOR != 0 {
            Fault::Minor
        } else {
            Fault::Missing
        };
        Some(Touch {
            address,
            fault,
            write: flags & UFFD_PAGEFAULT_FLAG_WRITE != 0,
            thread: ptid,
            process,
            read,
            noted: false,
        })
    }

    /// What a handler of SIGBUS left to others. It does not know what the fault is called; a page that the
    /// program threw away is brought back the same way whatever its name.
    pub(crate) fn from_request(request: &Request, read: Instant) -> Touch {
        Touch {
            address: request.address,
            fault: Fault::Missing,
            thread: request.thread,
            process: 0,
            read,
            write: false,
            noted: request.is_noted(),
        }
    }
}

/// Something for a thread to do.
pub(crate) enum Task {
    /// Answer a fault that the leader had no time for.
    Touch(Touch),
    /// Go on with a fill that waited, or begin one that was asked for.
    Fill(Filling),
    /// Bring in what a walk will touch next.
    Ahead(Arc<Body>, Window),
    /// Bring in everything from a block on, a window at a time.
    Push(Arc<Body>, u32),
    /// A read in flight has arrived: its place, and the bytes read or an error number below 0.
    Land(u64, i64),
    /// End a fill that a handler had to leave.
    Halfway(Left),
}

#[derive(Default)]
struct State {
    leader: bool,
    idle: usize,
    threads: usize,
    queue: VecDeque<Task>,
}

/// Where faults come from.
pub(crate) trait FaultSource: Sync {
    /// Sleeps until there is something, does with it what is nobody's fault, and appends what is to be done.
    /// Only the leader calls this.
    fn next(&self, engine: &'static Engine, tasks: &mut VecDeque<Task>);
}

/// The memory of this process: one userfaultfd, and nothing but faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Regions, and memory whose writes the kernel notes by itself.
    Paging,
    /// Huge pages that are saved before their first write.
    Guard,
}

impl FaultSource for Source {
    fn next(&self, engine: &'static Engine, tasks: &mut VecDeque<Task>) {
        let uffd = match self {
            Source::Paging => &engine.uffd,
            Source::Guard => engine.tracked.guard().expect("served once it is open"),
        };
        let mut buffer = MessageBuffer::<BATCH>::new();
        let messages = match uffd.read_messages(&mut buffer) {
            Ok(messages) => messages,
            // A message is never lost by these two; anything else cannot happen on a blocking
            // descriptor that is open and a buffer that is there.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                return;
            }
            Err(error) => panic!("reading the userfaultfd: {error}"),
        };
        let read = Instant::now();
        let touch = |message: Message| Touch::from_message(&message, 0, read).map(Task::Touch);
        tasks.extend(messages.filter_map(touch));
    }
}

/// The threads of the fault loop for one source.
pub(crate) struct Workers {
    source: &'static dyn FaultSource,
    state: Mutex<State>,
    work: Condvar,
    away: Away,
    /// Who leads, or did last: its thread id, 0 before there was one.
    leader: AtomicI32,
}

/// Since when the leader is with the kernel, giving reads to it, which should take no time. One that does not come
/// back is relieved of the lead: whoever ends its absence first, the leader or the clock, decides.
#[derive(Debug, Default)]
struct Away {
    /// 0, or a number of this absence and its beginning in milliseconds of the engine.
    word: AtomicU64,
    absences: AtomicU32,
}

impl Away {
    /// The leader goes.
    fn begin(&self, now: u32) -> u64 {
        let number = self.absences.fetch_add(1, Ordering::Relaxed) | 1;
        let absence = u64::from(number) << 32 | u64::from(now);
        self.word.store(absence, Ordering::SeqCst);
        absence
    }

    /// The leader is back. False: somebody else leads by now.
    fn end(&self, absence: u64) -> bool {
        self.word
            .compare_exchange(absence, 0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// True, once, if the leader has been away for too long.
    fn is_too_long(&self, now: u32) -> bool {
        let absence = self.word.load(Ordering::SeqCst);
        absence != 0 && now.wrapping_sub(absence as u32) > LONGEST_ABSENCE_MS && self.end(absence)
    }
}

/// The lead, as long as it is held.
pub(crate) struct Lead {
    /// Whose lead it is: each fault source has one.
    workers: &'static Workers,
    engine: &'static Engine,
    held: bool,
    unanswered: VecDeque<Task>,
    /// Reads that the kernel is given at the end of the batch.
    departing: Vec<Departing>,
    /// The fill for which this thread makes room, and its deadline.
    pub(crate) on_behalf: Option<(Arc<Body>, u32, Instant)>,
    /// The deadline passed during a write: the fill's block is not ours any more.
    pub(crate) too_late: bool,
}

impl Lead {
    /// Begins a write to make room: whoever waits for the room has a deadline.
    pub(crate) fn watch_write(&self) -> Option<Watch> {
        let (body, block, deadline) = self.on_behalf.as_ref()?;
        Some(
            self.engine
                .clock
                .watch(self.engine, body, *block, *deadline),
        )
    }

    /// Ends what [`Lead::watch_write`] began.
    pub(crate) fn write_ended(&mut self, watch: Option<Watch>) {
        if let (Some(watch), Some((body, ..))) = (watch, &self.on_behalf)
            && !watch.end(body)
        {
            self.too_late = true;
            self.on_behalf = None;
        }
    }

    /// A thread that has no lead to give up.
    pub(crate) fn none(engine: &'static Engine) -> Lead {
        Workers::without_lead(engine)
    }

    /// True if this thread reads messages: it should not wait.
    pub(crate) fn held(&self) -> bool {
        self.held
    }

    /// Has a read given to the kernel with the rest of its batch.
    pub(crate) fn departs(&mut self, departing: Departing) {
        self.departing.push(departing);
        if !self.held {
            self.engine.submit_departing(&mut self.departing);
        }
    }

    /// The batch has been looked through.
    fn submit_departing(&mut self) {
        if self.departing.is_empty() {
            return;
        }
        let away = &self.workers.away;
        let absence = self.held.then(|| away.begin(self.engine.now_ms()));
        self.engine.submit_departing(&mut self.departing);
        if let Some(absence) = absence {
            self.held = away.end(absence);
        }
    }

    /// To be called before anything that may wait.
    pub(crate) fn give_up(&mut self) {
        self.pass_on();
        // By now somebody else reads messages: giving reads to the kernel may take what it takes.
        if !self.departing.is_empty() {
            self.engine.submit_departing(&mut self.departing);
        }
    }

    fn pass_on(&mut self) {
        let workers = self.workers;
        let mut state = workers.state.lock();
        if !self.held {
            // One thread was called when the lead was given up, for all that waited then. If this is that
            // thread, it must not keep the rest waiting, nor the lead vacant.
            if !state.leader || !state.queue.is_empty() {
                workers.call(self.engine, state);
            }
            return;
        }
        self.held = false;
        state.leader = false;
        state.queue.extend(self.unanswered.drain(..));
        workers.call(self.engine, state);
    }
}

impl Workers {
    pub(crate) fn of(source: &'static dyn FaultSource) -> Workers {
        Workers {
            source,
            state: Mutex::default(),
            work: Condvar::default(),
            away: Away::default(),
            leader: AtomicI32::new(0),
        }
    }

    /// The thread that reads messages, or did last.
    pub(crate) fn leader(&self) -> Option<libc::pid_t> {
        match self.leader.load(Ordering::Relaxed) {
            0 => None,
            thread => Some(thread),
        }
    }

    /// Takes the lead from a leader who does not come back from giving reads to the kernel.
    pub(crate) fn relieve(&'static self, engine: &'static Engine) {
        if self.away.is_too_long(engine.now_ms()) {
            let mut state = self.state.lock();
            state.leader = false;
            self.call(engine, state);
        }
    }

    fn without_lead(engine: &'static Engine) -> Lead {
        Lead {
            workers: &engine.workers,
            engine,
            held: false,
            unanswered: VecDeque::new(),
            departing: Vec::new(),
            on_behalf: None,
            too_late: false,
        }
    }

    /// Gets one more thread to look at the state.
    fn call(&'static self, engine: &'static Engine, mut state: crate::lock::MutexGuard<'_, State>) {
        if state.idle > 0 {
            drop(state);
            self.work.notify_one();
        } else if state.threads < MOST_THREADS + engine.hung() {
            state.threads += 1;
            drop(state);
            if !self.spawn(engine) {
                self.state.lock().threads -= 1;
            }
        }
    }

    /// Begins to serve.
    pub(crate) fn start(&'static self, engine: &'static Engine) -> bool {
        self.state.lock().threads += 1;
        self.spawn(engine)
    }

    /// Gives a task to the next free thread.
    pub(crate) fn submit(&'static self, engine: &'static Engine, task: Task) {
        let _shield = signals::shield();
        let mut state = self.state.lock();
        state.queue.push_back(task);
        self.call(engine, state);
    }

    fn spawn(&'static self, engine: &'static Engine) -> bool {
        threads::start("userfault", 256 << 10, move || self.run(engine))
    }

    fn run(&'static self, engine: &'static Engine) {
        let thread = threads::id();
        let mut lead = Lead {
            workers: self,
            ..Lead::none(engine)
        };
        loop {
            if !lead.held {
                let mut state = self.state.lock();
                loop {
                    if let Some(task) = state.queue.pop_front() {
                        drop(state);
                        let mut none = Lead {
                            workers: self,
                            ..Lead::none(engine)
                        };
                        engine.perform(task, &mut none);
                        state = self.state.lock();
                    } else if !state.leader {
                        state.leader = true;
                        lead.held = true;
                        self.leader.store(thread, Ordering::Relaxed);
                        break;
                    } else {
                        state.idle += 1;
                        self.work.wait(&mut state);
                        state.idle -= 1;
                    }
                }
            }
            self.source.next(engine, &mut lead.unanswered);
            while let Some(task) = lead.unanswered.pop_front() {
                engine.perform(task, &mut lead);
            }
            lead.submit_departing();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_that_stays_away_is_relieved_once_and_finds_out() {
        let away = Away::default();
        assert!(!away.is_too_long(1000), "nobody is away");
        let short = away.begin(1000);
        assert!(!away.is_too_long(1000 + LONGEST_ABSENCE_MS));
        assert!(away.end(short), "back in time");
        let long = away.begin(2000);
        assert!(away.is_too_long(2001 + LONGEST_ABSENCE_MS));
        assert!(!away.is_too_long(2002 + LONGEST_ABSENCE_MS), "once");
        let next = away.begin(2000);
        assert!(!away.end(long), "somebody else leads");
        assert!(away.end(next), "and is not disturbed by that");
    }
}
