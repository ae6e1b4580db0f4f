//! The thirteen defects of umap 2.1.0, each as a test that this engine passes.
//!
//! `cargo test --release -p userfault-engine --features defects --test umap_defects` builds an engine into
//! which each defect can be put back, and shows that exactly its test then fails: it reports an error, it
//! crashes, or it does not end.
//!
//! Unsafe: forks, and a limit on descriptors that is set for this process alone.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::readahead::Advice;
use userfault_engine::{Access, Error, Region, RegionOptions, set_memory_limit};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

/// How long a test may take, seconds. One that hangs is ended then.
const TIME: u64 = 40;

fn plain(kind: Kind, len: usize) -> RegionOptions {
    options(kind, Access::ReadWrite, len, None)
}

#[test]
fn d01_a_region_begins_at_its_offset() {
    apart!(TIME, {
        for (kind, offset) in [(COPIED_64K, 3 * 4096), (COPIED, 12_345), (HUGE_PAGES, HUGE)] {
            let len = 4 * kind.block;
            let store = Bytes::ready(patterned(offset + len));
            let options = RegionOptions {
                offset: offset as u64,
                ..plain(kind, len)
            };
            let region = Region::open(store.clone(), options).unwrap();
            for at in [0, 1, kind.block, len - 1] {
                assert_eq!(touch::read(&region, at), pattern(offset + at), "{kind:?}");
            }
            touch::write(&region, 5, 0);
            region.close().unwrap();
            let stored = store.to_vec();
            assert_eq!(stored[offset + 5], 0, "{kind:?}");
            assert!(stored[..offset] == patterned(offset), "{kind:?}");
        }
    });
}

#[test]
fn d02_what_a_region_took_goes_with_it() {
    fn held() -> [usize; 2] {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        [
            std::fs::read_dir("/proc/self/fd").unwrap().count(),
            maps.lines().count(),
        ]
    }

    apart!(TIME, {
        let once = |kind: Kind| {
            let len = 6 * kind.block;
            let region = Region::open(Bytes::ready(patterned(len)), plain(kind, len)).unwrap();
            touch::write(&region, 0, 1);
            region.close().unwrap();
        };
        for kind in [COPIED_64K, VIEWED, HUGE_PAGES] {
            once(kind);
            let before = held();
            for _ in 0..30 {
                once(kind);
            }
            let after = held();
            // Threads of the engine may have been started meanwhile, each with a stack.
            assert!(
                after[0] < before[0] + 15 && after[1] < before[1] + 25,
                "{kind:?}: {before:?}, {after:?}"
            );
        }
        let stats = userfault_engine::stats();
        assert_eq!((stats.resident, stats.resting, stats.regions), (0, 0, 0));
    });
}

#[test]
fn d03_the_tail_of_the_last_page_is_nobodys() {
    apart!(TIME, {
        for kind in [COPIED, COPIED_64K, HUGE_PAGES] {
            // The store is longer than the region; a file that ends with the region would grow.
            let len = kind.block + 1234;
            for more in [0, 2 * kind.block] {
                let store = Bytes::ready(patterned(len + more));
                let region = Region::open(store.clone(), plain(kind, len)).unwrap();
                let tail = len.next_multiple_of(SMALL) - len;
                assert_eq!(touch::behind(&region, tail), vec![0; tail], "{kind:?}");
                touch::fill_behind(&region, tail, 7);
                touch::write(&region, len - 1, 0);
                region.flush(0, len as u64).unwrap();
                region.close().unwrap();
                let stored = store.to_vec();
                assert_eq!(stored[len - 1], 0);
                assert!(
                    stored[len..] == patterned(len + more)[len..],
                    "{kind:?}: the next one's bytes were written"
                );
            }
        }
    });
}

#[test]
fn d04_a_flush_while_threads_write_ends() {
    apart!(TIME, {
        let (kind, blocks) = (COPIED_64K, 48);
        let len = blocks * kind.block;
        let region = open(kind, &Bytes::ready(patterned(len)), len, 8);
        let writing = AtomicUsize::new(4);
        thread::scope(|scope| {
            let (region, writing) = (&region, &writing);
            for writer in 0..4usize {
                scope.spawn(move || {
                    let mut random = random::Random::new(writer as u64 + 1);
                    for _ in 0..1000 {
                        touch::write(region, random.below(len), 1);
                    }
                    writing.fetch_sub(1, Ordering::Relaxed);
                });
            }
            while writing.load(Ordering::Relaxed) > 0 {
                region.flush(0, len as u64).unwrap();
            }
        });
    });
}

#[test]
fn d05_a_region_that_closes_is_not_felt_by_its_neighbour() {
    apart!(TIME, {
        let (kind, blocks) = (COPIED_64K, 40);
        let len = blocks * kind.block;
        set_memory_limit(Some(12 * kind.block as u64)).unwrap();
        let open = || Region::open(Bytes::ready(patterned(len)), plain(kind, len)).unwrap();
        let stays = open();
        // Nothing is brought in that was not asked for.
        stays.advise(0, len as u64, Advice::Random).unwrap();
        let goes = [0; 4].map(|_| open());
        for at in (0..len).step_by(SMALL) {
            assert_eq!(touch::read(&goes[at / SMALL % 4], at), pattern(at));
        }
        for region in &goes {
            region.evict(0, len as u64).unwrap();
        }
        for at in (0..len).step_by(SMALL) {
            assert_eq!(touch::read(&stays, at), pattern(at));
        }
        // All memory is the neighbour's.
        for region in goes {
            region.close().unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        for at in (0..len).step_by(SMALL) {
            assert_eq!(touch::read(&stays, at), pattern(at));
        }
    });
}

#[test]
fn d06_what_is_written_through_a_pin_is_written_back() {
    apart!(TIME, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let len = 8 * kind.block;
            let store = Bytes::ready(patterned(len));
            let region = Region::open(store.clone(), plain(kind, len)).unwrap();
            let pins = [false, true].map(|device| {
                let at = (1 + usize::from(device)) * kind.block;
                (
                    at,
                    region.pin(at as u64, kind.block as u64, device).unwrap(),
                )
            });
            for (at, _) in &pins {
                touch::write(&region, at + 9, 0);
            }
            region.flush(0, len as u64).unwrap();
            for (at, _) in &pins {
                assert_eq!(store.to_vec()[at + 9], 0, "{kind:?}");
            }
        }
    });
}

#[test]
fn d07_a_prefetch_may_begin_anywhere() {
    apart!(TIME, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let len = 8 * kind.block;
            let region = Region::open(Bytes::ready(patterned(len)), plain(kind, len)).unwrap();
            let at = kind.block as u64 + 123;
            let ticket = region.prefetch(&[(at, kind.block as u64)]).unwrap();
            ticket.wait().unwrap();
            let there = region.resident(0, len as u64).unwrap();
            assert_eq!(there, [0, 1, 1, 0, 0, 0, 0, 0], "{kind:?}");
        }
    });
}

#[test]
fn d08_a_forked_child_does_not_read_zeros() {
    apart!(TIME, {
        for kind in [COPIED_64K, HUGE_PAGES] {
            let len = 4 * kind.block;
            let region = Region::open(Bytes::ready(patterned(len)), plain(kind, len)).unwrap();
            touch::read(&region, 0);
            for at in [0, 2 * kind.block] {
                // SAFETY: the child touches memory, and ends.
                let pid = unsafe { libc::fork() };
                if pid == 0 {
                    let byte = touch::read(&region, at);
                    // SAFETY: ends the child without running what belongs to the parent.
                    unsafe { libc::_exit(i32::from(byte)) };
                }
                let mut status = 0;
                // SAFETY: waits for the child just made.
                assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                assert!(
                    libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV,
                    "{kind:?}: the child read {}",
                    libc::WEXITSTATUS(status)
                );
            }
        }
    });
}

#[test]
fn d09_an_error_of_the_store_ends_nobody() {
    apart!(TIME, {
        let kind = COPIED_64K;
        let len = 8 * kind.block;
        let memory = Arc::new(MemoryStore::new(patterned(len)));
        let fails = Rule::every(Call::Read, Action::Fail { errno: libc::EIO });
        let store = Arc::new(FaultyStore::new(memory, vec![fails]));
        let region = Region::open(store.clone(), plain(kind, len)).unwrap();
        let error = region.pread(&mut [0], 0).unwrap_err();
        assert!(matches!(error, Error::Poisoned { .. }), "{error:?}");
        assert_eq!(region.errors()[0].errno, libc::EIO);
        store.set_plan(Vec::new());
        assert_eq!(touch::read(&region, kind.block), pattern(kind.block));
        region.heal(0, len as u64).unwrap();
        assert_eq!(touch::read(&region, 0), pattern(0));
    });
}

#[test]
fn d10_a_buffer_of_a_few_blocks_is_enough() {
    apart!(TIME, {
        for kind in [COPIED, HUGE_PAGES] {
            let len = 12 * kind.block;
            let options = options(kind, Access::ReadWrite, len, Some(1));
            let region = Region::open(Bytes::ready(patterned(len)), options).unwrap();
            for block in 1..12 {
                let at = block * kind.block - 3;
                let expected: Vec<u8> = (at..at + 8).map(pattern).collect();
                let word = touch::read_word(&region, at);
                assert_eq!(word.to_ne_bytes()[..], expected, "{kind:?}");
            }
        }
    });
}

#[test]
fn d11_a_block_larger_than_the_alignment_of_the_memory_reads_its_own_bytes() {
    apart!(TIME, {
        let kind = Kind {
            block: 8 << 20,
            ..VIEWED
        };
        let len = 3 * kind.block;
        // The kernel chooses the address: until one is no multiple of the block.
        let mut others = Vec::new();
        let region = loop {
            let region = Region::open(Bytes::ready(patterned(len)), plain(kind, len)).unwrap();
            if !(region.base() as usize).is_multiple_of(kind.block) {
                break region;
            }
            assert!(
                others.len() < 100,
                "every address is a multiple of the block"
            );
            // Moves the next one by an odd number of 2 MiB.
            let odd = Kind {
                block: HUGE,
                ..VIEWED
            };
            others.push(region);
            others.push(Region::open(Bytes::ready(vec![0; HUGE]), plain(odd, HUGE)).unwrap());
        };
        // Each block is touched at its end first, where the next one would begin if it were counted from
        // address 0.
        for at in (0..len).step_by(SMALL).rev() {
            assert_eq!(touch::read(&region, at), pattern(at), "at {at}");
        }
    });
}

#[test]
fn d12_bad_arguments_are_refused_in_words() {
    apart!(TIME, {
        let kind = COPIED_64K;
        let len = 4 * kind.block;
        let store = Bytes::ready(patterned(len));
        let invalid = |result: Result<(), Error>| {
            let error = result.expect_err("a bad argument was accepted");
            assert!(matches!(error, Error::Invalid(_)), "{error:?}");
        };
        invalid(Region::open(store.clone(), plain(kind, 0)).map(drop));
        invalid(Region::open(store.clone(), plain(kind, len + 1)).map(drop));
        let odd = Kind {
            block: 12_345,
            ..kind
        };
        invalid(Region::open(store.clone(), plain(odd, len)).map(drop));
        let region = Region::open(store, plain(kind, len)).unwrap();
        let end = len as u64;
        for (offset, len) in [(end, 1), (0, end + 1), (u64::MAX, 2), (u64::MAX, u64::MAX)] {
            invalid(region.flush(offset, len));
            invalid(region.evict(offset, len));
            invalid(region.prefetch(&[(offset, len)]).map(drop));
            invalid(region.pin(offset, len, false).map(drop));
            invalid(region.resident(offset, len).map(drop));
            invalid(region.heal(offset, len).map(drop));
        }
        invalid(region.pread(&mut [0; 2], end - 1));
        invalid(region.pwrite(&[0; 2], end - 1));
        // A part of a region, or nothing of it, is no bad argument.
        region.evict(0, end / 2).unwrap();
        region.flush(end, 0).unwrap();
        assert_eq!(touch::read(&region, len - 1), pattern(len - 1));
    });
}

#[test]
fn d13_thousands_of_regions_are_no_burden() {
    apart!(TIME, {
        // What most systems give a process.
        let usual = libc::rlimit {
            rlim_cur: 1024,
            rlim_max: 1024,
        };
        // SAFETY: limits this process, which runs this test alone.
        let limited = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const usual) };
        assert_eq!(limited, 0);
        let kind = COPIED;
        let len = 3 * kind.block;
        let store = Bytes::ready(patterned(len));
        let read_only = options(kind, Access::ReadOnly, len, None);
        let regions: Vec<_> = (0..3000)
            .map(|_| Region::open(store.clone(), read_only.clone()).unwrap())
            .collect();
        for region in &regions {
            assert_eq!(touch::read(region, 5), pattern(5));
        }
        // Memory that can be written has a descriptor each; when they are used up, that is said in words.
        let mut writable = Vec::new();
        let error = loop {
            match Region::open(store.clone(), plain(kind, len)) {
                Ok(region) => writable.push(region),
                Err(error) => break error,
            }
        };
        assert!(writable.len() > 900, "{}", writable.len());
        assert!(
            matches!(
                error,
                Error::Os {
                    errno: libc::EMFILE,
                    ..
                }
            ),
            "{error:?}"
        );
        for region in writable.iter().chain(&regions) {
            region.close().unwrap();
        }
        assert_eq!(userfault_engine::stats().regions, 0);
    });
}

/// Only in a build into which the defects can be put back.
#[cfg(feature = "defects")]
mod put_back {
    use super::*;
    use userfault_engine::defects::Defect;

    /// The test for each defect, in the order of [`Defect::ALL`].
    const TESTS: [&str; 13] = [
        "d01_a_region_begins_at_its_offset",
        "d02_what_a_region_took_goes_with_it",
        "d03_the_tail_of_the_last_page_is_nobodys",
        "d04_a_flush_while_threads_write_ends",
        "d05_a_region_that_closes_is_not_felt_by_its_neighbour",
        "d06_what_is_written_through_a_pin_is_written_back",
        "d07_a_prefetch_may_begin_anywhere",
        "d08_a_forked_child_does_not_read_zeros",
        "d09_an_error_of_the_store_ends_nobody",
        "d10_a_buffer_of_a_few_blocks_is_enough",
        "d11_a_block_larger_than_the_alignment_of_the_memory_reads_its_own_bytes",
        "d12_bad_arguments_are_refused_in_words",
        "d13_thousands_of_regions_are_no_burden",
    ];

    /// How long is waited for a test that should hang, seconds.
    const HANG: u64 = 20;

    #[test]
    fn a_defect_that_is_put_back_fails_its_own_test_and_no_other() {
        let failures = |defect: Defect| -> Vec<&str> {
            let own = TESTS[Defect::ALL.iter().position(|one| *one == defect).unwrap()];
            TESTS
                .into_iter()
                .filter(|test| {
                    let time = if *test == own { HANG } else { TIME };
                    let name = format!("{defect:?}");
                    let environment = [("USERFAULT_DEFECT", name.as_str())];
                    let time = Duration::from_secs(time);
                    let ended = apart::attempt(test, time, &environment);
                    if ended.late || ended.code != Some(0) {
                        let (signal, code) = (ended.signal, ended.code);
                        let how = match (ended.late, code) {
                            (true, _) => format!("had not ended after {time:?}"),
                            (_, Some(code)) => format!("failed with status {code}"),
                            _ => format!("was ended by signal {signal}"),
                        };
                        println!("{name}: {test} {how}");
                        true
                    } else {
                        assert!(ended.output.contains("1 passed"), "{}", ended.output);
                        false
                    }
                })
                .collect()
        };
        // Those that hang do nothing but wait: several at once.
        let next = std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= TESTS.len() {
                            return;
                        }
                        let failed = failures(Defect::ALL[index]);
                        assert_eq!(failed, [TESTS[index]], "{:?}", Defect::ALL[index]);
                    }
                });
            }
        });
    }
}
