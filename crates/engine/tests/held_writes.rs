//! First writes to guarded memory while a cut of it comes to its end.
//!
//! Unsafe: writes to tracked memory from another thread, and reads it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use userfault_engine::Pages;
use userfault_engine::tracked::{Aside, Tracked};

const HUGE: usize = 2 << 20;

/// Long enough for a fault to be answered on a machine that is not busy; if it is, the test proves less.
const A_WHILE: Duration = Duration::from_millis(50);

/// How long a test waits for what has to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Notes what was saved before a write.
#[derive(Default)]
struct Saved {
    blocks: AtomicUsize,
    first_bytes: AtomicUsize,
}

impl Aside for Saved {
    fn take(&self, offset: usize, _len: usize, copy: &dyn Fn(usize, &mut [u8])) {
        let mut byte = [0];
        copy(offset, &mut byte);
        self.first_bytes
            .fetch_add(usize::from(byte[0]), Ordering::SeqCst);
        self.blocks.fetch_add(1, Ordering::SeqCst);
    }
}

/// Writes `value` to an address from another thread, and tells when it is through.
fn write_elsewhere(address: usize, value: u8) -> mpsc::Receiver<()> {
    let (done, written) = mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: an address in memory that the test keeps mapped, and that it does not read meanwhile.
        unsafe { (address as *mut u8).write_volatile(value) };
        let _ = done.send(());
    });
    written
}

fn read(address: usize) -> u8 {
    // SAFETY: an address in memory that the test keeps mapped; racing writes are whole bytes.
    unsafe { (address as *const u8).read_volatile() }
}

#[test]
fn a_first_write_is_saved_and_passes_once_the_cut_is_over() {
    let memory = Tracked::new(2 * HUGE, Pages::Huge).expect("huge pages");
    let guard = memory.guard().expect("huge pages are guarded");
    let consumer = guard.subscribe();
    for block in 0..2 {
        // SAFETY: in bounds of the memory, which nobody else knows yet.
        unsafe { ((memory.start() + block * HUGE) as *mut u8).write_volatile(7) };
    }
    for round in 1..=3u8 {
        let saved = Arc::new(Saved::default());
        let begun = guard.cut(consumer, saved.clone()).unwrap();
        let pending: usize = begun.pending.iter().map(ExactSizeIterator::len).sum();
        let before = [read(memory.start()), read(memory.start() + HUGE)];
        let first = write_elsewhere(memory.start(), 10 + round);
        let second = write_elsewhere(memory.start() + HUGE, 20 + round);
        assert!(first.recv_timeout(A_WHILE).is_err());
        assert!(second.try_recv().is_err());
        assert_eq!(saved.blocks.load(Ordering::SeqCst), 0);
        assert_eq!(read(memory.start()), before[0]);
        drop(begun.held);
        first.recv_timeout(PATIENCE).expect("the write passes");
        second
            .recv_timeout(PATIENCE)
            .expect("and so does the other");
        assert_eq!(saved.blocks.load(Ordering::SeqCst), pending);
        let expected = before.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        assert_eq!(saved.first_bytes.load(Ordering::SeqCst), expected);
        assert_eq!(read(memory.start()), 10 + round);
        assert_eq!(read(memory.start() + HUGE), 20 + round);
        guard.end(begun.id);
    }
    guard.unsubscribe(consumer);
}
