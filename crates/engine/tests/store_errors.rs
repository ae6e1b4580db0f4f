//! What becomes of touches, flushes and neighbours when a store fails, is slow, or does not come back.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use userfault_engine::{Access, Error, FaultWay, OnError, Region};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

const BLOCKS: usize = 12;
const EIO: Action = Action::Fail { errno: libc::EIO };

struct Faulty {
    memory: Arc<MemoryStore>,
    store: Arc<FaultyStore>,
    region: Arc<Region>,
    kind: Kind,
    len: usize,
}

/// A region of which `blocks` blocks may be in memory, over a store that fails by plan.
fn faulty(kind: Kind, blocks: usize, retry_for: u64, plan: Vec<Rule>) -> Faulty {
    faulty_of(BLOCKS, kind, blocks, retry_for, plan)
}

/// The same, of `all` blocks.
fn faulty_of(all: usize, kind: Kind, blocks: usize, retry_for: u64, plan: Vec<Rule>) -> Faulty {
    let len = all * kind.block;
    let memory = Arc::new(MemoryStore::new(patterned(len)));
    let store = Arc::new(FaultyStore::new(memory.clone(), plan));
    let mut options = options(
        kind,
        Access::ReadWrite,
        len,
        Some((blocks * kind.block) as u64 + (64 << 10)),
    );
    options.retry_for = Duration::from_millis(retry_for);
    options.on_error = OnError::Retry;
    let region = Region::open(store.clone(), options).unwrap();
    Faulty {
        memory,
        store,
        region,
        kind,
        len,
    }
}

impl Faulty {
    /// A rule for the store's bytes of one block.
    fn of_block(&self, call: Call, action: Action, block: usize) -> Rule {
        let start = (block * self.kind.block) as u64;
        Rule::every(call, action).within(start, start + self.kind.block as u64)
    }
}

#[test]
fn a_touch_of_a_block_that_cannot_be_read_is_a_bus_error_and_one_line_says_why() {
    {
        let output = dies!(30, libc::SIGBUS, {
            let faulty = faulty(COPIED_64K, 6, 100, vec![]);
            faulty
                .store
                .set_plan(vec![faulty.of_block(Call::Read, EIO, 3)]);
            assert_eq!(touch::read(&faulty.region, 0), pattern(0));
            touch::read(&faulty.region, 3 * faulty.kind.block + 5);
        });
        let lines: Vec<&str> = output
            .lines()
            .filter(|line| line.contains("userfault: test:"))
            .collect();
        assert_eq!(lines.len(), 1, "{output}");
        assert!(lines[0].contains("offset 196608"), "{output}");
        assert!(lines[0].contains("Input/output error"), "{output}");
        assert!(!output.contains("it lived"), "{output}");
    }
}

#[test]
fn a_read_that_fails_for_a_while_is_tried_again() {
    apart!(30, hugetlb, {
        for kind in writable_kinds() {
            let faulty = faulty(kind, 6, 10_000, vec![Rule::every(Call::Read, EIO).times(4)]);
            assert_eq!(touch::read(&faulty.region, 3), pattern(3));
            assert!(faulty.region.errors().is_empty());
        }
    });
}

#[test]
fn a_short_read_shows_nothing_of_itself() {
    apart!(30, hugetlb, {
        for kind in writable_kinds() {
            let short = Action::Shorten {
                bytes: None,
                errno: libc::EIO,
            };
            let faulty = faulty(
                kind,
                6,
                10_000,
                vec![Rule::every(Call::Read, short).times(2)],
            );
            thread::scope(|scope| {
                for page in [0, kind.block / 2, kind.block - 1] {
                    let region = &faulty.region;
                    scope.spawn(move || assert_eq!(touch::read(region, page), pattern(page)));
                }
            });
        }
    });
}

#[test]
fn heal_brings_a_poisoned_block_back_and_neighbours_never_lift_it() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let faulty = faulty(kind, 6, 300, vec![]);
            let (region, start) = (&faulty.region, (3 * kind.block) as u64);
            faulty
                .store
                .set_plan(vec![faulty.of_block(Call::Read, EIO, 3)]);
            let error = region.prefetch(&[(start, 1)]).unwrap().wait().unwrap_err();
            assert!(matches!(error, Error::Poisoned { .. }), "{error:?}");
            let errors = region.errors();
            assert_eq!(
                (errors[0].offset, errors[0].len),
                (start, kind.block as u64)
            );
            assert_eq!(errors[0].errno, libc::EIO);
            // Neighbours come, go and come back.
            for _ in 0..3 {
                for block in (0..BLOCKS).filter(|block| *block != 3) {
                    assert_eq!(
                        touch::read(region, block * kind.block),
                        pattern(block * kind.block)
                    );
                }
            }
            assert_eq!(region.resident(start, 1).unwrap(), [3]);
            for call in [
                region.pread(&mut [0], start).unwrap_err(),
                region.pwrite(&[0], start).unwrap_err(),
                region.heal(start, 1).unwrap_err(),
            ] {
                assert!(matches!(call, Error::Poisoned { .. }), "{call:?}");
            }
            assert!(region.pin(start, 1, false).is_err());
            // A flush and an eviction of everything pass it by.
            region.flush(0, faulty.len as u64).unwrap();
            region.evict(0, faulty.len as u64).unwrap();
            faulty.store.set_plan(vec![]);
            assert_eq!(
                region.heal(0, faulty.len as u64).unwrap(),
                kind.block as u64
            );
            assert!(region.errors().is_empty());
            assert_eq!(
                touch::read(region, start as usize + 9),
                pattern(start as usize + 9)
            );
        }
    });
}

#[test]
fn poison_that_the_program_throws_away_comes_back() {
    dies!(30, libc::SIGBUS, {
        let faulty = faulty(COPIED_64K, 6, 50, vec![]);
        faulty
            .store
            .set_plan(vec![faulty.of_block(Call::Read, EIO, 3)]);
        let start = 3 * faulty.kind.block;
        let _ = faulty.region.prefetch(&[(start as u64, 1)]).unwrap().wait();
        assert_eq!(
            touch::madvise(
                &faulty.region,
                start,
                faulty.kind.block,
                libc::MADV_DONTNEED
            ),
            0
        );
        println!("reading {}", touch::read(&faulty.region, start));
    });
}

#[test]
fn a_read_that_does_not_come_back_is_given_up_and_its_memory_waits_for_it() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let faulty = faulty(kind, 6, 200, vec![]);
            let (region, start) = (&faulty.region, (3 * kind.block) as u64);
            faulty
                .store
                .set_plan(vec![faulty.of_block(Call::Read, Action::Hang, 3)]);
            let began = Instant::now();
            let error = region.prefetch(&[(start, 1)]).unwrap().wait().unwrap_err();
            assert!(error.to_string().contains("has not come back"), "{error}");
            assert!(began.elapsed() < apart::seconds(5), "{:?}", began.elapsed());
            let used = userfault_engine::stats().used;
            assert!(used >= kind.block as u64, "its memory was given to others");
            let error = region.heal(start, 1).unwrap_err();
            assert!(matches!(error, Error::Poisoned { .. }), "{error:?}");
            for block in (0..BLOCKS).filter(|block| *block != 3) {
                assert_eq!(
                    touch::read(region, block * kind.block),
                    pattern(block * kind.block)
                );
            }
            assert_eq!(faulty.store.release(), 1);
            while faulty.store.hung() > 0 {
                thread::sleep(Duration::from_millis(1));
            }
            let healed = loop {
                match region.heal(start, 1) {
                    Ok(bytes) => break bytes,
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            };
            assert_eq!(healed, kind.block as u64);
            assert_eq!(
                touch::read(region, start as usize + 1),
                pattern(start as usize + 1)
            );
            region.close().unwrap();
        }
    });
}

#[test]
fn a_region_with_a_hung_read_can_be_closed_and_dropped() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let faulty = faulty(kind, 6, 100, vec![Rule::every(Call::Read, Action::Hang)]);
            let ticket = faulty.region.prefetch(&[(0, 1)]).unwrap();
            ticket.wait().unwrap_err();
            faulty.region.close().unwrap();
            let store = faulty.store.clone();
            drop(ticket);
            drop(faulty);
            // Somebody else's memory, perhaps at the same addresses.
            let others: Vec<_> = (0..8).map(|_| super_region(kind)).collect();
            store.release();
            thread::sleep(Duration::from_millis(50));
            for other in &others {
                assert_eq!(touch::read(other, 0), pattern(0));
            }
        }
    });
}

fn super_region(kind: Kind) -> Arc<Region> {
    let len = BLOCKS * kind.block;
    open(kind, &Bytes::new(patterned(len)), len, 6)
}

#[test]
fn a_store_that_hangs_under_many_threads_stops_nobody_else() {
    apart!(60, {
        let kind = COPIED;
        let blocks = 200;
        let len = blocks * kind.block;
        let memory = Arc::new(MemoryStore::new(patterned(len)));
        let hung = Arc::new(FaultyStore::new(
            memory,
            vec![Rule::every(Call::Read, Action::Hang)],
        ));
        let options_of = |limit| options(kind, Access::ReadWrite, len, limit);
        let region = Region::open(hung.clone(), options_of(None)).unwrap();
        let well = Region::open(Bytes::new(patterned(len)), options_of(None)).unwrap();
        thread::scope(|scope| {
            for toucher in 0..150 {
                let region = &region;
                scope.spawn(move || {
                    assert_eq!(
                        touch::read(region, toucher * kind.block),
                        pattern(toucher * kind.block)
                    );
                });
            }
            thread::sleep(Duration::from_millis(300));
            let began = Instant::now();
            for block in 0..blocks {
                assert_eq!(
                    touch::read(&well, block * kind.block),
                    pattern(block * kind.block)
                );
            }
            let took = began.elapsed();
            println!("{took:?}, {} hung", hung.hung());
            while hung.hung() > 0 {
                hung.release();
                thread::sleep(Duration::from_millis(1));
            }
            assert!(took < Duration::from_secs(2), "{took:?}");
        });
    });
}

#[test]
fn a_failed_write_back_keeps_its_data_and_is_raised_once_by_the_next_flush() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let faulty = faulty(
                kind,
                5,
                10_000,
                vec![Rule::every(Call::Write, EIO).times(3)],
            );
            let region = &faulty.region;
            for block in 0..BLOCKS {
                touch::write(region, block * kind.block, block as u8);
            }
            let error = region.flush(0, faulty.len as u64).unwrap_err();
            assert!(
                matches!(error, Error::Store { what: "write", .. }),
                "{error:?}"
            );
            while region.flush(0, faulty.len as u64).is_err() {}
            region.flush(0, faulty.len as u64).unwrap();
            for block in 0..BLOCKS {
                assert_eq!(
                    faulty.memory.to_vec()[block * kind.block],
                    block as u8,
                    "{kind:?}"
                );
            }
        }
    });
}

#[test]
fn a_close_that_cannot_write_leaves_the_region_open_with_its_data() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let full = Action::Shorten {
                bytes: None,
                errno: libc::ENOSPC,
            };
            let faulty = faulty(kind, 6, 1000, vec![Rule::every(Call::Write, full)]);
            let region = &faulty.region;
            touch::write(region, 7, 0);
            let error = region.close().unwrap_err();
            assert!(error.to_string().contains("No space left"), "{error}");
            assert!(!region.is_closed());
            assert_eq!(touch::read(region, 7), 0);
            assert_eq!(touch::read(region, kind.block), pattern(kind.block));
            touch::write(region, 8, 0);
            faulty.store.set_plan(vec![]);
            region.close().unwrap();
            assert_eq!(&faulty.memory.to_vec()[7..9], [0, 0], "{kind:?}");
            region.close().unwrap();
        }
    });
}

#[test]
fn a_full_disk_does_not_stop_readers() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let full = Action::Fail {
                errno: libc::ENOSPC,
            };
            let faulty = faulty(kind, 8, 30_000, vec![Rule::every(Call::Write, full)]);
            let region = &faulty.region;
            // Two dirty blocks that cannot leave; the other six serve everybody.
            touch::write(region, 0, 0);
            touch::write(region, kind.block, 0);
            let began = Instant::now();
            for round in 0..3 {
                for block in 2..BLOCKS {
                    let at = block * kind.block + round;
                    assert_eq!(touch::read(region, at), pattern(at));
                }
            }
            assert!(began.elapsed() < apart::seconds(5), "{:?}", began.elapsed());
            let refused = faulty
                .store
                .calls()
                .iter()
                .filter(|call| call.errno != 0)
                .count();
            assert!(refused < 100, "the store was hammered: {refused}");
            faulty.store.set_plan(vec![]);
            let _ = region.flush(0, faulty.len as u64);
            region.close().unwrap();
            assert_eq!(faulty.memory.to_vec()[0], 0);
            assert_eq!(faulty.memory.to_vec()[kind.block], 0);
        }
    });
}

#[test]
fn a_full_disk_does_not_stop_readers_however_many_blocks_cannot_leave() {
    apart!(60, {
        // Two thirds of what memory holds are dirty for good, in blocks so small that there are many.
        const DIRTY: usize = 700;
        let inline = Kind {
            fault: FaultWay::Inline,
            ..COPIED
        };
        let ways = [COPIED, inline];
        for kind in ways
            .into_iter()
            .filter(|kind| kind.fault == FaultWay::Threads || inline_can_write())
        {
            let full = Action::Fail {
                errno: libc::ENOSPC,
            };
            let plan = vec![Rule::every(Call::Write, full)];
            let faulty = faulty_of(3000, kind, 1000, 30_000, plan);
            let (region, block) = (&faulty.region, kind.block);
            for dirty in 0..DIRTY {
                touch::write(region, dirty * block, dirty as u8);
            }
            let began = Instant::now();
            for round in 0..3 {
                for clean in DIRTY..3000 {
                    let at = clean * block + round;
                    assert_eq!(touch::read(region, at), pattern(at), "{kind:?}");
                }
            }
            let took = began.elapsed();
            assert!(took < apart::seconds(10), "{kind:?}: {took:?}");
            assert_eq!(region.errors().len(), 0);
            faulty.store.set_plan(vec![]);
            let _ = region.flush(0, faulty.len as u64);
            region.close().unwrap();
            let stored = faulty.memory.to_vec();
            for dirty in 0..DIRTY {
                assert_eq!(stored[dirty * block], dirty as u8, "{kind:?}");
            }
        }
    });
}

#[test]
fn a_write_back_that_hangs_does_not_keep_a_touch_waiting_for_ever() {
    dies!(60, libc::SIGBUS, {
        // Everything in memory is dirty, and the store takes nothing: the touch has a deadline.
        let faulty = faulty(
            COPIED_64K,
            4,
            300,
            vec![Rule::every(Call::Write, Action::Hang)],
        );
        for block in 0..BLOCKS {
            touch::write(&faulty.region, block * faulty.kind.block, 1);
        }
    });
}

#[test]
fn a_touch_of_a_block_whose_write_back_hangs_has_a_deadline() {
    let output = dies!(60, libc::SIGBUS, {
        let faulty = faulty(
            COPIED_64K,
            6,
            300,
            vec![Rule::every(Call::Write, Action::Hang)],
        );
        touch::write(&faulty.region, 0, 1);
        let region = faulty.region.clone();
        thread::spawn(move || region.evict(0, 1));
        while faulty.store.hung() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        touch::read(&faulty.region, 0);
    });
    assert!(
        output.contains("write under way has not come back"),
        "{output}"
    );
}

#[test]
fn a_block_whose_write_back_hung_is_there_again_when_it_has_come_back() {
    apart!(60, hugetlb, {
        // Nobody dies of a system call: the block is back with its write.
        let served = |kind: &Kind| kind.fault == FaultWay::Threads;
        for kind in writable_kinds().into_iter().filter(served) {
            let faulty = faulty(kind, 6, 200, vec![Rule::every(Call::Write, Action::Hang)]);
            touch::write(&faulty.region, 0, 1);
            thread::scope(|scope| {
                let evicting = scope.spawn(|| faulty.region.evict(0, 1));
                while faulty.store.hung() == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                use std::os::fd::AsRawFd;
                let (reader, writer) = std::io::pipe().unwrap();
                let written = touch::write_to(&faulty.region, 0, 8, writer.as_raw_fd());
                assert_eq!(written, -libc::EFAULT as isize, "{kind:?}");
                assert_eq!(faulty.region.errors().len(), 1);
                drop(reader);
                faulty.store.release();
                evicting.join().unwrap().unwrap();
            });
            assert!(faulty.region.errors().is_empty());
            assert_eq!(touch::read(&faulty.region, 0), 1, "{kind:?}");
            assert_eq!(touch::read(&faulty.region, 1), pattern(1), "{kind:?}");
            faulty.region.close().unwrap();
            assert_eq!(faulty.memory.to_vec()[0], 1);
        }
    });
}

#[test]
fn a_slow_store_is_only_slow() {
    apart!(100, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let pause = Action::Delay(Duration::from_millis(5));
            let plan = vec![
                Rule::every(Call::Read, pause),
                Rule::every(Call::Write, pause),
            ];
            let faulty = faulty(kind, 5, 10_000, plan);
            thread::scope(|scope| {
                for writer in 0..4usize {
                    let region = &faulty.region;
                    scope.spawn(move || {
                        for round in 0..2 {
                            for block in 0..BLOCKS {
                                let at = block * kind.block + writer * 100 + round;
                                assert_eq!(touch::read(region, at), pattern(at));
                                touch::write(region, at, writer as u8);
                            }
                        }
                    });
                }
            });
            faulty.region.close().unwrap();
            let stored = faulty.memory.to_vec();
            for writer in 0..4usize {
                for block in 0..BLOCKS {
                    let at = block * kind.block + writer * 100;
                    assert_eq!(&stored[at..at + 2], [writer as u8; 2]);
                }
            }
        }
    });
}

#[test]
fn a_store_that_reads_one_at_a_time_is_read_one_at_a_time() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use userfault_store::Store;

    struct One(MemoryStore, AtomicUsize);
    impl Store for One {
        fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            assert_eq!(
                self.1.fetch_add(1, Ordering::SeqCst),
                0,
                "two reads at once"
            );
            thread::sleep(Duration::from_micros(300));
            self.0.read(offset, buf)?;
            self.1.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            self.0.write(offset, data)
        }
        fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
            self.0.punch(offset, len)
        }
        fn sync(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn concurrent_reads(&self) -> bool {
            false
        }
        fn writable(&self) -> bool {
            true
        }
        fn name(&self) -> String {
            "one".into()
        }
    }

    apart!(60, {
        let kind = COPIED_64K;
        let len = BLOCKS * kind.block;
        let store = Arc::new(One(MemoryStore::new(patterned(len)), AtomicUsize::new(0)));
        let regions = [open(kind, &store, len, 5), open(kind, &store, len, 5)];
        thread::scope(|scope| {
            for reader in 0..8usize {
                let region = &regions[reader % 2];
                scope.spawn(move || {
                    let mut random = random::Random::new(reader as u64);
                    for _ in 0..40 {
                        let at = random.below(len);
                        assert_eq!(touch::read(region, at), pattern(at));
                    }
                });
            }
        });
    });
}

#[test]
fn a_file_that_is_truncated_underneath_is_an_error_and_never_zeros() {
    use userfault_store::{FileMode, FileOptions, FileStore};
    let output = dies!(30, libc::SIGBUS, {
        let path = std::env::temp_dir().join(format!("userfault-truncated-{}", std::process::id()));
        let kind = COPIED_64K;
        std::fs::write(&path, patterned(BLOCKS * kind.block)).unwrap();
        let store = FileStore::open(&path, FileOptions::new(FileMode::ReadWrite)).unwrap();
        let region = open(kind, &Arc::new(store), BLOCKS * kind.block, 5);
        assert_eq!(touch::read(&region, 0), pattern(0));
        touch::write(&region, 1, 0);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(3 * kind.block as u64).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(touch::read(&region, kind.block), pattern(kind.block));
        let error = region.flush(0, 1).unwrap_err();
        assert!(error.to_string().contains("truncated"), "{error}");
        println!("reading {}", touch::read(&region, 9 * kind.block));
    });
    assert!(output.contains("truncated"), "{output}");
    assert!(!output.contains("reading"), "{output}");
}
