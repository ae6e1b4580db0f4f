//! The fault loop: threads that answer faults, one of which reads messages.
//!
//! Exactly one thread, the leader, sleeps in read(2) on the userfaultfd. It answers what it read itself,
//! without a hop to another thread, as long as that needs no waiting. Before it waits (for a store, for
//! a write-back) it hands the lead, and the messages it has not answered yet, to another thread. So a
//! fault that is answered from the page cache costs no wake-up, and a slow store stops nobody else.
//!
//! All signals are blocked in these threads, and they live until the process ends. They never touch
//! memory that they serve.

use std::collections::VecDeque;
use std::sync::Arc;
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
use crate::inline::Request;
use crate::readahead::Window;
use crate::signals;
use crate::threads;

/// Threads at most, beside those that a hung store holds.
const MOST_THREADS: usize = 256;

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
    /// Sleeps until there is something, does with it what is nobody's fault, and appends the faults.
    /// Only the leader calls this.
    fn next(&self, engine: &'static Engine, touches: &mut VecDeque<Touch>);
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
    fn next(&self, engine: &'static Engine, touches: &mut VecDeque<Touch>) {
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
        touches.extend(messages.filter_map(|message| Touch::from_message(&message, 0, read)));
    }
}

/// The threads of the fault loop for one source.
pub(crate) struct Workers {
    source: &'static dyn FaultSource,
    state: Mutex<State>,
    work: Condvar,
}

/// The lead, as long as it is held.
pub(crate) struct Lead {
    /// Whose lead it is: each fault source has one.
    workers: &'static Workers,
    engine: &'static Engine,
    held: bool,
    unanswered: VecDeque<Touch>,
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

    /// To be called before anything that may wait.
    pub(crate) fn give_up(&mut self) {
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
        state
            .queue
            .extend(self.unanswered.drain(..).map(Task::Touch));
        workers.call(self.engine, state);
    }
}

impl Workers {
    pub(crate) fn of(source: &'static dyn FaultSource) -> Workers {
        Workers {
            source,
            state: Mutex::default(),
            work: Condvar::default(),
        }
    }

    fn without_lead(engine: &'static Engine) -> Lead {
        Lead {
            workers: &engine.workers,
            engine,
            held: false,
            unanswered: VecDeque::new(),
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
                        break;
                    } else {
                        state.idle += 1;
                        self.work.wait(&mut state);
                        state.idle -= 1;
                    }
                }
            }
            self.source.next(engine, &mut lead.unanswered);
            while let Some(touch) = lead.unanswered.pop_front() {
                engine.answer(&touch, &mut lead);
            }
        }
    }
}
