//! A store that likes one size of block best gets it, unless the program asks for another.

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use userfault_engine::{Access, Pages, Region, RegionOptions};

/// Reads of a store, by offset and length.
type Reads = Arc<Mutex<Vec<(u64, usize)>>>;

/// A region over zeros in objects of one size, and the reads of them.
fn opened(preferred: usize, pages: Pages, block: Option<usize>) -> (Reads, Arc<Region>) {
    let len = 16 << 20;
    let reads = Reads::default();
    let noted = reads.clone();
    let store = Arc::new(Readable {
        len: len as u64,
        preferred,
        read: move |offset, buf: &mut [u8]| {
            noted.lock().unwrap().push((offset, buf.len()));
            buf.fill(0);
        },
    });
    let options = RegionOptions {
        pages,
        block,
        ..options(COPIED, Access::ReadOnly, len, Some(12 << 20))
    };
    (reads, Region::open(store, options).unwrap())
}

#[test]
fn each_read_of_a_store_is_one_of_its_preferred_blocks() {
    apart!(60, {
        for preferred in [256 << 10, 1 << 20, 3 << 20] {
            let (noted, region) = opened(preferred, Pages::Small, None);
            let block = preferred.next_power_of_two();
            assert_eq!(region.block(), block);
            for at in (0..region.len()).step_by(64 << 10) {
                assert_eq!(touch::read(&region, at), 0);
            }
            let mut reads = noted.lock().unwrap().clone();
            reads.sort_unstable();
            reads.dedup();
            let expected: Vec<_> = (0..region.len() / block)
                .map(|index| ((index * block) as u64, block))
                .collect();
            assert_eq!(reads, expected);
        }
    });
}

#[test]
fn a_block_that_is_asked_for_or_the_least_that_is_sensible_comes_first() {
    apart!(60, {
        let (_, region) = opened(1 << 20, Pages::Small, Some(8192));
        assert_eq!(region.block(), 8192, "asked for");
        let (_, small) = opened(4096, Pages::Small, None);
        let (_, indifferent) = opened(0, Pages::Small, None);
        assert_eq!(small.block(), indifferent.block());
        assert!(small.block() > 4096);
        let (_, huge) = opened(1 << 20, Pages::Huge, None);
        assert_eq!(huge.block(), HUGE, "a page is never larger than its block");
    });
}
