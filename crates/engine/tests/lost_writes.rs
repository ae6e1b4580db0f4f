//! No CPU write is lost, whoever unmaps, flushes, evicts or maps meanwhile.
//!
//! Four writers keep counters of their own in every word of a region that is far larger than its memory.
//! At the end the store must hold exactly their sums.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::random::Random;
use common::*;
use userfault_engine::{FaultWay, Region};

const WRITERS: usize = 3;

/// Random additions by three threads while `disturb` runs in a fourth; then close, and compare.
fn hold_against(kind: Kind, rounds: usize, disturb: impl Fn(&Region, &mut Random) + Sync) {
    let blocks = if kind.block == HUGE { 8 } else { 64 };
    let len = blocks * kind.block;
    let words = len / 8;
    let store = Bytes::ready(vec![0; len]);
    let region = open(kind, &store, len, 5);
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let sums = thread::scope(|scope| {
        let (region, disturb, stop) = (&region, &disturb, &stop);
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                scope.spawn(move || {
                    let mut random = Random::new(writer as u64 + 1);
                    let mut sums = vec![0u64; words / WRITERS];
                    for round in 0..rounds {
                        let index = random.below(words / WRITERS);
                        touch::add_word(region, index * WRITERS + writer, round as u64 + 1);
                        sums[index] += round as u64 + 1;
                    }
                    sums
                })
            })
            .collect();
        let disturber = scope.spawn(move || {
            let mut random = Random::new(99);
            while !stop.load(Ordering::Relaxed) {
                disturb(region, &mut random);
            }
        });
        let sums: Vec<_> = writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .collect();
        stop.store(true, Ordering::Relaxed);
        disturber.join().unwrap();
        sums
    });
    println!("{kind:?}: {:?}, {:?}", began.elapsed(), region.stats());
    region.close().unwrap();
    for (writer, sums) in sums.iter().enumerate() {
        for (index, sum) in sums.iter().enumerate() {
            let word = index * WRITERS + writer;
            assert_eq!(
                store.word(word),
                *sum,
                "{kind:?}: word {word}, {:?}",
                region.stats()
            );
        }
    }
}

fn rounds(kind: Kind) -> usize {
    apart::rounds(match kind.block {
        SMALL => 8_000,
        HUGE => 800,
        _ => 3_000,
    })
}

/// A whole block of the region, at random.
fn some_block(region: &Region, random: &mut Random) -> (usize, usize) {
    let block = random.below(region.len() / region.block());
    (block * region.block(), region.block())
}

#[test]
fn evictions_that_race_with_writers_lose_nothing() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            hold_against(kind, rounds(kind), |region, random| {
                let (start, len) = some_block(region, random);
                region.evict(start as u64, len as u64).unwrap();
            });
        }
    });
}

#[test]
fn flushes_that_race_with_writers_and_evictions_lose_nothing() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            hold_against(kind, rounds(kind), |region, random| {
                let (start, len) = some_block(region, random);
                region.flush(start as u64, len as u64).unwrap();
                if random.below(8) == 0 {
                    region.flush(0, region.len() as u64).unwrap();
                }
            });
        }
    });
}

#[test]
fn a_program_that_unmaps_its_own_pages_loses_nothing() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            hold_against(kind, rounds(kind), |region, random| {
                let (start, len) = some_block(region, random);
                assert_eq!(touch::madvise(region, start, len, libc::MADV_DONTNEED), 0);
                if random.below(4) == 0 {
                    // The evidence went with the mapping; a flush must not take that for clean.
                    region.flush(start as u64, len as u64).unwrap();
                }
                thread::sleep(Duration::from_micros(50));
            });
        }
    });
}

#[test]
fn pwrite_and_prefetch_that_race_with_writers_lose_nothing() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let scratch = vec![0u8; 8];
            hold_against(kind, rounds(kind), |region, random| {
                let words = region.len() / 8;
                // Words that no writer has: the rest of a division by their number.
                let word = words / WRITERS * WRITERS + random.below(words % WRITERS + 1);
                if word < words {
                    region.pwrite(&scratch, word as u64 * 8).unwrap();
                }
                let (start, len) = some_block(region, random);
                let _ = region
                    .prefetch(&[(start as u64, len as u64)])
                    .unwrap()
                    .wait();
                let mut bytes = [0; 100];
                region.pread(&mut bytes, start as u64 + 50).unwrap();
            });
        }
    });
}

#[test]
fn writes_by_system_calls_are_not_lost() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let (blocks, len) = (16, 16 * kind.block);
            let store = Bytes::ready(vec![0; len]);
            let region = open(kind, &store, len, 5);
            let zero = std::fs::File::open("/proc/self/exe").unwrap();
            let exe = std::fs::read("/proc/self/exe").unwrap();
            let mut expected = vec![0; len];
            let mut random = Random::new(5);
            use std::os::fd::AsRawFd;
            for _ in 0..400 {
                let size = 1 + random.below(9000);
                let (at, from) = (random.below(len - size), random.below(exe.len() - size));
                // The kernel asks nobody for what the touching thread would have to bring.
                let pin = (kind.fault == FaultWay::Inline)
                    .then(|| region.pin(at as u64, size as u64, false).unwrap());
                let done = touch::pread_into(&region, at, size, zero.as_raw_fd(), from);
                assert_eq!(done, size as isize);
                drop(pin);
                expected[at..at + size].copy_from_slice(&exe[from..from + size]);
                if random.below(10) == 0 {
                    let block = random.below(blocks) * kind.block;
                    region.evict(block as u64, kind.block as u64).unwrap();
                }
            }
            println!("{kind:?}: {:?}", region.stats());
            region.close().unwrap();
            assert!(store.to_vec() == expected, "{kind:?}");
        }
    });
}
