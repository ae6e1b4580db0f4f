//! A store that likes one size of block best gets it, unless the program asks for another.

mod common;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use common::*;
use userfault_engine::{Access, Pages, Region, RegionOptions};
use userfault_store::Store;

/// Zeros in objects of one size, of which each read is noted.
struct Objects {
    preferred: usize,
    len: u64,
    reads: Mutex<Vec<(u64, usize)>>,
}

impl Store for Objects {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.lock().unwrap().push((offset, buf.len()));
        buf.fill(0);
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn writable(&self) -> bool {
        false
    }

    fn preferred_block(&self) -> usize {
        self.preferred
    }

    fn name(&self) -> String {
        "objects".into()
    }
}

fn opened(preferred: usize, pages: Pages, block: Option<usize>) -> (Arc<Objects>, Arc<Region>) {
    let len = 16 << 20;
    let store = Arc::new(Objects {
        preferred,
        len: len as u64,
        reads: Mutex::default(),
    });
    let options = RegionOptions {
        pages,
        block,
        ..options(COPIED, Access::ReadOnly, len, Some(12 << 20))
    };
    (store.clone(), Region::open(store, options).unwrap())
}

#[test]
fn each_read_of_a_store_is_one_of_its_preferred_blocks() {
    apart!(60, {
        for preferred in [256 << 10, 1 << 20, 3 << 20] {
            let (store, region) = opened(preferred, Pages::Small, None);
            let block = preferred.next_power_of_two();
            assert_eq!(region.block(), block);
            for at in (0..region.len()).step_by(64 << 10) {
                assert_eq!(touch::read(&region, at), 0);
            }
            let mut reads = store.reads.lock().unwrap().clone();
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
