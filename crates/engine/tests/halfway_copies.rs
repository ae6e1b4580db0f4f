//! UFFDIO_COPY that ends in the middle of a block, for want of memory: what was written to the pages that were
//! already in place is not lost. Only a build with the feature `defects` can be made to do that.
#![cfg(feature = "defects")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

/// Runs this test in a child whose copies break off `times` times, after two pages.
fn broken(name: &str, times: usize, test: impl FnOnce()) {
    if apart::is_child(name) {
        return test();
    }
    let broken = format!("{times},{}", 2 * SMALL);
    let environment = [("USERFAULT_COPY_BREAKS_OFF", broken.as_str())];
    let ended = apart::again(name, Duration::from_secs(60), &environment);
    apart::check(name, &ended);
}

/// A thread adds to a word of the block's first page, which is in place long before the block is whole.
fn count_while(region: &userfault_engine::Region, others: impl FnOnce()) -> u64 {
    let (stop, sum) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                touch::add_word(region, 1, 1);
                sum.fetch_add(1, Ordering::Relaxed);
            }
        });
        while sum.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        others();
        stop.store(true, Ordering::Relaxed);
    });
    sum.into_inner()
}

#[test]
fn what_is_written_before_the_copy_breaks_off_goes_to_the_store() {
    let name = "what_is_written_before_the_copy_breaks_off_goes_to_the_store";
    broken(name, 5, || {
        let len = 4 * COPIED_64K.block;
        let store = Bytes::ready(patterned(len));
        let before = store.word(1);
        let region = open(COPIED_64K, &store, len, 5);
        let sum = count_while(&region, || {
            // The last page of the block: there when it is whole.
            let last = COPIED_64K.block - 1;
            assert_eq!(touch::read(&region, last), pattern(last));
        });
        assert!(
            store.writes.load(Ordering::Relaxed) > 0,
            "nothing was halfway"
        );
        region.close().unwrap();
        assert_eq!(store.word(1), before.wrapping_add(sum));
        let stored = store.to_vec();
        assert!(stored[16..] == patterned(len)[16..]);
    });
}

#[test]
fn what_the_store_does_not_take_then_stays_in_memory() {
    let name = "what_the_store_does_not_take_then_stays_in_memory";
    broken(name, 1, || {
        let len = 4 * COPIED_64K.block;
        let memory = Arc::new(MemoryStore::new(patterned(len)));
        let fails = Rule::every(
            Call::Write,
            Action::Fail {
                errno: libc::ENOSPC,
            },
        );
        let store = Arc::new(FaultyStore::new(memory.clone(), vec![fails]));
        let word = |bytes: Vec<u8>| u64::from_ne_bytes(bytes[8..16].try_into().unwrap());
        let before = word(memory.to_vec());
        let region = open(COPIED_64K, &store, len, 5);
        let sum = count_while(&region, || {
            let last = COPIED_64K.block - 1;
            assert_eq!(touch::read(&region, last), pattern(last));
        });
        region.flush(0, len as u64).unwrap_err();
        store.set_plan(Vec::new());
        while region.flush(0, len as u64).is_err() {}
        assert_eq!(word(memory.to_vec()), before.wrapping_add(sum));
        assert!(memory.to_vec()[16..] == patterned(len)[16..]);
        region.close().unwrap();
    });
}

#[test]
fn a_read_only_block_is_read_again() {
    let name = "a_read_only_block_is_read_again";
    broken(name, 5, || {
        let len = 4 * COPIED_64K.block;
        let options = options(COPIED_64K, userfault_engine::Access::ReadOnly, len, None);
        let store = Bytes::ready(patterned(len));
        let region = userfault_engine::Region::open(store, options).unwrap();
        assert_eq!(region.pages(), "4KiB private");
        for at in (0..len).step_by(SMALL) {
            assert_eq!(touch::read(&region, at), pattern(at));
        }
    });
}
