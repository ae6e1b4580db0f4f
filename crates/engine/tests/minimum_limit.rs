//! Four blocks are enough to run, for one thread and for many.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::random::Random;
use common::*;
use userfault_engine::{Access, Region, set_memory_limit};

/// A region with the smallest limit there is.
fn smallest(kind: Kind, blocks: usize) -> (Arc<Bytes>, Arc<Region>) {
    let len = blocks * kind.block;
    let store = Bytes::ready(patterned(len));
    let options = options(kind, Access::ReadWrite, len, Some(1));
    (store.clone(), Region::open(store, options).unwrap())
}

fn kinds() -> [Kind; 6] {
    [
        COPIED,
        COPIED_64K,
        VIEWED,
        HUGE_PAGES,
        COPIED_INLINE,
        VIEWED_INLINE,
    ]
}

#[test]
fn a_load_across_two_blocks_ends() {
    apart!(30, {
        for kind in kinds() {
            let (_, region) = smallest(kind, 12);
            for round in 0..3 {
                for block in 1..12 {
                    let at = (block * 7 + round) % 11 * kind.block + kind.block - 3;
                    let expected: Vec<u8> = (at..at + 8).map(pattern).collect();
                    assert_eq!(
                        touch::read_word(&region, at).to_ne_bytes()[..],
                        expected,
                        "{kind:?}"
                    );
                }
            }
        }
    });
}

#[test]
fn many_threads_that_each_need_four_blocks_at_once_all_end() {
    apart!(100, {
        for kind in kinds() {
            let blocks = 24;
            let (store, region) = smallest(kind, blocks);
            let began = Instant::now();
            let rounds = if kind.block == HUGE { 6 } else { 40 };
            thread::scope(|scope| {
                for mover in 0..8usize {
                    let region = &region;
                    scope.spawn(move || {
                        let mut random = Random::new(mover as u64);
                        for _ in 0..rounds {
                            // Both ends straddle two blocks. Nobody else writes this thread's bytes.
                            let from = (1 + random.below(blocks - 2)) * kind.block - 100;
                            let to = (1 + random.below(blocks - 2)) * kind.block - 100;
                            let from = from + 16 * mover - 28;
                            let to = to + 16 * mover - 28;
                            if from != to {
                                touch::copy(region, to, region, from, 16);
                            }
                            assert_eq!(
                                touch::read_word(region, to),
                                touch::read_word(region, from)
                            );
                        }
                    });
                }
            });
            println!("{kind:?}: {:?} {:?}", began.elapsed(), region.stats());
            region.close().unwrap();
            let stored = store.to_vec();
            assert_eq!(stored[0], pattern(0));
            assert_eq!(stored[kind.block / 2], pattern(kind.block / 2));
        }
    });
}

#[test]
fn a_hundred_and_twenty_eight_threads_share_four_blocks() {
    apart!(100, {
        for kind in [COPIED, COPIED_64K] {
            let blocks = 64;
            let (store, region) = smallest(kind, blocks);
            let began = Instant::now();
            thread::scope(|scope| {
                for toucher in 0..128usize {
                    let region = &region;
                    scope.spawn(move || {
                        let mut random = Random::new(toucher as u64);
                        for _ in 0..6 {
                            let block = random.below(blocks);
                            touch::add_word(region, (block * kind.block) / 8 + toucher, 1);
                        }
                    });
                }
            });
            println!("{kind:?}: {:?} {:?}", began.elapsed(), region.stats());
            region.close().unwrap();
            let mut added = 0u64;
            for block in 0..blocks {
                for toucher in 0..128 {
                    let word = (block * kind.block) / 8 + toucher;
                    let before: Vec<u8> = (word * 8..word * 8 + 8).map(pattern).collect();
                    let before = u64::from_ne_bytes(before.try_into().unwrap());
                    added += store.word(word).wrapping_sub(before);
                }
            }
            assert_eq!(added, 128 * 6, "{kind:?}");
        }
    });
}

/// Two regions without limits of their own in a process that has the smallest limit.
fn two(kind: Kind, blocks: usize) -> [(Arc<Bytes>, Arc<Region>); 2] {
    set_memory_limit(Some(1)).unwrap();
    [0, 1].map(|_| {
        let len = blocks * kind.block;
        let store = Bytes::ready(patterned(len));
        let options = options(kind, Access::ReadWrite, len, None);
        (store.clone(), Region::open(store, options).unwrap())
    })
}

#[test]
fn plain_copies_between_two_regions_in_both_directions_end() {
    apart!(100, {
        for kind in kinds() {
            let blocks = 16;
            let [(_, a), (_, b)] = two(kind, blocks);
            let rounds = if kind.block == HUGE { 10 } else { 60 };
            thread::scope(|scope| {
                for (to, from, odd) in [(&a, &b, 0), (&b, &a, 1)] {
                    scope.spawn(move || {
                        let mut random = Random::new(odd as u64 + 7);
                        for _ in 0..rounds {
                            // The two directions use halves of their own in each block.
                            let half = kind.block / 2;
                            let block = random.below(blocks) * kind.block;
                            let read = block + odd * half;
                            touch::copy(to, block + odd * half, from, read, half.min(100_000));
                        }
                    });
                }
            });
            for at in (0..blocks * kind.block).step_by(999) {
                assert_eq!(touch::read(&a, at), pattern(at));
                assert_eq!(touch::read(&b, at), pattern(at));
            }
        }
    });
}

#[test]
fn pwrites_of_two_regions_from_each_other_end() {
    apart!(100, {
        for kind in kinds() {
            let blocks = 16;
            let [(_, a), (_, b)] = two(kind, blocks);
            let len = blocks * kind.block / 2;
            thread::scope(|scope| {
                for (to, from, start) in [(&a, &b, 0), (&b, &a, len)] {
                    scope.spawn(move || {
                        for _ in 0..if kind.block == HUGE { 2 } else { 10 } {
                            to.pwrite(touch::slice(from, start, len), start as u64)
                                .unwrap();
                            to.pread(touch::slice_mut(to, start, len), start as u64)
                                .unwrap();
                        }
                    });
                }
            });
            for at in (0..blocks * kind.block).step_by(999) {
                assert_eq!(touch::read(&a, at), pattern(at));
                assert_eq!(touch::read(&b, at), pattern(at));
            }
        }
    });
}

#[test]
fn regions_with_limits_of_their_own_live_under_a_smaller_one_of_the_process() {
    apart!(100, {
        let kind = COPIED_64K;
        set_memory_limit(Some(1)).unwrap();
        let (blocks, rounds) = (24, 60);
        let regions: Vec<_> = (0..3).map(|_| smallest(kind, blocks).1).collect();
        thread::scope(|scope| {
            for mover in 0..6usize {
                let regions = &regions;
                scope.spawn(move || {
                    let mut random = Random::new(mover as u64);
                    for _ in 0..rounds {
                        let from = &regions[random.below(3)];
                        let to = &regions[random.below(3)];
                        let at = (1 + random.below(blocks - 1)) * kind.block - 100 + 16 * mover;
                        // The same place on both sides holds the same bytes, whoever is first.
                        touch::copy(to, at, from, at, 16);
                    }
                });
            }
        });
        for region in &regions {
            for at in (0..blocks * kind.block).step_by(999) {
                assert_eq!(touch::read(region, at), pattern(at));
            }
        }
    });
}

#[test]
fn a_closed_region_of_large_blocks_does_not_raise_the_limit_for_ever() {
    apart!(30, {
        set_memory_limit(Some(1 << 20)).unwrap();
        let large = Kind {
            block: 16 << 20,
            ..VIEWED
        };
        let len = 4 * large.block;
        let region = Region::open(
            Bytes::ready(vec![0; len]),
            options(large, Access::ReadWrite, len, None),
        )
        .unwrap();
        assert_eq!(userfault_engine::stats().limit, 64 << 20);
        region.close().unwrap();
        drop(region);
        assert_eq!(userfault_engine::stats().limit, 1 << 20);
    });
}

#[test]
fn the_limit_may_change_at_any_moment() {
    apart!(60, {
        let kind = COPIED_64K;
        let blocks = 64;
        let [(store, a), (_, b)] = two(kind, blocks);
        thread::scope(|scope| {
            let ended = Instant::now() + Duration::from_secs(2);
            let (a, b) = (&a, &b);
            for writer in 0..3usize {
                scope.spawn(move || {
                    let mut random = Random::new(writer as u64);
                    while Instant::now() < ended {
                        let at = random.below(blocks) * kind.block + 16 * writer;
                        touch::copy(a, at, b, at, 16);
                    }
                });
            }
            scope.spawn(move || {
                let mut random = Random::new(77);
                while Instant::now() < ended {
                    let limit = 1 + random.below(blocks * kind.block) as u64;
                    set_memory_limit(Some(limit)).unwrap();
                    thread::sleep(Duration::from_millis(5));
                }
            });
        });
        set_memory_limit(Some(1)).unwrap();
        let stats = userfault_engine::stats();
        assert!(stats.used <= stats.limit, "{stats:?}");
        assert!(
            stats.resident + stats.resting <= 4 * kind.block as u64,
            "{stats:?}"
        );
        a.close().unwrap();
        assert!(store.to_vec() == patterned(blocks * kind.block));
    });
}

#[test]
fn more_pinned_memory_than_the_limit_is_an_error_and_not_a_hang() {
    apart!(30, {
        for kind in kinds() {
            let len = 40 * kind.block;
            let store = Bytes::ready(patterned(len));
            let limit = Some(12 * kind.block as u64);
            let region = Region::open(store, options(kind, Access::ReadWrite, len, limit)).unwrap();
            let fits = region.pin(0, 8 * kind.block as u64, true).unwrap();
            let error = region.pin(8 * kind.block as u64, 1, false).unwrap_err();
            assert!(
                matches!(error, userfault_engine::Error::Memory { .. }),
                "{error:?}"
            );
            let error = region.pin(0, len as u64, false).unwrap_err();
            assert!(
                matches!(error, userfault_engine::Error::Memory { .. }),
                "{error:?}"
            );
            // What is not pinned still has four blocks to run in.
            for at in (0..len).step_by(SMALL) {
                assert_eq!(touch::read(&region, at), pattern(at));
            }
            assert_eq!(region.resident(0, 8 * kind.block as u64).unwrap(), [1; 8]);
            drop(fits);
            region
                .pin(8 * kind.block as u64, 8 * kind.block as u64, false)
                .unwrap();
            // Reads that pass through, and pins of the same blocks, leave nothing pinned behind.
            let pin = region.pin(0, 1, false).unwrap();
            let mut byte = [0];
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..50 {
                            region.pread(&mut [0], 0).unwrap();
                            drop(region.pin(0, 1, false).unwrap());
                        }
                    });
                }
            });
            drop(pin);
            region.pread(&mut byte, 0).unwrap();
            assert_eq!(region.stats().pinned, 0);
            region.pin(0, 8 * kind.block as u64, false).unwrap();
        }
    });
}

#[test]
fn what_is_pinned_does_not_stand_in_the_way_of_who_may_leave() {
    // As much is pinned as may be. Of the four blocks left two are on probation and two rest, which is a
    // tenth of the limit each, and so not too many: it would be for the pinned ones to leave.
    apart!(60, {
        for kind in kinds() {
            let blocks = 40;
            let len = blocks * kind.block;
            let store = Bytes::ready(patterned(len));
            let limit = Some(20 * kind.block as u64);
            let region = Region::open(store, options(kind, Access::ReadWrite, len, limit)).unwrap();
            for first in [4, 20] {
                let pin = region
                    .pin((first * kind.block) as u64, 16 * kind.block as u64, false)
                    .unwrap();
                for at in (0..3 * len).step_by(kind.block) {
                    let at = at % len;
                    touch::write(&region, at, touch::read(&region, at));
                }
                drop(pin);
            }
            // Those that were pinned leave like any other.
            for at in (0..len).step_by(kind.block) {
                assert_eq!(touch::read(&region, at), pattern(at));
            }
            let stats = region.stats();
            assert!(stats.resident + stats.resting <= stats.limit, "{stats:?}");
        }
    });
}
