//! What the handler of SIGBUS does, and what it must not do.
//!
//! Unsafe: an allocator that counts, signal handlers, errno, and touching regions as programs do.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::random::Random;
use common::*;
use userfault_engine::readahead::Advice;
use userfault_engine::{Access, FaultWay, OnError, Region};
use userfault_store::{FileMode, FileOptions, FileStore, OverlayStore, Store, ZeroStore};

/// The system's allocator; counts what the calling thread asks of it.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's; counting in a cell of the thread's own allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: passed on as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: passed on as it came.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn inline(kind: Kind) -> Kind {
    Kind {
        fault: FaultWay::Inline,
        ..kind
    }
}

fn kinds() -> Vec<Kind> {
    let kinds = if apart::has_huge_pages() {
        vec![HUGETLB]
    } else {
        vec![COPIED, COPIED_64K, VIEWED, HUGE_PAGES]
    };
    kinds.into_iter().map(inline).collect()
}

/// A file of the pattern, in the temporary folder and without a name.
fn file(len: usize) -> Arc<FileStore> {
    let path = std::env::temp_dir().join(format!("userfault-inline-{}", std::process::id()));
    std::fs::write(&path, patterned(len)).unwrap();
    let store = FileStore::open(&path, FileOptions::new(FileMode::ReadWrite)).unwrap();
    std::fs::remove_file(path).unwrap();
    Arc::new(store)
}

/// Private changes over a store.
fn private(below: Arc<dyn Store>) -> Arc<OverlayStore> {
    let len = below.len();
    let folder = std::env::temp_dir();
    Arc::new(OverlayStore::new(Some(below), 0, len, &folder, "private".into()).unwrap())
}

#[test]
fn a_touch_allocates_nothing_frees_nothing_and_leaves_errno_alone() {
    apart!(60, hugetlb, {
        for kind in kinds() {
            let blocks = 24;
            let len = blocks * kind.block;
            for access in [Access::ReadOnly, Access::ReadWrite, Access::Private] {
                // Few blocks of room: most touches find none, wait for it or hand over.
                for limit in [2 * len as u64, 8 * kind.block as u64] {
                    let mut store: Arc<dyn Store> = file(len);
                    if access == Access::Private {
                        store = private(store);
                    }
                    let region =
                        Region::open(store, options(kind, access, len, Some(limit))).unwrap();
                    let before = CALLS.get();
                    // SAFETY: the thread's own errno.
                    let errno = unsafe { libc::__errno_location() };
                    for round in 0..3 {
                        for block in 0..blocks {
                            // SAFETY: as above.
                            unsafe { *errno = 77 + round };
                            let at = (block * 7 % blocks) * kind.block + 100;
                            let byte = touch::read(&region, at);
                            // SAFETY: as above.
                            assert_eq!(unsafe { *errno }, 77 + round);
                            assert_eq!(byte, pattern(at));
                            if access != Access::ReadOnly {
                                touch::write(&region, at, byte);
                            }
                        }
                    }
                    assert_eq!(CALLS.get(), before, "{kind:?} {access:?} {limit}");
                    region.close().unwrap();
                }
            }
        }
    });
}

/// What the program's own signal handler touches.
static TOUCHED: AtomicUsize = AtomicUsize::new(0);
static LENGTH: AtomicUsize = AtomicUsize::new(0);
static ALARMS: AtomicUsize = AtomicUsize::new(0);
static IN_ALARMS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_alarm(_: libc::c_int) {
    IN_ALARMS.fetch_add(1, Ordering::SeqCst);
    let base = TOUCHED.load(Ordering::SeqCst);
    if base != 0 {
        let alarm = ALARMS.fetch_add(1, Ordering::Relaxed);
        let at = alarm * 4096 * 13 % LENGTH.load(Ordering::Relaxed);
        // SAFETY: in bounds of a region that is there until nobody is in an alarm any more.
        unsafe { ((base + at) as *const u8).read_volatile() };
    }
    IN_ALARMS.fetch_sub(1, Ordering::SeqCst);
}

/// Calls of write(2) and its kin that this process has made.
fn writes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("syscw: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn a_recording_names_what_the_handler_brought_itself_and_costs_no_allocation() {
    let name = "a_recording_names_what_the_handler_brought_itself_and_costs_no_allocation";
    let blocks = 600;
    if apart::is_child(name) {
        let kind = inline(COPIED);
        let len = blocks * kind.block;
        let region = Region::open(
            file(len),
            options(kind, Access::ReadOnly, len, Some(2 * len as u64)),
        )
        .unwrap();
        // No walks: what they bring in is asked for in writing.
        region.advise(0, len as u64, Advice::Random).unwrap();
        let (before, calls) = (writes(), CALLS.get());
        for block in 0..blocks {
            touch::read(&region, (block * 251 % blocks) * kind.block);
        }
        let more = CALLS.get() - calls;
        let handed = writes() - before;
        assert_eq!(more, 0);
        assert!(handed < blocks as u64 / 4, "{handed} writes to the pipe");
        userfault_engine::write_out_trace();
        let path = std::env::var("USERFAULT_TRACE").unwrap();
        let recorded = std::fs::read_to_string(path).unwrap();
        let mut named: Vec<usize> = recorded
            .lines()
            .filter(|line| line.ends_with(" m"))
            .map(|line| line.split(' ').nth(3).unwrap().parse().unwrap())
            .collect();
        named.sort_unstable();
        assert_eq!(named, (0..blocks).collect::<Vec<_>>());
        return;
    }
    let path = std::env::temp_dir().join(format!("userfault-trace-{}", std::process::id()));
    let environment = [("USERFAULT_TRACE", path.to_str().unwrap())];
    let ended = apart::again(name, Duration::from_secs(60), &environment);
    let _ = std::fs::remove_file(&path);
    apart::check(name, &ended);
}

#[test]
fn a_signal_handler_of_the_program_may_touch_the_region_whatever_it_interrupts() {
    apart!(60, {
        let kind = inline(COPIED);
        let len = 2000 * kind.block;
        let limit = Some(400 * kind.block as u64);
        let region = Region::open(
            Arc::new(ZeroStore::new(len as u64)),
            options(kind, Access::ReadOnly, len, limit),
        )
        .unwrap();
        TOUCHED.store(region.base() as usize, Ordering::Relaxed);
        LENGTH.store(len, Ordering::Relaxed);
        // SAFETY: the handler is a function of this test, and the timer is this process's.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_alarm as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
            let often = libc::timeval {
                tv_sec: 0,
                tv_usec: 150,
            };
            let timer = libc::itimerval {
                it_interval: often,
                it_value: often,
            };
            libc::syscall(
                libc::SYS_setitimer,
                libc::ITIMER_REAL,
                &raw const timer,
                0usize,
            );
        }
        let mut random = Random::new(3);
        let mut bytes = [0; 300];
        let began = Instant::now();
        let mut rounds = 0;
        while began.elapsed() < Duration::from_secs(3) || ALARMS.load(Ordering::Relaxed) < 500 {
            let at = random.below(len - 300);
            region.pread(&mut bytes, at as u64).unwrap();
            assert!(touch::read(&region, random.below(len)) == 0);
            region.evict(at as u64, 300).unwrap();
            assert!(region.resident(0, len as u64).unwrap().len() == 2000);
            let _ = region.prefetch(&[(at as u64, 300)]).unwrap();
            rounds += 1;
        }
        // SAFETY: stops the timer before its handler's region goes.
        unsafe {
            let never: libc::itimerval = std::mem::zeroed();
            libc::syscall(
                libc::SYS_setitimer,
                libc::ITIMER_REAL,
                &raw const never,
                0usize,
            );
        }
        // Another thread may be in its handler still.
        TOUCHED.store(0, Ordering::SeqCst);
        while IN_ALARMS.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        println!("{rounds} rounds, {ALARMS:?} alarms, {:?}", region.stats());
        assert!(bytes.iter().all(|byte| *byte == 0));
    });
}

/// A store whose read in the handler does not come back until it is let go.
struct Stuck {
    below: Arc<Bytes>,
    held: AtomicBool,
    reading: AtomicBool,
}

impl Store for Stuck {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.below.read(offset, buf)
    }

    fn read_bare(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.reading.store(true, Ordering::SeqCst);
        while self.held.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        self.below.read_bare(offset, buf)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.below.write(offset, data)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.below.punch(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.below.len()
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "stuck".into()
    }
}

fn stuck(kind: Kind, retry_for: Duration) -> (Arc<Stuck>, Arc<Region>) {
    let len = 8 * kind.block;
    let store = Arc::new(Stuck {
        below: Bytes::ready(patterned(len)),
        held: AtomicBool::new(true),
        reading: AtomicBool::new(false),
    });
    let options = userfault_engine::RegionOptions {
        retry_for,
        on_error: OnError::Poison,
        ..options(kind, Access::ReadWrite, len, None)
    };
    (store.clone(), Region::open(store, options).unwrap())
}

#[test]
fn who_waits_for_a_read_that_does_not_come_back_gets_sigbus_in_time() {
    let output = dies!(30, libc::SIGBUS, {
        let (store, region) = stuck(inline(COPIED_64K), Duration::from_millis(500));
        thread::scope(|scope| {
            scope.spawn(|| touch::read(&region, 5));
            while !store.reading.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            touch::read(&region, 6);
        });
    });
    assert!(output.contains("cannot be reached"), "{output}");
}

static HELD: AtomicBool = AtomicBool::new(true);
static PASSED_ON: AtomicUsize = AtomicUsize::new(0);

/// A handler that had SIGBUS before: it waits until the page may be had.
extern "C" fn patient(_: libc::c_int) {
    PASSED_ON.fetch_add(1, Ordering::SeqCst);
    while HELD.load(Ordering::SeqCst) {
        // SAFETY: a number.
        unsafe { libc::usleep(1000) };
    }
    // SAFETY: a number.
    unsafe { libc::usleep(1000) };
}

#[test]
fn a_read_that_comes_back_after_its_sleepers_were_given_up_is_made_again() {
    apart!(60, hugetlb, {
        // SAFETY: the handler is a function of this test.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = patient as *const () as usize;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        }
        for kind in kinds() {
            HELD.store(true, Ordering::SeqCst);
            PASSED_ON.store(0, Ordering::SeqCst);
            let (store, region) = stuck(kind, Duration::from_millis(200));
            thread::scope(|scope| {
                let first = scope.spawn(|| touch::read(&region, 5));
                while !store.reading.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                let second = scope.spawn(|| touch::read(&region, 6));
                while PASSED_ON.load(Ordering::SeqCst) == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                assert_eq!(region.errors().len(), 1, "{kind:?}");
                store.held.store(false, Ordering::SeqCst);
                assert_eq!(first.join().unwrap(), pattern(5), "{kind:?}");
                HELD.store(false, Ordering::SeqCst);
                assert_eq!(second.join().unwrap(), pattern(6), "{kind:?}");
            });
            assert!(region.errors().is_empty(), "{kind:?}");
            touch::write(&region, 7, 9);
            region.close().unwrap();
            assert_eq!(store.below.to_vec()[7], 9);
        }
    });
}

#[test]
fn a_region_is_closed_while_threads_are_in_the_handler() {
    apart!(60, {
        for round in 0..60 {
            let kind = inline(if round % 2 == 0 { COPIED } else { VIEWED });
            let len = 8 * kind.block;
            let region =
                Region::open(file(len), options(kind, Access::ReadWrite, len, None)).unwrap();
            let stop = AtomicBool::new(false);
            // Another region, touched all the while: its handler looks at the places that change.
            let other_len = 64 * COPIED.block;
            let other = Region::open(
                file(other_len),
                options(inline(COPIED), Access::ReadOnly, other_len, Some(16 * 4096)),
            )
            .unwrap();
            thread::scope(|scope| {
                for seed in 0..3 {
                    let (other, stop) = (&other, &stop);
                    scope.spawn(move || {
                        let mut random = Random::new(seed);
                        while !stop.load(Ordering::Relaxed) {
                            let at = random.below(other_len);
                            assert_eq!(touch::read(other, at), pattern(at));
                        }
                    });
                }
                for at in (0..len).step_by(len / 8) {
                    assert_eq!(touch::read(&region, at), pattern(at));
                }
                region.close().unwrap();
                drop(region);
                stop.store(true, Ordering::Relaxed);
            });
        }
    });
}

#[test]
fn a_thousand_regions_are_found_and_one_more_is_refused() {
    apart!(60, {
        let open = || {
            Region::open(
                Arc::new(ZeroStore::new(4096)),
                options(inline(COPIED), Access::ReadOnly, 4096, None),
            )
        };
        let mut regions: Vec<_> = (0..1024).map(|_| open().unwrap()).collect();
        for region in &regions {
            assert_eq!(touch::read(region, 7), 0);
        }
        let error = open().unwrap_err().to_string();
        assert!(error.contains("1024 regions"), "{error}");
        regions.pop();
        assert_eq!(touch::read(&open().unwrap(), 7), 0);
    });
}
