//! A fill that ends in the middle of a block, for want of memory: what was written to the pages that were
//! already in place is not lost, whoever brought them. Only a build with the feature `defects` can be made to do that.
#![cfg(feature = "defects")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::{Access, Region};

/// Runs this test in a child whose copies break off `times` times, after two pages.
fn broken(name: &str, times: usize, test: impl FnOnce()) {
    broken_after(name, times, 2, test);
}

/// As [`broken`], after so many pages.
fn broken_after(name: &str, times: usize, pages: usize, test: impl FnOnce()) {
    if apart::is_child(name) {
        return test();
    }
    let broken = format!("{times},{}", pages * SMALL);
    let environment = [("USERFAULT_COPY_BREAKS_OFF", broken.as_str())];
    let ended = apart::again(name, Duration::from_secs(60), &environment);
    apart::check(name, &ended);
}

/// True if a page of a region is mapped.
fn is_mapped(region: &Region, page: usize) -> bool {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    let at = ((region.base() as usize / SMALL + page) * entry.len()) as u64;
    pagemap.read_exact_at(&mut entry, at).unwrap();
    u64::from_le_bytes(entry) >> 63 != 0
}

/// A thread adds to a word of the block's first page while that is in place, long before the block is whole.
fn count_while(region: &Region, others: impl FnOnce()) -> u64 {
    count_in(region, 0, others)
}

/// As [`count_while`], to the second word of any page.
fn count_in(region: &Region, page: usize, others: impl FnOnce()) -> u64 {
    let word = page * SMALL / 8 + 1;
    let (stop, sum) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if is_mapped(region, page) {
                    touch::add_word(region, word, 1);
                    sum.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        others();
        while sum.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
    sum.into_inner()
}

fn written_before_it_breaks_off(kind: Kind) {
    let len = 4 * kind.block;
    let store = Bytes::ready(patterned(len));
    let before = store.word(1);
    let region = open(kind, &store, len, 5);
    let sum = count_while(&region, || {
        // The last page of the block: there when it is whole.
        let last = kind.block - 1;
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
}

fn stays_in_memory(kind: Kind) {
    let len = 4 * kind.block;
    let store = Bytes::ready(patterned(len));
    let before = store.word(1);
    store.full.store(true, Ordering::Relaxed);
    let region = open(kind, &store, len, 5);
    let sum = count_while(&region, || {
        let last = kind.block - 1;
        assert_eq!(touch::read(&region, last), pattern(last));
    });
    region.flush(0, len as u64).unwrap_err();
    store.full.store(false, Ordering::Relaxed);
    while region.flush(0, len as u64).is_err() {}
    assert_eq!(store.word(1), before.wrapping_add(sum));
    assert!(store.to_vec()[16..] == patterned(len)[16..]);
    region.close().unwrap();
}

/// Blocks that come at one go; of each convoy of two and more the second block breaks off after its first page.
const IN_CONVOYS: Kind = Kind {
    block: 4 * SMALL,
    ..COPIED
};

#[test]
fn nothing_is_lost_of_any_block_of_a_convoy_that_breaks_off() {
    let name = "nothing_is_lost_of_any_block_of_a_convoy_that_breaks_off";
    broken_after(name, 3, 5, || {
        let len = 8 << 20;
        let store = Bytes::ready(patterned(len));
        let region = Region::open(
            store.clone(),
            options(IN_CONVOYS, Access::ReadWrite, len, Some(64 << 20)),
        )
        .unwrap();
        // Three touches in a row are a walk: the first convoy is of blocks 3 and 4.
        let page = 4 * IN_CONVOYS.block / SMALL;
        let word = page * SMALL / 8 + 1;
        let before = store.word(word);
        let sum = count_in(&region, page, || {
            for at in (0..len).step_by(SMALL) {
                // Who touches it first brings it in alone.
                while at == 3 * IN_CONVOYS.block && !is_mapped(&region, page) {
                    thread::yield_now();
                }
                assert_eq!(touch::read(&region, at), pattern(at));
            }
        });
        assert!(
            store.writes.load(Ordering::Relaxed) > 0,
            "nothing was halfway"
        );
        region.close().unwrap();
        assert_eq!(store.word(word), before.wrapping_add(sum));
        let (mut stored, whole) = (store.to_vec(), patterned(len));
        stored[word * 8..word * 8 + 8].copy_from_slice(&whole[word * 8..word * 8 + 8]);
        assert!(stored == whole);
    });
}

#[test]
fn what_is_written_before_the_copy_breaks_off_goes_to_the_store() {
    let name = "what_is_written_before_the_copy_breaks_off_goes_to_the_store";
    broken(name, 5, || written_before_it_breaks_off(COPIED_64K));
}

#[test]
fn so_does_what_is_written_before_the_view_is_mapped_whole() {
    let name = "so_does_what_is_written_before_the_view_is_mapped_whole";
    broken(name, 5, || written_before_it_breaks_off(VIEWED));
}

#[test]
fn a_handler_loses_nothing_of_it_either() {
    let name = "a_handler_loses_nothing_of_it_either";
    if inline_can_write() {
        broken(name, 1, || written_before_it_breaks_off(COPIED_INLINE));
    }
}

#[test]
fn nor_does_a_handler_that_maps_the_view() {
    let name = "nor_does_a_handler_that_maps_the_view";
    if inline_can_write() {
        broken(name, 1, || written_before_it_breaks_off(VIEWED_INLINE));
    }
}

#[test]
fn what_the_store_does_not_take_then_stays_in_memory() {
    let name = "what_the_store_does_not_take_then_stays_in_memory";
    broken(name, 1, || stays_in_memory(COPIED_64K));
}

#[test]
fn also_when_a_handler_brought_it() {
    let name = "also_when_a_handler_brought_it";
    if inline_can_write() {
        broken(name, 1, || stays_in_memory(COPIED_INLINE));
    }
}

#[test]
fn a_read_only_block_is_read_again() {
    let name = "a_read_only_block_is_read_again";
    broken(name, 5, || {
        let len = 4 * COPIED_64K.block;
        let options = options(COPIED_64K, userfault_engine::Access::ReadOnly, len, None);
        let store = Bytes::ready(patterned(len));
        let region = Region::open(store, options).unwrap();
        assert_eq!(region.pages(), "4KiB private");
        for at in (0..len).step_by(SMALL) {
            assert_eq!(touch::read(&region, at), pattern(at));
        }
    });
}
