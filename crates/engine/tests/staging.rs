//! Buffers between stores and memory are memory too.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use userfault_engine::{Access, Region, set_memory_limit, stats};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{what}: {:?}",
            stats()
        );
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn buffers_between_stores_and_memory_count_against_the_limit_and_do_not_pile_up() {
    apart!(60, {
        let kind = Kind {
            block: 1 << 20,
            ..COPIED
        };
        let (blocks, most) = (24, 12);
        let len = blocks * kind.block;
        set_memory_limit(Some((most * kind.block) as u64)).unwrap();
        let memory = Arc::new(MemoryStore::new(patterned(len)));
        let slow = Rule::every(Call::Read, Action::Delay(Duration::from_millis(50)));
        let store = Arc::new(FaultyStore::new(memory, vec![slow]));
        let options = options(kind, Access::ReadWrite, len, None);
        let region = Region::open(store.clone(), options).unwrap();
        let mut largest = 0;
        thread::scope(|scope| {
            let readers: Vec<_> = (0..6usize)
                .map(|reader| {
                    let region = &region;
                    scope.spawn(move || {
                        for block in (reader..blocks).step_by(6) {
                            let at = block * kind.block + reader;
                            assert_eq!(touch::read(region, at), pattern(at));
                        }
                    })
                })
                .collect();
            while readers.iter().any(|reader| !reader.is_finished()) {
                largest = largest.max(stats().staging);
                // All of it, and what is in memory, lies within what is counted as used; and that within the
                // limit, but for the buffers of those who have their room already. The figures are not
                // read at one instant.
                wait_until("the buffers are counted", || {
                    let stats = stats();
                    stats.used >= stats.staging && stats.used <= stats.limit + stats.staging
                });
                thread::sleep(Duration::from_millis(1));
            }
        });
        assert!(largest > 3 << 20, "six reads of 1 MiB at once: {largest}");
        // Little is kept for later, once the last thread that brought something in has let go of its buffer.
        wait_until("little is kept", || stats().staging <= 1 << 20);
        store.set_plan(Vec::new());
        region.pwrite(&vec![1; 3 << 20], 5).unwrap();
        region.flush(0, len as u64).unwrap();
        wait_until("little is kept of what a write needed", || {
            stats().staging <= 1 << 20
        });
        // A larger limit has a larger shelf, which a smaller one takes back.
        set_memory_limit(Some(256 << 20)).unwrap();
        region.pwrite(&vec![2; 3 << 20], 5).unwrap();
        set_memory_limit(Some((most * kind.block) as u64)).unwrap();
        wait_until("the shelf is as small as before", || {
            stats().staging <= 1 << 20
        });
        region.close().unwrap();
        wait_until("nothing but buffers is used", || {
            let stats = stats();
            stats.used == stats.staging
        });
    });
}
