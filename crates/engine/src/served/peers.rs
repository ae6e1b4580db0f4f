//! The fault source of served processes: all their userfaultfds, waited for by one leader.
//!
//! Unsafe: epoll, for which the standard library has no function.
//!
//! A userfaultfd does not say that its process has ended. A pidfd does, where there is one; otherwise each
//! process is asked now and then, by a call that changes nothing and fails with ESRCH when it is gone.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::lock::{Mutex, RwLock};

use super::process::{Process, Reading};
use crate::engine::Engine;
use crate::error::Error;
use crate::fork::{self, Kept};
use crate::workers::{FaultSource, Task};

/// How often processes without a pidfd are asked whether they still exist.
const ROUND: Duration = Duration::from_millis(500);

/// The pause after a fork could not be taken on for want of a descriptor.
const NO_DESCRIPTOR: Duration = Duration::from_millis(20);

/// Marks the pidfd of a process among the tokens of epoll.
const EXIT: u64 = 1 << 32;

/// Everybody who is served.
#[derive(Default)]
pub(crate) struct Registry {
    epoll: OnceLock<OwnedFd>,
    starting: Mutex<()>,
    processes: RwLock<HashMap<u32, Arc<Process>>>,
    last_round: Mutex<Option<Instant>>,
}

/// The served processes of an engine, as a fault source.
pub(crate) struct Peers;

fn control(epoll: RawFd, operation: i32, fd: RawFd, token: u64) -> i32 {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: token,
    };
    // SAFETY: one event, alive through the call; both descriptors are open.
    unsafe { libc::epoll_ctl(epoll, operation, fd, &raw mut event) }
}

impl Registry {
    pub(crate) fn get(&self, id: u32) -> Option<Arc<Process>> {
        self.processes.read().get(&id).cloned()
    }

    /// Opens the source, and starts its threads.
    pub(super) fn start(&self, engine: &'static Engine) -> Result<(), Error> {
        let _starting = self.starting.lock();
        if self.epoll.get().is_some() {
            return Ok(());
        }
        // SAFETY: the call takes one number.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os("epoll_create1", "see ulimit -n"));
        }
        fork::keep(&[Kept::Descriptor(fd)]);
        // SAFETY: the kernel just made it and nobody else has it.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        self.epoll.set(epoll).expect("only set here, one at a time");
        if !engine.servers.start(engine) {
            return Err(Error::last_os(
                "starting a thread that serves",
                "see ulimit -u and the pids cgroup",
            ));
        }
        Ok(())
    }

    /// Listens to a process from here on.
    pub(super) fn admit(&self, process: &Arc<Process>) -> Result<(), Error> {
        let epoll = self.epoll.get().expect("started").as_raw_fd();
        fork::keep(&process.descriptors());
        self.processes.write().insert(process.id, process.clone());
        let id = u64::from(process.id);
        let mut failed = control(epoll, libc::EPOLL_CTL_ADD, process.uffd.as_raw_fd(), id) < 0;
        if let Some(pidfd) = &process.pidfd {
            failed |= control(epoll, libc::EPOLL_CTL_ADD, pidfd.as_raw_fd(), id | EXIT) < 0;
        }
        if failed {
            return Err(Error::last_os("epoll_ctl", "see fs.epoll.max_user_watches"));
        }
        Ok(())
    }

    /// Stops listening to a process. The other side may hold copies of the descriptor, so epoll would go on.
    pub(super) fn dismiss(&self, process: &Process) {
        let epoll = self.epoll.get().expect("started").as_raw_fd();
        control(epoll, libc::EPOLL_CTL_DEL, process.uffd.as_raw_fd(), 0);
        if let Some(pidfd) = &process.pidfd {
            control(epoll, libc::EPOLL_CTL_DEL, pidfd.as_raw_fd(), 0);
        }
        self.processes.write().remove(&process.id);
        fork::forget(&process.descriptors());
    }

    /// Asks everybody, now and then, whether they still exist.
    fn round(&self, engine: &'static Engine) {
        {
            let mut last = self.last_round.lock();
            if last.is_some_and(|last| last.elapsed() < ROUND) {
                return;
            }
            *last = Some(Instant::now());
        }
        let all: Vec<_> = self.processes.read().values().cloned().collect();
        for process in all {
            process.retire_if_gone(engine);
        }
    }
}

impl FaultSource for Peers {
    fn next(&self, engine: &'static Engine, tasks: &mut VecDeque<Task>) {
        let peers = &engine.peers;
        let epoll = peers.epoll.get().expect("started").as_raw_fd();
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: room for as many events as the call is told.
        let count = unsafe {
            libc::epoll_wait(
                epoll,
                ready.as_mut_ptr(),
                ready.len() as i32,
                ROUND.as_millis() as i32,
            )
        };
        for event in &ready[..count.max(0) as usize] {
            let token = event.u64;
            let Some(process) = peers.get(token as u32) else {
                continue;
            };
            if token & EXIT != 0 {
                if !process.retire_if_gone(engine)
                    && let Some(pidfd) = &process.pidfd
                {
                    // Somebody else lives on in the memory: a vfork child, or CLONE_VM.
                    control(epoll, libc::EPOLL_CTL_DEL, pidfd.as_raw_fd(), 0);
                }
                continue;
            }
            if process.read(engine, tasks) == Reading::NoDescriptor {
                std::thread::sleep(NO_DESCRIPTOR);
            }
        }
        peers.round(engine);
    }
}
