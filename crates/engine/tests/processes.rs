//! fork, vfork, spawn, exec, exit, signals, and threads that die inside a fault.
//!
//! Unsafe: fork(2) and its kin, signal handlers, mappings, and touches of what a child must not have.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::{Access, Error, Region};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

const BLOCKS: usize = 8;

fn region(kind: Kind) -> (Arc<Bytes>, Arc<Region>) {
    let len = BLOCKS * kind.block;
    let store = Bytes::ready(patterned(len));
    (store.clone(), open(kind, &store, len, 5))
}

/// Forks; the child runs `child` and ends. Returns the signal or exit status that ended it.
fn forked(child: impl FnOnce() -> i32) -> (i32, i32) {
    // SAFETY: the child runs only what the tests below give it, and leaves by _exit.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            let code = child();
            libc::_exit(code);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        if libc::WIFSIGNALED(status) {
            (libc::WTERMSIG(status), -1)
        } else {
            (0, libc::WEXITSTATUS(status))
        }
    }
}

#[test]
fn a_forked_child_gets_neither_zeros_nor_a_strangers_bytes() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let (store, region) = region(kind);
            touch::write(&region, 1, 0);
            for at in [1, kind.block * 7] {
                let ended = forked(|| {
                    // Enough to fill any hole that the region's range might have left.
                    let mut taken = Vec::new();
                    for _ in 0..200 {
                        taken.push(vec![7u8; 1 << 20]);
                    }
                    i32::from(touch::read(&region, at))
                });
                assert_eq!(ended, (libc::SIGSEGV, -1), "{kind:?}");
            }
            assert_eq!(touch::read(&region, 1), 0);
            region.close().unwrap();
            assert_eq!(store.to_vec()[1], 0);
        }
    });
}

#[test]
fn a_forked_child_may_close_and_drop_what_it_has_and_open_its_own() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let (store, region) = region(kind);
            touch::write(&region, 1, 0);
            let pin = region.pin(0, 1, true).unwrap();
            let ticket = region.prefetch(&[(0, 1)]).unwrap();
            let ended = forked(|| {
                assert!(matches!(region.flush(0, 1), Err(Error::Forked)));
                assert!(matches!(region.pread(&mut [0], 0), Err(Error::Forked)));
                assert!(matches!(ticket.wait(), Err(Error::Forked)));
                region.close().unwrap();
                drop(pin);
                drop(region);
                let own = Bytes::ready(patterned(BLOCKS * kind.block));
                let mine = open(kind, &own, BLOCKS * kind.block, 5);
                for at in (0..BLOCKS * kind.block).step_by(997) {
                    assert_eq!(touch::read(&mine, at), pattern(at));
                }
                touch::write(&mine, 0, 0);
                mine.close().unwrap();
                i32::from(own.to_vec()[0])
            });
            assert_eq!(ended, (0, 0), "{kind:?}");
            assert_eq!(
                store.to_vec()[1],
                pattern(1),
                "the child wrote the parent's bytes"
            );
        }
    });
}

#[test]
fn a_child_of_a_parent_with_many_sleeping_threads_runs_many_of_its_own() {
    apart!(60, {
        let kind = COPIED_64K;
        // The parent's threads sleep in the engine's locks, each where a child has nothing.
        let parent = slow(kind, Duration::from_millis(20));
        thread::scope(|scope| {
            for reader in 0..16usize {
                let parent = &parent;
                scope.spawn(move || {
                    let at = reader % BLOCKS * kind.block;
                    assert_eq!(touch::read(parent, at), pattern(at));
                });
            }
        });
        parent.flush(0, 1).unwrap();
        for _ in 0..20 {
            let ended = forked(|| {
                let mine = slow(kind, Duration::from_millis(2));
                thread::scope(|scope| {
                    for reader in 0..24usize {
                        let mine = &mine;
                        scope.spawn(move || {
                            for block in 0..BLOCKS {
                                let at = (block + reader) % BLOCKS * kind.block + reader;
                                assert_eq!(touch::read(mine, at), pattern(at));
                                touch::write(mine, at, reader as u8);
                            }
                        });
                    }
                });
                mine.close().unwrap();
                7
            });
            assert_eq!(ended, (0, 7));
        }
    });
}

#[test]
fn forks_beside_faults_neither_hang_nor_harm_the_parent() {
    apart!(60, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let (store, region) = region(kind);
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                let (region, stop) = (&region, &stop);
                for writer in 0..2usize {
                    scope.spawn(move || {
                        let mut count = 0;
                        while !stop.load(Ordering::Relaxed) {
                            let word =
                                (count * 4801 + writer) % (BLOCKS * kind.block / 16) * 2 + writer;
                            touch::add_word(region, word, 1);
                            touch::add_word(region, word, 1u64.wrapping_neg());
                            count += 1;
                        }
                    });
                }
                for _ in 0..60 {
                    assert_eq!(forked(|| 3), (0, 3));
                }
                stop.store(true, Ordering::Relaxed);
            });
            region.close().unwrap();
            assert!(store.to_vec() == patterned(BLOCKS * kind.block));
        }
    });
}

#[test]
fn a_process_started_by_vfork_or_spawn_inherits_no_descriptor_of_the_engine() {
    apart!(60, {
        let (_, region) = region(HUGE_PAGES);
        assert_eq!(touch::read(&region, 0), pattern(0));
        // The standard library uses posix_spawn, which shares the parent's memory until exec.
        let output = std::process::Command::new("/bin/ls")
            .args(["-l", "/proc/self/fd"])
            .output()
            .unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && listed.contains("->"), "{listed}");
        for word in ["userfault", "memfd", "pagemap"] {
            assert!(!listed.contains(word), "{listed}");
        }
    });
}

#[test]
fn a_vfork_child_that_touches_the_memory_is_served() {
    apart!(60, {
        let (store, region) = region(COPIED_64K);
        extern "C" fn child(region: *mut libc::c_void) -> i32 {
            // SAFETY: the parent sleeps until this child has ended, and keeps the region meanwhile.
            touch::write(unsafe { &*region.cast::<Region>() }, 3 * 65536, 9);
            0
        }
        // What vfork does, with a stack of its own.
        let mut stack = vec![0u128; 16 << 10];
        let top = stack.as_mut_ptr_range().end;
        let argument: *const Region = &*region;
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the child runs one function on a stack that outlives it.
        unsafe {
            let pid = libc::clone(child, top.cast(), flags, argument.cast_mut().cast());
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
            assert_eq!(status, 0);
        }
        region.close().unwrap();
        assert_eq!(store.to_vec()[3 * 65536], 9);
    });
}

#[test]
fn an_exit_with_dirty_blocks_ends() {
    // What was not flushed is not stored; nothing waits, and nothing crashes.
    apart!(30, {
        let (_, region) = region(COPIED_64K);
        touch::write(&region, 0, 0);
        thread::spawn(move || {
            loop {
                for block in 0..BLOCKS {
                    touch::read(&region, block * 65536);
                }
            }
        });
        thread::sleep(Duration::from_millis(20));
        std::process::exit(0);
    });
}

/// A region whose reads take `pause`.
fn slow(kind: Kind, pause: Duration) -> Arc<Region> {
    let len = BLOCKS * kind.block;
    let memory = Arc::new(MemoryStore::new(patterned(len)));
    let rule = Rule::every(Call::Read, Action::Delay(pause));
    open(
        kind,
        &Arc::new(FaultyStore::new(memory, vec![rule])),
        len,
        5,
    )
}

static HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: i32) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// Waits until the thread that says its id here last of all sleeps in what comes next: its fault.
fn wait_until_asleep_after(id: &AtomicI32) {
    loop {
        let id = id.load(Ordering::Acquire);
        let stat = std::fs::read_to_string(format!("/proc/self/task/{id}/stat"));
        // The state is the first word after the name, which is in parentheses.
        let state = stat
            .ok()
            .and_then(|stat| stat.rsplit(") ").next()?.chars().next());
        if id != 0 && matches!(state, Some('S' | 'D')) {
            return;
        }
        thread::sleep(Duration::from_micros(100));
    }
}

extern "C" fn end_this_thread(_: i32) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: ends the calling thread at once, as a crash of it alone would.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

fn on(signal: i32, handler: extern "C" fn(i32)) {
    // SAFETY: a zeroed sigaction with a handler that only counts, or ends its thread.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(
            libc::sigaction(signal, &raw const action, std::ptr::null_mut()),
            0
        );
    }
}

#[test]
fn a_storm_of_signals_loses_no_fault() {
    apart!(60, {
        on(libc::SIGUSR1, count);
        for kind in [COPIED_64K, HUGE_PAGES] {
            let region = slow(kind, Duration::from_millis(2));
            // SAFETY: a new descriptor, which is never closed.
            let kept = unsafe { libc::memfd_create(c"written".as_ptr(), libc::MFD_CLOEXEC) };
            let ids = userfault_engine::lock::Mutex::new(Vec::new());
            thread::scope(|scope| {
                let touchers: Vec<_> = (0..3usize)
                    .map(|toucher| {
                        let (region, ids) = (&region, &ids);
                        scope.spawn(move || {
                            // SAFETY: gettid has no preconditions.
                            ids.lock().push(unsafe { libc::gettid() });
                            for round in 0..8 {
                                for block in 0..BLOCKS {
                                    let at = block * kind.block + toucher;
                                    if toucher == 0 {
                                        // A system call that sleeps in the fault.
                                        assert_eq!(
                                            touch::pwrite_from(region, at, 100, kept, 0),
                                            100
                                        );
                                    }
                                    assert_eq!(
                                        touch::read(region, at),
                                        pattern(at),
                                        "round {round}"
                                    );
                                }
                            }
                        })
                    })
                    .collect();
                while touchers.iter().any(|toucher| !toucher.is_finished()) {
                    for id in ids.lock().iter() {
                        // SAFETY: tgkill takes numbers; a thread that has ended is ESRCH.
                        unsafe {
                            libc::syscall(libc::SYS_tgkill, libc::getpid(), *id, libc::SIGUSR1)
                        };
                    }
                    thread::sleep(Duration::from_micros(100));
                }
            });
        }
        assert!(HANDLED.load(Ordering::Relaxed) > 50);
    });
}

#[test]
fn a_thread_that_dies_inside_a_fault_keeps_nothing_from_the_others() {
    apart!(60, {
        on(libc::SIGUSR2, end_this_thread);
        for kind in [COPIED_64K, HUGE_PAGES] {
            let region = slow(kind, Duration::from_millis(100));
            for block in 0..BLOCKS {
                let mine = region.clone();
                let id = Arc::new(AtomicI32::new(0));
                let said = id.clone();
                // Never joined: it does not end as a thread of the library does.
                let dying = thread::spawn(move || {
                    // SAFETY: gettid has no preconditions.
                    said.store(unsafe { libc::gettid() }, Ordering::Release);
                    touch::read(&mine, block * kind.block)
                });
                // While it starts it may hold a lock of the standard library, and would keep that.
                wait_until_asleep_after(&id);
                // SAFETY: the thread sleeps in its fault, so it exists.
                unsafe {
                    libc::pthread_kill(
                        std::os::unix::thread::JoinHandleExt::as_pthread_t(&dying),
                        libc::SIGUSR2,
                    )
                };
                std::mem::forget(dying);
                let at = block * kind.block + 1;
                assert_eq!(touch::read(&region, at), pattern(at));
            }
            region.flush(0, region.len() as u64).unwrap();
            region.evict(0, region.len() as u64).unwrap();
            region.close().unwrap();
        }
        assert_eq!(HANDLED.load(Ordering::Relaxed), 2 * BLOCKS);
    });
}

#[test]
fn a_thread_that_sleeps_on_a_region_that_is_closed_gets_a_segmentation_fault() {
    dies!(30, libc::SIGSEGV, {
        let region = slow(COPIED_64K, Duration::from_millis(300));
        let sleeper = region.clone();
        thread::spawn(move || println!("read {}", touch::read(&sleeper, 0)));
        thread::sleep(Duration::from_millis(100));
        // Its block is filled before the region goes; the next one is not served any more.
        region.close().unwrap();
        thread::sleep(Duration::from_millis(50));
        println!("read {}", touch::read(&region, 65536));
    });
}

#[test]
fn closing_while_others_touch_ends_and_keeps_what_they_wrote_before() {
    for _ in 0..3 {
        dies!(30, libc::SIGSEGV, {
            let (store, region) = region(COPIED_64K);
            let written = Arc::new(AtomicUsize::new(0));
            for writer in 0..2usize {
                let (region, written) = (region.clone(), written.clone());
                thread::spawn(move || {
                    for count in 1.. {
                        touch::write_word(&region, writer * 65536 * 4, count as u64);
                        written.fetch_max(count, Ordering::Relaxed);
                    }
                });
            }
            thread::sleep(Duration::from_millis(30));
            let before = written.load(Ordering::Relaxed);
            // The first touch after the end of this call, or in its last moments, ends the process.
            let closed = region.close();
            assert!(closed.is_ok() && before > 0);
            assert!(store.word(0) > 0);
            thread::sleep(Duration::from_secs(5));
        });
    }
}

#[test]
fn locked_memory_is_served_as_any_other() {
    apart!(60, {
        // SAFETY: asks that all memory be locked; the limit of a plain user may refuse it.
        let locked = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } == 0;
        let private = Kind {
            name: "4KiB private",
            ..COPIED_64K
        };
        for kind in [COPIED, COPIED_64K, VIEWED, HUGE_PAGES, private] {
            let len = BLOCKS * kind.block;
            let store = Bytes::ready(patterned(len));
            let access = if kind == private {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            };
            let limit = Some(5 * kind.block as u64 + (64 << 10));
            let region = Region::open(store, options(kind, access, len, limit)).unwrap();
            for round in 0..2 {
                for at in (round..len).step_by(SMALL) {
                    assert_eq!(
                        touch::read(&region, at),
                        pattern(at),
                        "{kind:?}, locked: {locked}"
                    );
                }
            }
            // SAFETY: undoes mlockall, so that the program's own mlock below is what counts.
            unsafe { libc::munlockall() };
            let code = touch::mlock(&region, 0, 3 * kind.block);
            assert!([0, libc::EPERM, libc::ENOMEM].contains(&code), "{code}");
            for at in (0..len).step_by(SMALL) {
                assert_eq!(touch::read(&region, at), pattern(at));
            }
        }
    });
}

#[test]
fn a_user_who_may_not_serve_the_kernel_is_told_and_pins_instead() {
    apart!(60, {
        // SAFETY: gives up the identity of root in this child; without root it is a plain user already.
        unsafe {
            if libc::geteuid() == 0 {
                libc::setgroups(0, std::ptr::null());
                assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
                assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
                // A process that changed its identity may not read its own pagemap, unlike one that was
                // started so.
                assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1), 0);
            }
        }
        for kind in [COPIED_64K, HUGE_PAGES] {
            let len = BLOCKS * kind.block;
            let store = Bytes::ready(patterned(len));
            let options = options(kind, Access::ReadWrite, len, Some(6 * kind.block as u64));
            let region = match Region::open(store.clone(), options) {
                Ok(region) => region,
                // A machine without user namespaces has no huge tmpfs for plain users, and says so.
                Err(error) => {
                    assert!(error.to_string().contains("pages=\"4KiB\""), "{error}");
                    continue;
                }
            };
            use std::os::fd::AsRawFd;
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open("/dev/null")
                .unwrap();
            let random = std::fs::File::open("/dev/zero").unwrap();
            for at in (0..len).step_by(4097) {
                assert_eq!(touch::read(&region, at), pattern(at));
            }
            region.evict(0, len as u64).unwrap();
            let fault = touch::pread_into(&region, 0, 4096, random.as_raw_fd(), 0);
            assert_eq!(fault == 4096, region.kernel_faults(), "{fault}");
            if !region.kernel_faults() {
                assert_eq!(fault, -libc::EFAULT as isize);
            }
            {
                let _pin = region.pin(0, 8192, true).unwrap();
                assert_eq!(
                    touch::pread_into(&region, 0, 8192, random.as_raw_fd(), 0),
                    8192
                );
                assert_eq!(
                    touch::pwrite_from(&region, 0, 8192, file.as_raw_fd(), 0),
                    8192
                );
            }
            region.pwrite(&[5; 100], kind.block as u64).unwrap();
            let mut bytes = [0; 100];
            region.pread(&mut bytes, kind.block as u64).unwrap();
            assert_eq!(bytes, [5; 100]);
            region.evict(0, len as u64).unwrap();
            assert_eq!(
                region
                    .read_from_fd(random.as_raw_fd(), kind.block as u64 + 50, 50)
                    .unwrap(),
                50
            );
            region.close().unwrap();
            assert_eq!(store.to_vec()[..8192], [0; 8192]);
            assert_eq!(store.to_vec()[kind.block..kind.block + 51][49..], [5, 0]);
        }
    });
}
