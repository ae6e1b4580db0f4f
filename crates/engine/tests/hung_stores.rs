//! A store that does not come back from a write or a sync: nobody waits for it for ever, nothing is lost by
//! it, and nobody else's bytes wait for it.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use userfault_engine::{Access, Error, Region, set_memory_limit};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

const BLOCKS: usize = 12;

/// The engine gives a write two seconds at least, however short `retry_for` is. Far less than the store takes,
/// and far more than a busy machine needs.
const SOON: Duration = Duration::from_secs(12);

struct Hung {
    memory: Arc<MemoryStore>,
    store: Arc<FaultyStore>,
    region: Arc<Region>,
    len: u64,
}

/// A region of which `blocks` blocks may be in memory, over a store whose calls of this kind hang.
fn hung(kind: Kind, call: Call, blocks: usize) -> Hung {
    let len = BLOCKS * kind.block;
    let memory = Arc::new(MemoryStore::new(patterned(len)));
    let store = Arc::new(FaultyStore::new(
        memory.clone(),
        vec![Rule::every(call, Action::Hang)],
    ));
    let limit = Some((blocks * kind.block) as u64 + (64 << 10));
    let mut options = options(kind, Access::ReadWrite, len, limit);
    options.retry_for = Duration::from_millis(100);
    let region = Region::open(store.clone(), options).unwrap();
    Hung {
        memory,
        store,
        region,
        len: len as u64,
    }
}

/// Runs a call that must fail soon, because of this call of the store.
fn fails_soon(what: &str, call: impl FnOnce() -> Result<(), Error>) {
    let began = Instant::now();
    let error = call().expect_err("the store has not answered");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    match &error {
        Error::Store {
            what: told, errno, ..
        } => {
            assert_eq!((*told, *errno), (what, libc::ETIMEDOUT), "{error}");
        }
        other => panic!("{other:?}"),
    }
    let words = error.to_string();
    assert!(words.contains("has not come back after 2s"), "{words}");
    assert!(words.contains("stays dirty"), "{words}");
}

/// Lets the store go on, and waits until it has answered.
fn release(store: &FaultyStore) {
    store.release();
    while store.hung() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Flushes until it succeeds: what failed while nobody waited is told once.
fn flush_well(region: &Region) {
    for _ in 0..3 {
        if region.flush(0, region.len() as u64).is_ok() {
            return;
        }
    }
    region.flush(0, region.len() as u64).unwrap();
}

#[test]
fn a_flush_over_a_write_that_hangs_fails_and_keeps_the_data() {
    apart!(60, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let Hung {
                memory,
                store,
                region,
                len,
                ..
            } = hung(kind, Call::Write, 6);
            touch::write(&region, 3, 0);
            touch::write(&region, 2 * kind.block, 0);
            fails_soon("write", || region.flush(0, len));
            // The program goes on with its memory, also with the page that is under way.
            assert_eq!(touch::read(&region, 3), 0);
            touch::write(&region, 4, 0);
            touch::write(&region, 5 * kind.block, 0);
            // A second flush hangs no second thread in the store.
            fails_soon("an earlier flush", || region.flush(0, len));
            assert_eq!(store.hung(), 1);
            assert_eq!(memory.to_vec()[3], pattern(3));
            release(&store);
            flush_well(&region);
            let stored = memory.to_vec();
            for at in [3, 4, 2 * kind.block, 5 * kind.block] {
                assert_eq!(stored[at], 0, "{kind:?}");
            }
            region.close().unwrap();
        }
    });
}

#[test]
fn a_flush_over_a_sync_that_hangs_fails_and_later_ones_sync() {
    apart!(60, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let Hung {
                memory,
                store,
                region,
                len,
                ..
            } = hung(kind, Call::Sync, 6);
            touch::write(&region, 3, 0);
            fails_soon("sync", || region.flush(0, len));
            touch::write(&region, 4, 0);
            release(&store);
            flush_well(&region);
            assert_eq!(memory.to_vec()[3..5], [0, 0]);
            let synced = store
                .calls()
                .iter()
                .filter(|call| call.call == Call::Sync)
                .count();
            assert!(synced >= 2, "{synced}");
            region.close().unwrap();
        }
    });
}

#[test]
fn a_close_over_a_write_that_hangs_leaves_the_region_open_with_its_data() {
    apart!(60, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let Hung {
                memory,
                store,
                region,
                ..
            } = hung(kind, Call::Write, 6);
            touch::write(&region, 3, 0);
            fails_soon("write", || region.close());
            assert!(!region.is_closed());
            assert_eq!(touch::read(&region, 3), 0);
            assert_eq!(
                touch::read(&region, 7 * kind.block),
                pattern(7 * kind.block)
            );
            touch::write(&region, 4, 0);
            release(&store);
            region.close().unwrap();
            assert_eq!(memory.to_vec()[3..5], [0, 0], "{kind:?}");
        }
    });
}

#[test]
fn a_region_over_a_store_that_hangs_can_be_given_up() {
    apart!(60, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let Hung {
                store, region, len, ..
            } = hung(kind, Call::Write, 6);
            touch::write(&region, 3, 0);
            fails_soon("write", || region.flush(0, len));
            let began = Instant::now();
            drop(region);
            assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
            // Other memory, perhaps at the same place, is not written to when the store comes back.
            let others: Vec<_> = (0..4)
                .map(|_| {
                    open(
                        kind,
                        &Bytes::new(patterned(4 * kind.block)),
                        4 * kind.block,
                        4,
                    )
                })
                .collect();
            release(&store);
            thread::sleep(Duration::from_millis(50));
            for other in &others {
                for at in (0..4 * kind.block).step_by(SMALL) {
                    assert_eq!(touch::read(other, at), pattern(at));
                }
            }
        }
    });
}

#[test]
fn every_call_that_needs_a_write_that_hangs_fails() {
    apart!(90, {
        let kind = COPIED_64K;
        let Hung {
            memory,
            store,
            region,
            len,
            ..
        } = hung(kind, Call::Write, 5);
        touch::write(&region, 3, 0);
        fails_soon("write", || region.evict(0, 1));
        // Its block belongs to the eviction.
        fails_soon("write", || region.pread(&mut [0], 0));
        fails_soon("write", || region.pwrite(&[0], 0));
        fails_soon("write", || region.pin(0, 1, false).map(drop));
        fails_soon("write", || region.evict(0, 1));
        fails_soon("write", || region.write_out());
        // Other blocks are as before.
        assert_eq!(touch::read(&region, kind.block), pattern(kind.block));
        region.pwrite(&[0], 2 * kind.block as u64).unwrap();
        release(&store);
        flush_well(&region);
        assert_eq!(memory.to_vec()[3], 0);
        assert_eq!(memory.to_vec()[2 * kind.block], 0);
        assert_eq!(len, region.len() as u64);
    });
}

#[test]
fn a_limit_that_shrinks_over_a_store_that_hangs_is_set() {
    apart!(60, {
        let kind = COPIED_64K;
        let len = BLOCKS * kind.block;
        let memory = Arc::new(MemoryStore::new(patterned(len)));
        let hangs = vec![Rule::every(Call::Write, Action::Hang)];
        let store = Arc::new(FaultyStore::new(memory, hangs));
        let mut options = options(kind, Access::ReadWrite, len, None);
        options.retry_for = Duration::from_millis(100);
        let region = Region::open(store.clone(), options).unwrap();
        for block in 0..BLOCKS {
            touch::write(&region, block * kind.block, 0);
        }
        let began = Instant::now();
        set_memory_limit(Some(5 * kind.block as u64)).unwrap();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        for block in 0..BLOCKS {
            assert_eq!(
                region
                    .resident((block * kind.block) as u64, 1)
                    .unwrap()
                    .len(),
                1
            );
        }
        release(&store);
        flush_well(&region);
        region.close().unwrap();
    });
}

#[test]
fn a_store_that_hangs_does_not_keep_others_from_being_written_in_the_background() {
    apart!(100, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let (blocks, most) = (30, 12);
            let len = blocks * kind.block;
            let memory = Arc::new(MemoryStore::new(patterned(len)));
            let hangs = vec![Rule::every(Call::Write, Action::Hang)];
            let store = Arc::new(FaultyStore::new(memory.clone(), hangs));
            let mut options = options(
                kind,
                Access::ReadWrite,
                len,
                Some((most * kind.block) as u64),
            );
            // The touch that waits for room must not be given up meanwhile.
            options.retry_for = Duration::from_secs(60);
            let stuck = Region::open(store.clone(), options).unwrap();
            let write_all = |region: &Region| {
                for block in 0..blocks {
                    touch::write(region, block * kind.block, 0);
                }
            };
            thread::scope(|scope| {
                let writer = scope.spawn(|| write_all(&stuck));
                // The eviction, and the drain's round that it asked for.
                while store.hung() < 2 {
                    thread::sleep(Duration::from_millis(1));
                }
                let well = open(kind, &Bytes::ready(patterned(len)), len, most);
                let began = Instant::now();
                let mut clean = 0;
                while clean < 3 {
                    write_all(&well);
                    // Nobody asks for anything: what rests dirty is written in the background.
                    while well.stats().dirty > 0 {
                        let took = began.elapsed();
                        assert!(took < Duration::from_secs(30), "{:?}", well.stats());
                        thread::sleep(Duration::from_millis(5));
                    }
                    clean += 1;
                }
                well.close().unwrap();
                while !writer.is_finished() {
                    store.release();
                    thread::sleep(Duration::from_millis(1));
                }
            });
            flush_well(&stuck);
            stuck.close().unwrap();
            for block in 0..blocks {
                assert_eq!(memory.to_vec()[block * kind.block], 0, "{kind:?}");
            }
        }
    });
}
