//! What may come between a cut and the end of its save, step by step: no write is lost, none gets in early.
//!
//! A call on a file can be made to wait (`Gate`), so that the thread behind the cuts stands still at a known
//! place while the test does something else.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use userfault_engine::Pages;
use userfault_engine::tracked::Tracked;
use userfault_snapshot::{Checkpointer, Error, Fault, Op, Options, verify};

use common::{Folder, MIB, Memory, read, settle};

const WAIT: Duration = Duration::from_secs(60);

/// Lets calls on files pass, or hold them, or fails them.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    full: AtomicBool,
    /// The call of this number fails, counted from 1; later ones do not.
    fails: AtomicU64,
    calls: AtomicU64,
    /// Calls that stand before the closed gate.
    waiting: AtomicU64,
}

impl Gate {
    fn fault(self: &Arc<Gate>, op: Op) -> Fault {
        let gate = self.clone();
        Arc::new(move |each: Op| {
            if each == op {
                gate.waiting.fetch_add(1, Ordering::SeqCst);
                while gate.closed.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                gate.waiting.fetch_sub(1, Ordering::SeqCst);
                let number = gate.calls.fetch_add(1, Ordering::SeqCst) + 1;
                if gate.full.load(Ordering::SeqCst) || number == gate.fails.load(Ordering::SeqCst) {
                    return Err(std::io::Error::from_raw_os_error(28));
                }
            }
            Ok(())
        })
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }

    /// Waits until a call stands before the gate.
    fn wait(&self) {
        let began = Instant::now();
        while self.waiting.load(Ordering::SeqCst) == 0 {
            assert!(began.elapsed() < WAIT, "no call came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn small(bytes: usize) -> Memory {
    Memory::Own(Tracked::new(bytes, Pages::Small).unwrap(), bytes)
}

/// A checkpointer without a drain: what it is told it finds by its cuts alone.
fn plain(folder: &Folder, memory: &Memory) -> Checkpointer {
    let options = Options {
        drain: false,
        durable: false,
        ..Options::default()
    };
    Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap()
}

fn first_bytes(folder: &Folder, step: u64, pages: std::ops::Range<usize>) -> Vec<u8> {
    let bytes = read(&folder.0, step, 0);
    pages.map(|page| bytes[page * 4096]).collect()
}

#[test]
fn a_write_between_the_cut_and_the_protection_behind_it_is_in_the_next_point() {
    let folder = Folder::new();
    let mut memory = small(MIB);
    memory.bytes().fill(1);
    let gate = Arc::new(Gate::default());
    let options = Options {
        drain: false,
        durable: false,
        fault: Some(gate.fault(Op::Write)),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    gate.close();
    ck.save(Some(1), "null".into()).unwrap();
    // The saver stands before its first write: nothing is protected again. Every page is still written
    // without anybody being told.
    gate.wait();
    memory.bytes()[3 * 4096] = 2;
    // This one goes back to what the point holds, and away from it again after the protection.
    memory.bytes()[5 * 4096] = 2;
    memory.bytes()[5 * 4096] = 1;
    gate.open();
    settle(&ck).unwrap();
    memory.bytes()[5 * 4096] = 3;
    ck.save(Some(2), "null".into()).unwrap();
    settle(&ck).unwrap();
    assert_eq!(first_bytes(&folder, 1, 2..7), [1, 1, 1, 1, 1]);
    assert_eq!(first_bytes(&folder, 2, 2..7), [1, 2, 1, 3, 1]);
}

#[test]
fn two_cuts_before_the_first_is_saved_keep_both_and_what_came_after() {
    let folder = Folder::new();
    let mut memory = small(MIB);
    memory.bytes().fill(1);
    let gate = Arc::new(Gate::default());
    let options = Options {
        drain: false,
        durable: false,
        fault: Some(gate.fault(Op::Write)),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    gate.close();
    ck.save(Some(1), "null".into()).unwrap();
    gate.wait();
    memory.bytes()[4096] = 2;
    ck.save(Some(2), "null".into()).unwrap();
    // As the first point has it: equal to that proves nothing, for the second is still to be saved.
    memory.bytes()[4096] = 1;
    gate.open();
    settle(&ck).unwrap();
    ck.save(Some(3), "null".into()).unwrap();
    settle(&ck).unwrap();
    for (step, expected) in [(1, 1), (2, 2), (3, 1)] {
        assert_eq!(first_bytes(&folder, step, 1..2), [expected], "step {step}");
    }
}

#[test]
fn a_drain_under_way_at_a_cut_takes_nothing_that_was_written_after_it() {
    let (folder, other) = (Folder::new(), Folder::new());
    let mut memory = small(4 * MIB);
    memory.bytes().fill(1);
    let gate = Arc::new(Gate::default());
    let options = Options {
        durable: false,
        fault: Some(gate.fault(Op::Write)),
        ..Options::default()
    };
    gate.close();
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    // The drain has copied its first pages and stands before writing them; the rest it will ask for later.
    gate.wait();
    ck.save(Some(1), "null".into()).unwrap();
    memory.bytes().fill(2);
    // Another consumer asks the kernel, and so the first one's map hears of the new writes.
    let asking = plain(&other, &memory);
    asking.save(Some(1), "null".into()).unwrap();
    settle(&asking).unwrap();
    gate.open();
    settle(&ck).unwrap();
    ck.save(Some(2), "null".into()).unwrap();
    settle(&ck).unwrap();
    assert!(read(&folder.0, 1, 0).iter().all(|byte| *byte == 1));
    assert!(read(&folder.0, 2, 0).iter().all(|byte| *byte == 2));
}

/// A checkpointer of one array with so much staging, and the gate that its writes go through.
fn with_staging(staging: usize, folder: &Folder, memory: &Memory) -> (Checkpointer, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let options = Options {
        drain: false,
        durable: false,
        staging,
        timeout: WAIT,
        fault: Some(gate.fault(Op::Write)),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    (ck, gate)
}

#[test]
fn a_cut_that_waits_for_room_does_not_wait_for_a_saver_that_waits_for_the_cut() {
    let folder = Folder::new();
    let mut memory = small(12 * MIB);
    memory.bytes().fill(1);
    let (ck, _gate) = with_staging(4 * MIB, &folder, &memory);
    let began = Instant::now();
    for step in 0..20u8 {
        memory.bytes().fill(step + 2);
        ck.save(Some(u64::from(step)), "null".into()).unwrap();
    }
    settle(&ck).unwrap();
    assert!(began.elapsed() < WAIT / 2, "it ended by its timeout");
    for step in 0..20u8 {
        let bytes = read(&folder.0, u64::from(step), 0);
        assert!(bytes.iter().all(|byte| *byte == step + 2), "step {step}");
    }
}

#[test]
fn a_cut_that_staging_holds_does_not_wait_for_a_disk_that_hangs() {
    let folder = Folder::new();
    let mut memory = small(8 * MIB);
    memory.bytes().fill(1);
    // Two chunks more than the cut: the last one of each of the two who copy may be nearly empty.
    let (ck, gate) = with_staging(12 * MIB, &folder, &memory);
    ck.save(Some(0), "null".into()).unwrap();
    settle(&ck).unwrap();
    memory.bytes().fill(2);
    gate.close();
    let point = ck.save(Some(1), "null".into()).unwrap();
    assert!(point.outcome().is_none(), "the disk hangs");
    memory.bytes().fill(3);
    gate.open();
    settle(&ck).unwrap();
    assert!(read(&folder.0, 1, 0).iter().all(|byte| *byte == 2));
    // Four chunks if one has copied; if two have, the last one of each need not be full.
    let chunks = point.extra_bytes() / (2 * MIB);
    assert!((4..=5).contains(&chunks), "{chunks}");
}

#[test]
fn a_save_that_fails_while_the_next_cut_waits_for_room_ends_both_at_once() {
    let folder = Folder::new();
    let mut memory = small(12 * MIB);
    memory.bytes().fill(1);
    let (ck, gate) = with_staging(8 * MIB, &folder, &memory);
    ck.save(Some(0), "null".into()).unwrap();
    settle(&ck).unwrap();
    memory.bytes()[..2 * MIB].fill(2);
    gate.close();
    let first = ck.save(Some(1), "null".into()).unwrap();
    gate.wait();
    memory.bytes().fill(3);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| ck.save(Some(2), "null".into()));
        // The second cut fills staging, and waits.
        std::thread::sleep(Duration::from_millis(300));
        gate.full.store(true, Ordering::SeqCst);
        gate.open();
        assert!(matches!(first.wait(WAIT).unwrap(), Err(Error::Io { .. })));
        let second = second.join().unwrap().unwrap();
        assert!(second.wait(WAIT).unwrap().is_err());
    });
    assert!(began.elapsed() < WAIT / 2, "it ended by its timeout");
    gate.full.store(false, Ordering::SeqCst);
    let _ = settle(&ck);
    ck.save(Some(3), "null".into()).unwrap();
    settle(&ck).unwrap();
    assert!(read(&folder.0, 3, 0).iter().all(|byte| *byte == 3));
    assert_eq!(verify(&folder.0, None, &mut |_| true).unwrap().damage, []);
}

#[test]
fn a_full_disk_while_old_segments_are_gathered_does_not_fail_the_saves_after_it() {
    let folder = Folder::new();
    let mut memory = small(MIB);
    memory.bytes().fill(1);
    let gate = Arc::new(Gate::default());
    let options = Options {
        drain: false,
        durable: false,
        fault: Some(gate.fault(Op::Write)),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    // A page in each of more segments than a point may need.
    for step in 0..70u64 {
        let page = step as usize;
        memory.bytes()[page * 4096..][..4096].fill(step as u8 + 2);
        if step == 64 {
            // Behind the header and the block that was written: in the middle of gathering.
            let next = gate.calls.load(Ordering::SeqCst) + 1;
            gate.fails.store(next + 5, Ordering::SeqCst);
        }
        if let Ok(point) = ck.save(Some(step), "null".into()) {
            let failed = point.wait(WAIT).unwrap().is_err();
            assert_eq!(failed, step == 64, "step {step}");
        }
    }
    let _ = settle(&ck);
    ck.save(Some(100), "null".into()).unwrap();
    settle(&ck).unwrap();
    assert!(read(&folder.0, 100, 0) == memory.bytes());
    assert!(ck.points().unwrap().last().unwrap().segments.len() <= 64);
    assert_eq!(verify(&folder.0, None, &mut |_| true).unwrap().damage, []);
}

#[test]
fn a_damaged_old_segment_that_is_gathered_fails_one_point_and_is_saved_anew_from_memory() {
    let folder = Folder::new();
    let mut memory = small(MIB);
    memory.bytes().fill(1);
    let ck = plain(&folder, &memory);
    let mut failed = 0;
    for step in 0..70usize {
        memory.bytes()[step * 4096..][..4096].fill(step as u8 + 2);
        if step == 40 {
            let first = ck.points().unwrap()[2].segment;
            let path = folder.0.join(format!("segment-{first:010}"));
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[4096 + 77] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
        match ck.save(Some(step as u64), "null".into()) {
            Ok(point) => {
                if let Err(error) = point.wait(WAIT).unwrap() {
                    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
                    failed += 1;
                }
            }
            Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
    }
    let _ = settle(&ck);
    assert_eq!(failed, 1);
    assert!(read(&folder.0, 69, 0) == memory.bytes());
    let damage = verify(&folder.0, Some(69), &mut |_| true).unwrap().damage;
    assert_eq!(damage, []);
}

#[test]
fn the_number_of_a_save_that_failed_can_be_used_again() {
    let folder = Folder::new();
    let mut memory = small(MIB);
    memory.bytes().fill(1);
    let gate = Arc::new(Gate::default());
    let options = Options {
        drain: false,
        fault: Some(gate.fault(Op::Write)),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    gate.full.store(true, Ordering::SeqCst);
    let failed = ck.save(Some(7), "null".into()).unwrap();
    assert!(failed.wait(WAIT).unwrap().is_err());
    gate.full.store(false, Ordering::SeqCst);
    assert!(settle(&ck).is_err());
    ck.save(Some(7), "null".into()).unwrap();
    settle(&ck).unwrap();
    assert!(ck.save(Some(7), "null".into()).is_err());
    assert_eq!(first_bytes(&folder, 7, 0..1), [1]);
}
