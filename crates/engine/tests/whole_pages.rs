//! A page is not seen before it is whole, and never as zeros that are not in the store.
//!
//! Unsafe: touches the tail of a mapping behind the end of its region.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::{Access, FaultWay, Pages, Region};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

/// Kinds with the access they are opened for; read-only small blocks live in private memory.
fn kinds() -> Vec<(Kind, Access)> {
    let private = Kind {
        name: "4KiB private",
        ..COPIED_64K
    };
    let mut kinds: Vec<_> = writable_kinds()
        .into_iter()
        .map(|kind| (kind, Access::ReadWrite))
        .collect();
    kinds.push((private, Access::ReadOnly));
    kinds.push((VIEWED, Access::ReadOnly));
    kinds.push((HUGE_PAGES, Access::ReadOnly));
    kinds
}

fn slow(kind: Kind, access: Access, blocks: usize, delay: u64) -> Arc<Region> {
    let len = blocks * kind.block;
    let rule = Rule::every(Call::Read, Action::Delay(Duration::from_millis(delay)));
    let memory = Arc::new(MemoryStore::new(patterned(len)));
    let store = Arc::new(FaultyStore::new(memory, vec![rule]));
    let region = Region::open(store, options(kind, access, len, None)).unwrap();
    if kind.pages == Pages::Small {
        assert_eq!(region.pages(), kind.name);
    }
    region
}

#[test]
fn readers_of_a_block_under_way_see_it_whole() {
    apart!(100, {
        for (kind, access) in kinds() {
            let blocks = 6;
            let region = slow(kind, access, blocks, 20);
            thread::scope(|scope| {
                for reader in 0..6 {
                    let region = &region;
                    scope.spawn(move || {
                        for block in 0..blocks {
                            // Another page of the block for each reader, some a little later.
                            thread::sleep(Duration::from_millis(reader as u64 * 3));
                            let at =
                                block * kind.block + ((reader * kind.block / 6) & !4095) + reader;
                            assert_eq!(touch::read(region, at), pattern(at), "{kind:?} {access:?}");
                        }
                    });
                }
            });
        }
    });
}

#[test]
fn a_system_call_on_a_block_under_way_sees_it_whole() {
    apart!(100, {
        use std::os::fd::AsRawFd;
        // A system call on what the touching thread would have to bring fails.
        let served = |(kind, _): &(Kind, Access)| kind.fault == FaultWay::Threads;
        for (kind, access) in kinds().into_iter().filter(served) {
            let blocks = 4;
            let region = slow(kind, access, blocks, 20);
            let file = std::fs::OpenOptions::new()
                .write(true)
                .read(true)
                .create(true)
                .truncate(true)
                .open(std::env::temp_dir().join(format!("userfault-whole-{}", std::process::id())))
                .unwrap();
            std::fs::remove_file(
                std::env::temp_dir().join(format!("userfault-whole-{}", std::process::id())),
            )
            .unwrap();
            let len = blocks * kind.block;
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut done = 0;
                    while done < len {
                        let step =
                            touch::pwrite_from(&region, done, len - done, file.as_raw_fd(), done);
                        assert!(step > 0, "{step}");
                        done += step as usize;
                    }
                });
                for at in (0..len).step_by(4096).rev() {
                    assert_eq!(touch::read(&region, at), pattern(at));
                }
            });
            use std::os::unix::fs::FileExt;
            let mut written = vec![0; len];
            file.read_exact_at(&mut written, 0).unwrap();
            assert!(written == patterned(len), "{kind:?} {access:?}");
        }
    });
}

#[test]
fn threads_that_race_for_blocks_as_they_come_and_go_see_no_zeros() {
    apart!(100, {
        for (kind, access) in kinds() {
            let blocks = 10;
            let len = blocks * kind.block;
            let store = Bytes::ready(patterned(len));
            let limit = Some(5 * kind.block as u64 + (64 << 10));
            let region = Region::open(store, options(kind, access, len, limit)).unwrap();
            thread::scope(|scope| {
                for reader in 0..4 {
                    let region = &region;
                    scope.spawn(move || {
                        let mut random = random::Random::new(reader);
                        for _ in 0..if kind.block == HUGE { 400 } else { 4000 } {
                            let at = random.below(len);
                            assert_eq!(touch::read(region, at), pattern(at), "{kind:?} {access:?}");
                        }
                    });
                }
            });
        }
    });
}

#[test]
fn the_tail_of_the_last_page_is_zeros_and_is_never_stored() {
    apart!(30, {
        for kind in writable_kinds() {
            let len = 2 * kind.block + 1234;
            let store = Bytes::ready(patterned(3 * kind.block));
            let region =
                Region::open(store.clone(), options(kind, Access::ReadWrite, len, None)).unwrap();
            let mapped = len.next_multiple_of(4096);
            let tail = region.base().wrapping_add(len);
            for at in 0..mapped - len {
                // SAFETY: the mapping is rounded up to a page.
                unsafe {
                    assert_eq!(tail.add(at).read_volatile(), 0, "{kind:?}");
                    tail.add(at).write_volatile(0xEE);
                }
            }
            touch::write(&region, len - 1, 0);
            region.evict(2 * kind.block as u64, 1234).unwrap();
            region.close().unwrap();
            let stored = store.to_vec();
            assert_eq!(stored[len - 1], 0);
            assert!(
                stored[len..] == patterned(3 * kind.block)[len..],
                "{kind:?}"
            );
        }
    });
}
