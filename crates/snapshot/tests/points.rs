//! Points against copies made at their cuts, for every kind of memory.
//!
//! Unsafe: writes to tracked memory through raw pointers, as programs do.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use userfault_engine::Pages;
use userfault_engine::tracked::Tracked;
use userfault_snapshot::{Array, Checkpointer, Compress, Error, Op, Options, verify};

use common::{Folder, MIB, Memory, random, read, settle};

fn kinds() -> Vec<(&'static str, Memory)> {
    let mut kinds = vec![
        (
            "own small",
            Memory::Own(
                Tracked::new(5 * MIB + 12_345, Pages::Small).unwrap(),
                5 * MIB + 12_345,
            ),
        ),
        ("foreign", Memory::Foreign(vec![7; 3 * MIB + 77])),
        ("foreign, below a MiB", Memory::Foreign(vec![9; 50_001])),
    ];
    match Tracked::new(7 * MIB, Pages::Huge) {
        Ok(memory) => kinds.push(("own huge", Memory::Own(memory, 7 * MIB))),
        Err(error) => eprintln!("no huge pages here: {error}"),
    }
    kinds
}

#[test]
fn every_point_equals_a_copy_made_at_its_cut() {
    for compress in [None, Some(Compress::Lz4), Some(Compress::Zstd)] {
        for drain in [false, true] {
            let folder = Folder::new();
            let mut kinds = kinds();
            let arrays = kinds
                .iter()
                .map(|(name, memory)| memory.array(name))
                .collect();
            let options = Options {
                compress,
                drain,
                durable: false,
                ..Options::default()
            };
            let checkpointer = Checkpointer::open(folder.0.clone(), arrays, options).unwrap();
            let mut state = 42;
            let mut copies: Vec<Vec<Vec<u8>>> = Vec::new();
            for step in 0..12u64 {
                for (_, memory) in &mut kinds {
                    let bytes = memory.bytes();
                    for _ in 0..random(&mut state) % 400 {
                        let at = random(&mut state) % bytes.len();
                        bytes[at] = random(&mut state) as u8;
                    }
                    if step % 5 == 3 {
                        let len = bytes.len();
                        bytes[len / 3..len / 2].fill(0);
                    }
                }
                let point = checkpointer.save(Some(step), "null".into()).unwrap();
                copies.push(
                    kinds
                        .iter_mut()
                        .map(|(_, memory)| memory.bytes().to_vec())
                        .collect(),
                );
                // The program goes on at once.
                for (_, memory) in &mut kinds {
                    let len = memory.len();
                    memory.bytes()[random(&mut state) % len] ^= 0xff;
                }
                if step % 3 == 0 {
                    point.wait(Duration::from_secs(60)).unwrap().unwrap();
                    std::thread::sleep(Duration::from_millis(if drain { 250 } else { 0 }));
                }
            }
            settle(&checkpointer).unwrap();
            for (step, arrays) in copies.iter().enumerate() {
                for (number, expected) in arrays.iter().enumerate() {
                    let got = read(&folder.0, step as u64, number);
                    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
                    assert_eq!(
                        (got.len(), differs),
                        (expected.len(), None),
                        "step {step}, {}, compress {compress:?}, drain {drain}",
                        kinds[number].0
                    );
                }
            }
            let verified = verify(&folder.0, None, &mut |_| true).unwrap();
            assert_eq!(verified.damage, []);
            assert_eq!(verified.points, 12);
        }
    }
}

#[test]
fn a_writer_at_full_speed_never_gets_into_a_point_of_guarded_memory() {
    let Ok(memory) = Tracked::new(16 * MIB, Pages::Huge) else {
        eprintln!("no huge pages here");
        return;
    };
    let folder = Folder::new();
    let array = Array {
        name: "a".into(),
        description: "{}".into(),
        start: memory.start(),
        nbytes: 16 * MIB,
        always_copy: false,
    };
    let options = Options {
        durable: false,
        staging: 4 * MIB,
        ..Options::default()
    };
    let checkpointer = Checkpointer::open(folder.0.clone(), vec![array], options).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (memory, stop) = (memory.clone(), stop.clone());
        std::thread::spawn(move || {
            // Each word is written in order with the number of the round: at any instant a prefix has the
            // new number and the rest the old one.
            let words = 16 * MIB / 8;
            let mut round = 0u64;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for word in (0..words).step_by(64) {
                    // SAFETY: in bounds of memory that `memory` keeps; nobody else writes.
                    unsafe {
                        ((memory.start() + word * 8) as *mut u64).write_volatile(round);
                    }
                }
            }
        })
    };
    for step in 0..20 {
        let point = checkpointer.save(Some(step), "null".into()).unwrap();
        point.wait(Duration::from_secs(60)).unwrap().unwrap();
        assert!(point.extra_bytes() <= 4 * MIB);
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    for step in 0..20 {
        let bytes = read(&folder.0, step, 0);
        let rounds: Vec<u64> = bytes
            .chunks_exact(512)
            .map(|chunk| u64::from_le_bytes(chunk[..8].try_into().unwrap()))
            .collect();
        let first = rounds[0];
        let turn = rounds
            .iter()
            .position(|round| *round != first)
            .unwrap_or(rounds.len());
        assert!(
            rounds[turn..]
                .iter()
                .all(|round| *round == first.wrapping_sub(1)),
            "step {step}: a round behind {turn} is neither {first} nor the one before"
        );
    }
}

#[test]
fn rewriting_equal_bytes_costs_nothing() {
    let folder = Folder::new();
    let mut memory = Memory::Own(Tracked::new(4 * MIB, Pages::Small).unwrap(), 4 * MIB);
    let mut state = 1;
    memory.bytes().fill_with(|| random(&mut state) as u8);
    let arrays = vec![memory.array("a")];
    let options = Options {
        drain: false,
        ..Options::default()
    };
    let checkpointer = Checkpointer::open(folder.0.clone(), arrays, options).unwrap();
    checkpointer.save(None, "null".into()).unwrap();
    let copy = memory.bytes().to_vec();
    memory.bytes().copy_from_slice(&copy);
    checkpointer.save(None, "null".into()).unwrap();
    settle(&checkpointer).unwrap();
    let sizes: Vec<u64> = checkpointer
        .points()
        .unwrap()
        .iter()
        .map(|point| {
            let name = format!("segment-{:010}", point.segment);
            std::fs::metadata(folder.0.join(name)).unwrap().len()
        })
        .collect();
    assert!(sizes[0] > 4 << 20 && sizes[1] < 64 << 10, "{sizes:?}");
}

#[test]
fn every_call_on_a_file_may_fail_and_the_points_before_and_after_are_whole() {
    let ops = [
        Op::Create,
        Op::Write,
        Op::Sync,
        Op::Rename,
        Op::Punch,
        Op::Remove,
    ];
    for op in ops {
        for which in 0..40u64 {
            let folder = Folder::new();
            let mut memory = Memory::Own(Tracked::new(2 * MIB, Pages::Small).unwrap(), 2 * MIB);
            let armed = Arc::new(AtomicBool::new(false));
            let calls = Arc::new(AtomicU64::new(0));
            let fault = {
                let (armed, calls) = (armed.clone(), calls.clone());
                Arc::new(move |each: Op| {
                    if each == op
                        && armed.load(Ordering::Relaxed)
                        && calls.fetch_add(1, Ordering::Relaxed) == which
                    {
                        return Err(std::io::Error::from_raw_os_error(28));
                    }
                    Ok(())
                })
            };
            let options = Options {
                drain: which % 2 == 0,
                max_to_keep: Some(2),
                fault: Some(fault),
                ..Options::default()
            };
            let arrays = vec![memory.array("a")];
            let checkpointer = Checkpointer::open(folder.0.clone(), arrays, options).unwrap();
            let mut state = 99 + which;
            let mut copies = Vec::new();
            let mut failures = 0;
            for step in 0..6u64 {
                if step == 2 {
                    armed.store(true, Ordering::Relaxed);
                }
                for _ in 0..50 {
                    let at = random(&mut state) % (2 * MIB);
                    memory.bytes()[at] = random(&mut state) as u8;
                }
                let copy = memory.bytes().to_vec();
                match checkpointer.save(Some(step), "null".into()) {
                    Ok(point) => {
                        copies.push((step, copy));
                        if point.wait(Duration::from_secs(60)).unwrap().is_err() {
                            failures += 1;
                        }
                    }
                    // The error is told again.
                    Err(Error::Io { .. }) => failures += 1,
                    Err(other) => panic!("{other}"),
                }
            }
            let _ = settle(&checkpointer);
            // The disk has room again: the next save has everything.
            let _ = settle(&checkpointer);
            copies.push((6, memory.bytes().to_vec()));
            let point = checkpointer.save(Some(6), "null".into()).unwrap();
            if point.wait(Duration::from_secs(60)).unwrap().is_err() {
                let _ = settle(&checkpointer);
                let point = checkpointer.save(Some(7), "null".into()).unwrap();
                copies.push((7, memory.bytes().to_vec()));
                point.wait(Duration::from_secs(60)).unwrap().unwrap();
            }
            let _ = settle(&checkpointer);
            for point in checkpointer.points().unwrap() {
                let copy = &copies
                    .iter()
                    .find(|(step, _)| *step == point.step)
                    .unwrap()
                    .1;
                assert!(read(&folder.0, point.step, 0) == *copy, "{op:?} {which}");
            }
            let verified = verify(&folder.0, None, &mut |_| true).unwrap();
            assert_eq!(verified.damage, [], "{op:?} {which}");
            assert!(
                checkpointer.points().unwrap().last().unwrap().step >= 6,
                "{op:?} {which}"
            );
            checkpointer.close();
            assert!(checkpointer.ended(Duration::from_secs(10)));
            if calls.load(Ordering::Relaxed) <= which {
                assert_eq!(failures, 0);
                break;
            }
        }
    }
}

#[test]
fn a_store_that_hangs_fails_the_point_and_the_writer_goes_on() {
    let folder = Folder::new();
    let Ok(memory) = Tracked::new(8 * MIB, Pages::Huge) else {
        eprintln!("no huge pages here");
        return;
    };
    let hang = Arc::new(AtomicBool::new(false));
    let fault = {
        let hang = hang.clone();
        Arc::new(move |op: Op| {
            while op == Op::Write && hang.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
    };
    let options = Options {
        staging: 4 * MIB,
        timeout: Duration::from_millis(300),
        fault: Some(fault),
        ..Options::default()
    };
    let mut memory = Memory::Own(memory, 8 * MIB);
    memory.bytes().fill(1);
    let checkpointer =
        Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    checkpointer.save(Some(1), "null".into()).unwrap();
    settle(&checkpointer).unwrap();
    memory.bytes().fill(2);
    hang.store(true, Ordering::Relaxed);
    let point = checkpointer.save(Some(2), "null".into()).unwrap();
    // More blocks than staging holds: the writer waits, and goes on when the point is given up.
    memory.bytes().fill(3);
    let outcome = point.wait(Duration::from_secs(10)).unwrap();
    assert!(matches!(outcome, Err(Error::TimedOut(_))), "{outcome:?}");
    assert!(matches!(
        checkpointer.save(Some(3), "null".into()),
        Err(Error::TimedOut(_))
    ));
    hang.store(false, Ordering::Relaxed);
    settle(&checkpointer).unwrap();
    let point = checkpointer.save(Some(4), "null".into()).unwrap();
    point.wait(Duration::from_secs(10)).unwrap().unwrap();
    assert!(read(&folder.0, 4, 0).iter().all(|byte| *byte == 3));
    assert!(read(&folder.0, 1, 0).iter().all(|byte| *byte == 1));
    let steps: Vec<u64> = checkpointer
        .points()
        .unwrap()
        .iter()
        .map(|point| point.step)
        .collect();
    assert_eq!(steps, [1, 4]);
}

#[test]
fn any_changed_byte_is_found() {
    for compress in [None, Some(Compress::Zstd)] {
        let folder = Folder::new();
        let mut memory = Memory::Own(Tracked::new(MIB, Pages::Small).unwrap(), MIB);
        memory.bytes()[..MIB / 2].fill(5);
        let options = Options {
            compress,
            max_to_keep: Some(2),
            ..Options::default()
        };
        let arrays = vec![memory.array("weights")];
        let checkpointer = Checkpointer::open(folder.0.clone(), arrays, options).unwrap();
        let mut state = 5;
        for step in 0..4 {
            for _ in 0..30 {
                let at = random(&mut state) % MIB;
                memory.bytes()[at] = random(&mut state) as u8;
            }
            checkpointer.save(Some(step), "null".into()).unwrap();
        }
        settle(&checkpointer).unwrap();
        checkpointer.close();
        assert!(checkpointer.ended(Duration::from_secs(10)));
        assert_eq!(verify(&folder.0, None, &mut |_| true).unwrap().damage, []);
        let mut files: Vec<PathBuf> = std::fs::read_dir(&folder.0)
            .unwrap()
            .map(|item| item.unwrap().path())
            .filter(|path| path.metadata().unwrap().len() > 0)
            .collect();
        files.sort();
        for path in files {
            let bytes = std::fs::read(&path).unwrap();
            for _ in 0..300 {
                let at = random(&mut state) % bytes.len();
                let mut spoilt = bytes.clone();
                spoilt[at] ^= 1 << (random(&mut state) % 8);
                std::fs::write(&path, &spoilt).unwrap();
                let found = verify(&folder.0, None, &mut |_| true).unwrap();
                let named = found.damage.len() + found.unused.len() > 0;
                assert!(named, "{} at {at}", path.display());
            }
            std::fs::write(&path, &bytes).unwrap();
        }
    }
}

#[test]
fn what_a_prune_costs_does_not_grow_with_the_points_that_have_been() {
    let folder = Folder::new();
    let mut memory = Memory::Own(Tracked::new(8 * MIB, Pages::Small).unwrap(), 8 * MIB);
    for (at, byte) in memory.bytes().iter_mut().enumerate() {
        *byte = (at % 251) as u8;
    }
    let punches = Arc::new(AtomicU64::new(0));
    let counted = punches.clone();
    let options = Options {
        drain: false,
        durable: false,
        max_to_keep: Some(2),
        fault: Some(Arc::new(move |op| {
            counted.fetch_add(u64::from(op == Op::Punch), Ordering::Relaxed);
            Ok(())
        })),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    let mut state = 5;
    let mut of_each = Vec::new();
    for step in 0..24u64 {
        for _ in 0..10 {
            let at = random(&mut state) % (8 * MIB);
            memory.bytes()[at] ^= 1 + step as u8;
        }
        let before = punches.load(Ordering::Relaxed);
        ck.save(Some(step), "null".into()).unwrap();
        settle(&ck).unwrap();
        of_each.push(punches.load(Ordering::Relaxed) - before);
    }
    // Ten blocks and eight leaves at most, a directory and a record go with each point.
    assert!(
        of_each[3..]
            .iter()
            .all(|punches| (1..=20).contains(punches)),
        "{of_each:?}"
    );
    assert_eq!(read(&folder.0, 23, 0), memory.bytes());
    assert_eq!(read(&folder.0, 22, 0).len(), 8 * MIB);
    assert_eq!(verify(&folder.0, None, &mut |_| true).unwrap().damage, []);
}

#[test]
fn the_drain_goes_on_after_a_prune_that_took_longer_than_its_pauses() {
    let folder = Folder::new();
    let len = 4 * MIB;
    let mut memory = Memory::Own(Tracked::new(len, Pages::Small).unwrap(), len);
    let (slow, writes) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let (is_slow, counted) = (slow.clone(), writes.clone());
    let options = Options {
        durable: false,
        fault: Some(Arc::new(move |op| {
            counted.fetch_add(u64::from(op == Op::Write), Ordering::Relaxed);
            if op == Op::Rename && is_slow.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs(1));
            }
            Ok(())
        })),
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    for step in 0..2u64 {
        memory.bytes().fill(1 + step as u8);
        ck.save(Some(step), "null".into()).unwrap();
        settle(&ck).unwrap();
    }
    slow.store(true, Ordering::Relaxed);
    ck.prune(1).unwrap();
    settle(&ck).unwrap();
    assert_eq!(ck.points().unwrap().len(), 1);
    let before = writes.load(Ordering::Relaxed);
    let until = std::time::Instant::now() + Duration::from_secs(30);
    // Nobody asks for a point: whatever is written now is drained.
    for turn in 0u8.. {
        memory.bytes()[..64 << 10].fill(100 + turn % 100);
        std::thread::sleep(Duration::from_millis(100));
        if writes.load(Ordering::Relaxed) > before {
            break;
        }
        assert!(std::time::Instant::now() < until, "nothing is drained");
    }
}
