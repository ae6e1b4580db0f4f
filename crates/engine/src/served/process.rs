//! A served process, the processes that were forked from it, and the events of their memory.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::lock::{Condvar, Mutex, RwLock, RwLockWriteGuard};
use userfault_store::Store;
use userfault_uffd::{Message, MessageBuffer, Uffd};

use super::delivery::Elsewhere;
use super::layout::{Layout, Segment};
use crate::block::{Purpose, State};
use crate::body::{Body, Plan};
use crate::dirty::DirtyMap;
use crate::engine::Engine;
use crate::fork::Kept;
use crate::memory::{Memory, small_page};
use crate::stats::{Counters, add};
use crate::table::BlockError;
use crate::workers::{BATCH, Task, Touch};
use crate::{Access, OnError};

/// One item of a layout in one process: a piece of the store, and which of its pages are still owed.
#[derive(Debug)]
pub(super) struct Piece {
    /// Which item of the layout it is.
    pub(super) item: usize,
    pub(super) body: Arc<Body>,
    /// The pages whose bytes the store still owes. A page that is not owed is the process's own affair: it has
    /// been delivered, or thrown away, and if it is missing it is zeros.
    ///
    /// Memory that processes share is one memory, and they share this set.
    pub(super) owed: Arc<Mutex<DirtyMap>>,
    pub(super) shared: bool,
}

impl Piece {
    pub(super) fn page(&self) -> usize {
        self.body.memory.page()
    }

    /// The pages of the piece that a part of it touches.
    pub(super) fn pages(&self, segment: &Segment<Arc<Piece>>) -> Range<usize> {
        let page = self.page();
        segment.offset / page..(segment.offset + segment.len).div_ceil(page)
    }

    /// The pages of the piece that lie in a part of it whole.
    fn whole_pages(&self, segment: &Segment<Arc<Piece>>) -> Range<usize> {
        let page = self.page();
        let start = segment.offset.div_ceil(page);
        start..((segment.offset + segment.len) / page).max(start)
    }

    /// Where a run of pages lies, as seen from a segment.
    pub(super) fn address(&self, segment: &Segment<Arc<Piece>>, page: usize) -> usize {
        segment.at + (page * self.page() - segment.offset)
    }
}

/// What all processes of one `serve` have in common.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) name: String,
    pub(super) on_error: OnError,
    pub(super) retry_for: Duration,
    pub(super) read_turn: Option<Arc<Mutex<()>>>,
    /// Writes are tracked: pages are put in place write-protected.
    pub(super) track: bool,
}

/// How many events have been read.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) forks: AtomicU64,
    pub(super) remaps: AtomicU64,
    pub(super) removes: AtomicU64,
    pub(super) unmaps: AtomicU64,
    /// Fills that the kernel refused because an event was unread.
    pub(super) refused: AtomicU64,
}

/// A process that was handed over, and all that were forked from it.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) terms: Terms,
    /// Each living process. Reading messages takes this lock to write, putting bytes in place takes it to read:
    /// so what is put in place belongs there (see the text of `served`).
    pub(super) members: RwLock<BTreeMap<u32, Member>>,
    pub(super) events: Events,
    /// Counts, and errors, of processes that are gone.
    pub(super) past: Counters,
    pub(super) past_errors: Mutex<Vec<(u64, BlockError)>>,
    /// False once nobody is left.
    pub(super) alive: Mutex<bool>,
    pub(super) ended: Condvar,
}

/// A living process, and where the pieces lie in it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) process: Arc<Process>,
    pub(super) pieces: Vec<Arc<Piece>>,
    pub(super) layout: Layout<Arc<Piece>>,
}

/// One process that is served.
#[derive(Debug)]
pub(crate) struct Process {
    pub(super) id: u32,
    pub(super) uffd: Uffd,
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) pid: Option<u32>,
    pub(super) family: Arc<Family>,
    /// A fill has succeeded since the last event was read: the memory was at rest then.
    pub(super) rested: AtomicBool,
    gone: AtomicBool,
    told: AtomicBool,
}

type Members<'a> = RwLockWriteGuard<'a, BTreeMap<u32, Member>>;

/// An address that is valid and, as the lowest that a program may map by default, never in use. Bytes.
const LOW: usize = 64 << 10;

/// How a read of messages ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// What was there has been read.
    Done,
    /// A fork waits until there is a free descriptor for the child's userfaultfd.
    NoDescriptor,
}

impl Process {
    pub(super) fn new(
        engine: &Engine,
        uffd: Uffd,
        pidfd: Option<(u32, OwnedFd)>,
        family: &Arc<Family>,
    ) -> Arc<Process> {
        Arc::new(Process {
            id: engine.next_id(),
            uffd,
            pid: pidfd.as_ref().map(|(pid, _)| *pid),
            pidfd: pidfd.map(|(_, pidfd)| pidfd),
            family: family.clone(),
            rested: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            told: AtomicBool::new(false),
        })
    }

    pub(super) fn descriptors(&self) -> Vec<Kept> {
        let uffd = Kept::Descriptor(self.uffd.as_raw_fd());
        let pidfd = self.pidfd.as_ref();
        let pidfd = pidfd.map(|pidfd| Kept::Descriptor(pidfd.as_raw_fd()));
        std::iter::once(uffd).chain(pidfd).collect()
    }

    /// Reads what waits: applies the events, and appends the faults. Never sleeps.
    pub(super) fn read(
        self: &Arc<Self>,
        engine: &'static Engine,
        tasks: &mut VecDeque<Task>,
    ) -> Reading {
        let mut members = self.family.members.write();
        let Some(member) = members.get_mut(&self.id) else {
            return Reading::Done;
        };
        if member.layout.wants_rest() && self.probe() == libc::ENOENT {
            member.layout.at_rest();
        }
        let mut buffer = MessageBuffer::<BATCH>::new();
        let messages = match self.uffd.read_messages(&mut buffer) {
            Ok(messages) => messages,
            Err(error) => {
                drop(members);
                return self.unreadable(&error);
            }
        };
        let read = Instant::now();
        for message in messages {
            if let Some(mut touch) = Touch::from_message(&message, self.id, read) {
                // Without THREAD_ID all threads look like one, but somebody does sleep on it.
                touch.thread = touch.thread.max(1);
                tasks.push_back(Task::Touch(touch));
            } else {
                if self.rested.swap(false, Ordering::Relaxed)
                    && let Some(member) = members.get_mut(&self.id)
                {
                    member.layout.at_rest();
                }
                self.apply(engine, &mut members, message);
            }
        }
        Reading::Done
    }

    fn unreadable(&self, error: &io::Error) -> Reading {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Reading::Done,
            errno => {
                // EMFILE, ENFILE, ENOMEM: a fork cannot be taken on. The event stays, and its caller waits.
                if !self.told.swap(true, Ordering::Relaxed) {
                    let advice = match errno {
                        Some(libc::EMFILE | libc::ENFILE) => {
                            "; it waits until one is free (ulimit -n)"
                        }
                        _ => "",
                    };
                    crate::say::line(&format!(
                        "userfault: {}: a fork of the served process cannot be served yet: {error}{advice}",
                        self.family.terms.name
                    ));
                }
                Reading::NoDescriptor
            }
        }
    }

    /// Reads what waits, from a thread that does not lead.
    pub(super) fn drain(self: &Arc<Self>, engine: &'static Engine) {
        let mut tasks = VecDeque::new();
        self.read(engine, &mut tasks);
        for task in tasks {
            engine.servers.submit(engine, task);
        }
    }

    fn apply(self: &Arc<Self>, engine: &'static Engine, members: &mut Members<'_>, event: Message) {
        let events = &self.family.events;
        let Some(Member { layout, pieces, .. }) = members.get_mut(&self.id) else {
            return;
        };
        match event {
            Message::Pagefault { .. } => {}
            Message::Remove { start, end } => {
                add(&events.removes, 1);
                for segment in layout.in_range(start..end) {
                    let piece = &segment.piece;
                    let removed = piece.whole_pages(&segment);
                    piece.owed.lock().remove(removed.clone());
                    if self.family.terms.track {
                        // Its pages are zeros from here on, whether they are touched or not.
                        piece.body.lock().mark_dirty(removed);
                    }
                }
                self.wake(start..end);
            }
            Message::Unmap { start, end } => {
                add(&events.unmaps, 1);
                layout.unmap(start..end);
                self.wake(start..end);
            }
            Message::Remap { from, to, len } => {
                add(&events.remaps, 1);
                layout.remap(from..from + len, to);
                // Who sleeps at the old address finds nothing there; who sleeps at the new one asks again.
                self.wake(from..from + len);
                self.wake(to..to + len);
            }
            Message::Fork { ufd } => {
                add(&events.forks, 1);
                let features = self.uffd.features().enabled;
                let uffd = Uffd::from_fd(ufd, features);
                let child = Process::new(engine, uffd, None, &self.family);
                let own: Vec<_> = pieces
                    .iter()
                    .map(|piece| inherit(engine, &child, piece))
                    .collect();
                let inherited = layout.fork(|piece| {
                    let index = pieces.iter().position(|known| Arc::ptr_eq(known, piece));
                    own[index.expect("a layout is made of the pieces")].clone()
                });
                let member = Member {
                    process: child.clone(),
                    pieces: own,
                    layout: inherited,
                };
                members.insert(child.id, member);
                if let Err(error) = engine.peers.admit(&child) {
                    // Its memory cannot be served: it sleeps at the first touch, for good.
                    crate::say::line(&format!(
                        "userfault: {}: a fork of the served process cannot be served: {error}",
                        self.family.terms.name
                    ));
                }
            }
            Message::Unknown { event, .. } => {
                crate::say::line(&format!(
                    "userfault: {}: event {event:#x} is not known to this version and was ignored",
                    self.family.terms.name
                ));
            }
        }
    }

    /// Wakes who sleeps in a range: they ask again.
    pub(super) fn wake(&self, range: Range<usize>) {
        if !range.is_empty() {
            let _ = self.uffd.wake(range.start, range.len());
        }
    }

    /// Wakes who sleeps on the page around an address.
    pub(super) fn wake_page(&self, address: usize, page: usize) {
        let start = address / page * page;
        self.wake(start..start + page);
    }

    /// True if the process has ended (or executed another program): it is forgotten then.
    pub(super) fn retire_if_gone(self: &Arc<Self>, engine: &'static Engine) -> bool {
        let gone = self.probe() == libc::ESRCH;
        if gone {
            self.retire(engine);
        }
        gone
    }

    /// Asks how it is, by a call that changes nothing: it lifts a protection where nothing can be registered.
    /// ENOENT: it lives and is at rest; EAGAIN: it lives, and an event is on its way; ESRCH: it is gone.
    fn probe(&self) -> i32 {
        self.uffd.writeprotect(LOW, small_page().min(LOW), 0).errno
    }

    /// Forgets the process: nobody is served there any more. Its userfaultfd is closed when the last fill has
    /// ended.
    pub(super) fn retire(self: &Arc<Self>, engine: &'static Engine) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        engine.peers.dismiss(self);
        let family = &self.family;
        let mut members = family.members.write();
        let member = members.remove(&self.id);
        let nobody = members.is_empty();
        drop(members);
        for piece in member.iter().flat_map(|member| &member.pieces) {
            let mut table = piece.body.lock();
            table.closed = true;
            let errors = std::mem::take(&mut table.errors);
            piece.body.changed(&table);
            drop(table);
            family.past.absorb(&piece.body.counters);
            let from = piece.body.store_offset;
            let mut past = family.past_errors.lock();
            past.extend(errors.into_iter().map(|error| (from, error)));
        }
        if nobody {
            *family.alive.lock() = false;
            family.ended.notify_all();
        }
    }
}

/// Makes a piece of a process.
#[expect(
    clippy::too_many_arguments,
    reason = "one for each property of an item of a layout"
)]
pub(super) fn piece(
    engine: &Engine,
    process: &Arc<Process>,
    store: Arc<dyn Store>,
    item: usize,
    offset: u64,
    len: usize,
    page: usize,
    block: usize,
    shared: bool,
    owed: Arc<Mutex<DirtyMap>>,
) -> Piece {
    let terms = &process.family.terms;
    let body = Body::new(Plan {
        id: engine.next_id(),
        name: terms.name.clone(),
        // The table of what is writable knows which of its pages have been written.
        access: if terms.track {
            Access::ReadWrite
        } else {
            Access::ReadOnly
        },
        on_error: terms.on_error,
        retry_for: terms.retry_for,
        read_turn: terms.read_turn.clone(),
        store,
        store_offset: offset,
        len,
        memory: Memory::elsewhere(len, page),
        backing: Box::new(Elsewhere {
            process: Arc::downgrade(process),
            owed: owed.clone(),
        }),
        block,
        own_pool: None,
        inline: false,
    });
    Piece {
        item,
        body: Arc::new(body),
        owed,
        shared,
    }
}

/// The child's own of a parent's piece, as it is at the fork.
fn inherit(engine: &Engine, child: &Arc<Process>, parent: &Arc<Piece>) -> Arc<Piece> {
    let body = &parent.body;
    let owed = if parent.shared {
        parent.owed.clone()
    } else {
        Arc::new(Mutex::new(copy(&parent.owed.lock())))
    };
    let own = piece(
        engine,
        child,
        body.store.0.clone(),
        parent.item,
        body.store_offset,
        body.len,
        parent.page(),
        body.block,
        parent.shared,
        owed,
    );
    // Poison is inherited; what is being filled in the parent is absent here.
    let theirs = body.lock();
    let mut table = own.body.lock();
    for block in 0..body.all_blocks() {
        let poisoned = matches!(theirs.state(block), State::Poisoned | State::Poisoning);
        if poisoned && table.claim(block, Purpose::Fill) {
            table.release(block, State::Poisoned);
        }
    }
    table.errors = theirs.errors.clone();
    for written in theirs.home.runs(0..theirs.home_pages()) {
        table.mark_dirty(written);
    }
    drop(table);
    drop(theirs);
    Arc::new(own)
}

fn copy(map: &DirtyMap) -> DirtyMap {
    let mut copy = DirtyMap::new(map.pages());
    for run in map.runs(0..map.pages()) {
        copy.insert(run);
    }
    copy
}
