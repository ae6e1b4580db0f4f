//! What counts as dirty: everything that is not proved clean, and nothing that is.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use userfault_engine::Region;
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

const BLOCKS: usize = 8;

fn filled(kind: Kind) -> (Arc<Bytes>, Arc<Region>, usize) {
    let len = BLOCKS * kind.block;
    let store = Bytes::ready(patterned(len));
    let region = open(kind, &store, len, BLOCKS + 1);
    for block in 0..BLOCKS {
        assert_eq!(
            touch::read(&region, block * kind.block),
            pattern(block * kind.block)
        );
    }
    (store, region, len)
}

#[test]
fn what_was_only_read_is_never_written() {
    apart!(30, hugetlb, {
        for kind in writable_kinds() {
            let (store, region, len) = filled(kind);
            region.flush(0, len as u64).unwrap();
            region.evict(0, len as u64).unwrap();
            for at in (0..len).step_by(SMALL) {
                assert_eq!(touch::read(&region, at), pattern(at));
            }
            region.close().unwrap();
            assert_eq!(store.written.load(Ordering::Relaxed), 0, "{kind:?}");
        }
    });
}

#[test]
fn one_written_byte_is_one_written_page() {
    apart!(30, hugetlb, {
        for kind in writable_kinds() {
            let (store, region, len) = filled(kind);
            let page = if region.pages() == "2MiB hugetlb" {
                HUGE
            } else {
                SMALL
            };
            touch::write(&region, kind.block + 17, 0);
            region.flush(0, len as u64).unwrap();
            assert_eq!(
                store.written.load(Ordering::Relaxed),
                page as u64,
                "{kind:?}"
            );
            region.flush(0, len as u64).unwrap();
            assert_eq!(
                store.written.load(Ordering::Relaxed),
                page as u64,
                "clean again: {kind:?}"
            );
            touch::write(&region, kind.block + 17, 1);
            region.evict(0, len as u64).unwrap();
            assert_eq!(
                store.written.load(Ordering::Relaxed),
                2 * page as u64,
                "{kind:?}"
            );
            assert_eq!(store.to_vec()[kind.block + 17], 1);
        }
    });
}

#[test]
fn a_write_before_the_program_unmaps_the_page_is_in_the_next_flush() {
    apart!(30, hugetlb, {
        for kind in writable_kinds() {
            let (store, region, len) = filled(kind);
            touch::write(&region, 5, 0);
            assert_eq!(
                touch::madvise(&region, 0, kind.block, libc::MADV_DONTNEED),
                0
            );
            region.flush(0, len as u64).unwrap();
            assert_eq!(store.to_vec()[5], 0, "{kind:?}");
            // Touched again, the evidence of before is gone: it stays dirty rather than be lost.
            touch::write(&region, 6, 0);
            assert_eq!(
                touch::madvise(&region, 0, kind.block, libc::MADV_DONTNEED),
                0
            );
            assert_eq!(touch::read(&region, 6), 0);
            region.flush(0, len as u64).unwrap();
            assert_eq!(store.to_vec()[6], 0, "{kind:?}");
            touch::write(&region, 7, 0);
            assert_eq!(
                touch::madvise(&region, 0, kind.block, libc::MADV_DONTNEED),
                0
            );
            region.evict(0, len as u64).unwrap();
            assert_eq!(store.to_vec()[7], 0, "{kind:?}");
        }
    });
}

#[test]
fn a_write_through_the_view_is_in_the_next_flush() {
    apart!(30, hugetlb, {
        for kind in writable_kinds() {
            let (store, region, len) = filled(kind);
            region.pwrite(b"resident", 100).unwrap();
            region.evict(kind.block as u64, kind.block as u64).unwrap();
            region.pwrite(b"absent", kind.block as u64 + 100).unwrap();
            region.flush(0, len as u64).unwrap();
            let stored = store.to_vec();
            assert_eq!(&stored[100..108], b"resident", "{kind:?}");
            assert_eq!(
                &stored[kind.block + 100..kind.block + 106],
                b"absent",
                "{kind:?}"
            );
            assert_eq!(stored[kind.block + 99], pattern(kind.block + 99));
            assert_eq!(&touch::bytes(&region, 100, 8), b"resident");
            assert_eq!(&touch::bytes(&region, kind.block + 100, 6), b"absent");
        }
    });
}

#[test]
fn two_threads_on_one_resting_block_do_not_make_it_dirty() {
    apart!(200, hugetlb, {
        for kind in writable_kinds() {
            let (blocks, len) = (48, 48 * kind.block);
            let store = Bytes::ready(patterned(len));
            let region = open(kind, &store, len, 20);
            let mut random = random::Random::new(3);
            for _ in 0..60 {
                let order: Vec<usize> = (0..blocks).map(|_| random.below(blocks)).collect();
                std::thread::scope(|scope| {
                    for _ in 0..2 {
                        scope.spawn(|| {
                            for block in &order {
                                let at = block * kind.block;
                                assert_eq!(touch::read(&region, at), pattern(at));
                            }
                        });
                    }
                });
            }
            let stats = region.stats();
            assert!(stats.hits > 0, "nothing rested: {kind:?} {stats:?}");
            region.close().unwrap();
            assert_eq!(store.written.load(Ordering::Relaxed), 0, "{kind:?}");
        }
    });
}

/// A region over a store that fails by plan.
fn faulty(kind: Kind, plan: Vec<Rule>) -> (Arc<MemoryStore>, Arc<FaultyStore>, Arc<Region>, usize) {
    let len = BLOCKS * kind.block;
    let memory = Arc::new(MemoryStore::new(patterned(len)));
    let store = Arc::new(FaultyStore::new(memory.clone(), plan));
    let region = open(kind, &store, len, BLOCKS + 1);
    (memory, store, region, len)
}

#[test]
fn a_write_while_its_block_is_written_back_is_in_the_next_flush() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let (memory, store, region, len) =
                faulty(kind, vec![Rule::every(Call::Write, Action::Hang)]);
            touch::write(&region, 0, 0);
            std::thread::scope(|scope| {
                let flush = scope.spawn(|| region.flush(0, len as u64));
                while store.hung() == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // By the program, on the page under way and on another; the block is mapped.
                touch::write(&region, 1, 0);
                touch::write(&region, kind.block - 1, 0);
                store.release();
                flush.join().unwrap().unwrap();
            });
            region.flush(0, len as u64).unwrap();
            let stored = memory.to_vec();
            assert_eq!(
                (stored[0], stored[1], stored[kind.block - 1]),
                (0, 0, 0),
                "{kind:?}"
            );
        }
    });
}

#[test]
fn pages_of_a_failed_write_back_are_written_with_newer_ones() {
    apart!(60, {
        for kind in [COPIED_64K, VIEWED, HUGE_PAGES] {
            let (memory, _, region, len) = faulty(
                kind,
                vec![Rule::every(Call::Write, Action::Fail { errno: libc::EIO }).times(1)],
            );
            touch::write(&region, 0, 0);
            touch::write(&region, 5 * SMALL, 0);
            let error = region.flush(0, len as u64).unwrap_err();
            assert!(error.to_string().contains("write of"), "{error}");
            touch::write(&region, 9 * SMALL, 0);
            region.flush(0, len as u64).unwrap();
            let stored = memory.to_vec();
            for page in [0, 5, 9] {
                assert_eq!(stored[page * SMALL], 0, "{kind:?}: page {page}");
            }
        }
    });
}

#[test]
fn what_a_failed_sync_may_have_lost_is_written_again() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let (_, store, region, len) = faulty(
                kind,
                vec![Rule::every(Call::Sync, Action::Fail { errno: libc::EIO }).times(1)],
            );
            touch::write(&region, 3, 0);
            region.flush(0, len as u64).unwrap_err();
            let writes = || {
                store
                    .calls()
                    .iter()
                    .filter(|call| call.call == Call::Write)
                    .count()
            };
            let before = writes();
            region.flush(0, len as u64).unwrap();
            assert!(writes() > before, "nothing was written again: {kind:?}");
            let again = writes();
            region.flush(0, len as u64).unwrap();
            assert_eq!(writes(), again, "{kind:?}");
        }
    });
}

#[test]
fn a_store_is_given_bytes_that_do_not_change_while_it_writes_them() {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use userfault_store::Store;

    /// Reads what it is given twice, some time apart.
    struct Twice(MemoryStore, AtomicU64);
    impl Store for Twice {
        fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            self.0.read(offset, buf)
        }
        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            let first = data.to_vec();
            std::thread::sleep(Duration::from_millis(2));
            assert!(first == data, "the bytes changed");
            self.1.fetch_add(1, Ordering::Relaxed);
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
        fn writable(&self) -> bool {
            true
        }
        fn name(&self) -> String {
            "twice".into()
        }
    }

    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let len = BLOCKS * kind.block;
            let store = Arc::new(Twice(MemoryStore::new(vec![0; len]), AtomicU64::new(0)));
            let region = open(kind, &store, len, 5);
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (region, stop) = (&region, &stop);
                scope.spawn(move || {
                    let mut count = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        count += 1;
                        touch::write_word(region, count as usize * 8 % len, count);
                    }
                });
                while store.1.load(Ordering::Relaxed) < 10 {
                    region.flush(0, len as u64).unwrap();
                }
                stop.store(true, Ordering::Relaxed);
            });
        }
    });
}
