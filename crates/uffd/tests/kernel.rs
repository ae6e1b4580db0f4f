//! The interface against the running kernel. Nothing here blocks on a fault: pages are filled before they
//! are touched, and results are read from pagemap.

use std::ptr;

use userfault_uffd::abi::*;
use userfault_uffd::scan::Scan;
use userfault_uffd::{
    Fill, Filled, KernelFaults, Message, MessageBuffer, OpenOptions, Outcome, Pagemap, Uffd, Way,
    fill, vmflags,
};

const PAGE: usize = 4096;

/// Private anonymous memory that goes away with the test.
struct Memory {
    base: usize,
    len: usize,
}

impl Memory {
    fn new(pages: usize) -> Memory {
        let len = pages * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Memory {
            base: base as usize,
            len,
        }
    }

    fn page(&self, index: usize) -> usize {
        self.base + index * PAGE
    }

    fn byte(&self, offset: usize) -> u8 {
        assert!(offset < self.len);
        // SAFETY: inside the mapping, and the tests read filled pages only.
        unsafe { ptr::read_volatile((self.base + offset) as *const u8) }
    }

    fn set(&self, offset: usize, value: u8) {
        assert!(offset < self.len);
        // SAFETY: inside the mapping, and the tests write filled, unprotected pages only.
        unsafe { ptr::write_volatile((self.base + offset) as *mut u8, value) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it any more.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.len) };
    }
}

/// Ends the test program if a thread sleeps on a fault that nobody answers.
fn watchdog() {
    // SAFETY: no handler is installed, so the alarm only ever ends the process.
    unsafe { libc::alarm(60) };
}

/// A userfaultfd for user mode (which every account may have) with the features of `require`.
fn open(require: u64) -> Uffd {
    watchdog();
    let options = OpenOptions {
        kernel_faults: KernelFaults::Unwanted,
        require,
        ..OpenOptions::default()
    };
    Uffd::open(&options).expect("a userfaultfd")
}

fn copy(uffd: &Uffd, dst: usize, src: &[u8], mode: u64) -> Outcome {
    // SAFETY: the source is borrowed, the destination is a test's own memory that nobody refers to.
    unsafe { uffd.copy(dst, src.as_ptr() as usize, src.len(), mode) }
}

#[test]
fn a_range_that_meets_a_present_page_tells_how_far_it_came_and_then_why_it_stopped() {
    let (uffd, memory) = (open(0), Memory::new(4));
    let register = uffd.register(memory.base, memory.len, UFFDIO_REGISTER_MODE_MISSING);
    assert_eq!(register.errno, 0);
    assert_ne!(register.done & (1 << _UFFDIO_COPY), 0);
    let source = vec![7u8; 4 * PAGE];
    assert_eq!(
        copy(&uffd, memory.page(2), &source[..PAGE], 0),
        Outcome {
            done: PAGE as i64,
            errno: 0
        }
    );
    let partial = copy(&uffd, memory.base, &source, 0);
    assert_eq!(
        partial,
        Outcome {
            done: 2 * PAGE as i64,
            errno: libc::EAGAIN
        }
    );
    assert!(!partial.is_event_pending());
    let reason = copy(&uffd, memory.page(2), &source[..2 * PAGE], 0);
    assert_eq!(
        reason,
        Outcome {
            done: 0,
            errno: libc::EEXIST
        }
    );
    assert_eq!(memory.byte(PAGE), 7);
}

#[test]
fn the_fill_rules_skip_what_others_filled_and_report_what_must_not_be_there() {
    let (uffd, memory) = (open(0), Memory::new(4));
    assert!(
        uffd.register(memory.base, memory.len, UFFDIO_REGISTER_MODE_MISSING)
            .is_ok()
    );
    let source = vec![9u8; 4 * PAGE];
    assert!(copy(&uffd, memory.page(1), &source[..PAGE], 0).is_ok());
    let own = fill::fill(memory.len, PAGE, Fill::OwnAbsent, |at, len| {
        copy(&uffd, memory.base + at, &source[at..at + len], 0)
    });
    assert_eq!(own, Filled::StalePage { at: PAGE });
    let shared = fill::fill(memory.len, PAGE, Fill::Shared, |at, len| {
        copy(&uffd, memory.base + at, &source[at..at + len], 0)
    });
    assert_eq!(shared, Filled::Whole { skipped: 2 * PAGE });
    assert_eq!(memory.byte(3 * PAGE), 9);
    // SAFETY: nobody relies on the memory.
    assert!(unsafe { uffd.unregister(memory.base, memory.len) }.is_ok());
    let gone = fill::fill(memory.len, PAGE, Fill::Shared, |at, len| {
        copy(&uffd, memory.base + at, &source[at..at + len], 0)
    });
    assert_eq!(gone, Filled::LayoutChanged { at: 0 });
}

#[test]
fn an_unread_event_stops_every_fill_until_it_is_read() {
    let (uffd, memory) = (open(UFFD_FEATURE_EVENT_REMOVE), Memory::new(2));
    assert!(
        uffd.register(memory.base, memory.len, UFFDIO_REGISTER_MODE_MISSING)
            .is_ok()
    );
    let source = vec![1u8; PAGE];
    std::thread::scope(|scope| {
        let (base, len) = (memory.base, memory.len);
        // SAFETY: the memory outlives the scope, and the test reads it only when it is filled again.
        scope.spawn(move || unsafe { libc::madvise(base as *mut _, len, libc::MADV_DONTNEED) });
        assert!(uffd.wait(10_000).expect("poll"));
        let refused = copy(&uffd, memory.base, &source, 0);
        assert_eq!(
            refused,
            Outcome {
                done: 0,
                errno: libc::EAGAIN
            }
        );
        assert!(refused.is_event_pending());
        let filled = fill::fill(PAGE, PAGE, Fill::Shared, |_, _| {
            copy(&uffd, memory.base, &source, 0)
        });
        assert_eq!(filled, Filled::EventPending { at: 0 });
        let mut buffer = MessageBuffer::<8>::new();
        let messages: Vec<Message> = uffd
            .read_messages(&mut buffer)
            .expect("the event")
            .collect();
        let end = memory.base + memory.len;
        assert!(
            matches!(messages[..], [Message::Remove { start, end: e }] if start == memory.base && e == end)
        );
    });
    assert!(copy(&uffd, memory.base, &source, 0).is_ok());
    let mut buffer = MessageBuffer::<1>::new();
    let empty = uffd
        .read_messages(&mut buffer)
        .err()
        .expect("no message")
        .raw_os_error();
    assert_eq!(empty, Some(libc::EAGAIN));
}

#[test]
fn a_scan_runs_to_the_end_of_its_range_through_a_buffer_of_one_region() {
    let (uffd, memory) = (open(UFFD_FEATURE_WP_ASYNC), Memory::new(8));
    assert!(
        uffd.register(memory.base, memory.len, UFFDIO_REGISTER_MODE_WP)
            .is_ok()
    );
    for page in 0..8 {
        memory.set(page * PAGE, 1);
    }
    assert!(
        uffd.writeprotect(memory.base, memory.len, UFFDIO_WRITEPROTECT_MODE_WP)
            .is_ok()
    );
    for page in [1, 3, 4, 6] {
        memory.set(page * PAGE, 2);
    }
    let pagemap = Pagemap::own().expect("pagemap");
    assert!(pagemap.entry(memory.page(0)).unwrap().write_protected());
    assert!(!pagemap.entry(memory.page(1)).unwrap().write_protected());
    let scan = Scan {
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        any_of: PAGE_IS_WRITTEN,
        report: PAGE_IS_WRITTEN,
        ..Scan::default()
    };
    let mut written = Vec::new();
    let mut buffer = [page_region::default(); 1];
    let range = memory.base..memory.base + memory.len;
    pagemap
        .scan_each(range.clone(), &scan, &mut buffer, |r| {
            written.extend((r.start as usize..r.end as usize).step_by(PAGE));
        })
        .expect("scan");
    assert_eq!(written, [1, 3, 4, 6].map(|page| memory.page(page)));
    let mut again = 0;
    pagemap
        .scan_each(range, &scan, &mut buffer, |_| again += 1)
        .expect("scan");
    assert_eq!(again, 0);
}

#[test]
fn smaps_shows_the_modes_of_a_registered_range() {
    let (uffd, memory) = (open(0), Memory::new(2));
    let mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP;
    assert!(uffd.register(memory.base, memory.len, mode).is_ok());
    let found = vmflags::own(memory.base..memory.base + memory.len).expect("smaps");
    assert_eq!(found.len(), 1);
    assert!(found[0].has("um") && found[0].has("uw") && !found[0].has("ui"));
    assert_eq!(found[0].permissions, "rw-p");
}

#[test]
fn features_that_the_kernel_lacks_are_named_when_required_and_left_out_when_preferred() {
    let unknown = 1 << 40;
    let options = OpenOptions {
        kernel_faults: KernelFaults::Unwanted,
        ..OpenOptions::default()
    };
    let error = Uffd::open(&OpenOptions {
        require: unknown,
        ..options
    })
    .expect_err("no such feature");
    assert!(error.to_string().contains("bit 40"), "{error}");
    let uffd = Uffd::open(&OpenOptions {
        prefer: unknown | UFFD_FEATURE_SIGBUS,
        ..options
    })
    .unwrap();
    assert_eq!(uffd.features().enabled, UFFD_FEATURE_SIGBUS);
    assert!(!uffd.kernel_faults());
    assert_eq!(uffd.way(), Way::Syscall);
}
