//! Blocks that are written whole, one after the other, are mapped writable before they are; whatever that
//! writes in vain is bounded, and is what was there.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use common::*;
use userfault_engine::Region;
use userfault_engine::readahead::Advice;

const BLOCKS: usize = 96;
const MEMORY: usize = 8;

struct Writer {
    kind: Kind,
    store: Arc<Bytes>,
    region: Arc<Region>,
    /// What the program believes.
    bytes: Vec<u8>,
}

impl Writer {
    fn new(kind: Kind) -> Writer {
        let bytes = patterned(BLOCKS * kind.block);
        let store = Bytes::new(bytes.clone());
        let region = open(kind, &store, bytes.len(), MEMORY);
        region
            .advise(0, bytes.len() as u64, Advice::Random)
            .unwrap();
        Writer {
            kind,
            store,
            region,
            bytes,
        }
    }

    /// One that has written the first 40 blocks, from end to end.
    fn after_whole_blocks(kind: Kind) -> Writer {
        let mut writer = Writer::new(kind);
        let pages = writer.pages();
        writer.written_by(|writer| writer.write(0..40, 0..pages));
        writer
    }

    /// Writes `pages` of each block.
    fn write(&mut self, blocks: std::ops::Range<usize>, pages: std::ops::Range<usize>) {
        for block in blocks {
            for page in pages.clone() {
                let at = block * self.kind.block + page * SMALL + 5;
                self.bytes[at] ^= 0xff;
                touch::write(&self.region, at, self.bytes[at]);
            }
        }
    }

    fn read(&self, blocks: std::ops::Range<usize>) {
        for block in blocks {
            let at = block * self.kind.block + 77;
            assert_eq!(touch::read(&self.region, at), self.bytes[at]);
        }
    }

    /// Blocks that are written to the store by `what` and the write-back of it.
    fn written_by(&mut self, what: impl FnOnce(&mut Writer)) -> f64 {
        self.region.flush(0, self.bytes.len() as u64).unwrap();
        let before = self.store.written.load(Relaxed);
        what(self);
        self.region.flush(0, self.bytes.len() as u64).unwrap();
        (self.store.written.load(Relaxed) - before) as f64 / self.kind.block as f64
    }

    fn check(&self) {
        assert!(self.store.to_vec() == self.bytes, "{:?}", self.kind);
    }

    fn pages(&self) -> usize {
        self.kind.block / SMALL
    }
}

/// Kinds with many pages in a block, where the kernel keeps the evidence of writes.
fn kinds() -> Vec<Kind> {
    if !inline_can_write() {
        println!("the kernel keeps no evidence of writes: nothing is presumed");
        return Vec::new();
    }
    let kinds = writable_kinds().into_iter();
    kinds
        .filter(|kind| *kind != COPIED && *kind != HUGETLB)
        .collect()
}

#[test]
fn after_blocks_that_were_written_whole_the_next_ones_count_as_written_until_one_was_not() {
    apart!(120, {
        for kind in kinds() {
            let mut writer = Writer::after_whole_blocks(kind);
            let single = 1.0 / writer.pages() as f64;
            let presumed = writer.written_by(|writer| writer.write(40..48, 3..4));
            assert!(
                (5.0..=7.1 + 8.0 * single).contains(&presumed),
                "{kind:?}: {presumed}"
            );
            // Some of these have left by then, hardly written.
            writer.write(48..72, 3..4);
            let after = writer.written_by(|writer| writer.write(72..80, 3..4));
            assert!(after <= 8.0 * single + 0.001, "{kind:?}: {after}");
            writer.check();
        }
    });
}

#[test]
fn a_program_that_has_written_and_now_reads_has_few_blocks_written_in_vain() {
    apart!(120, {
        for kind in kinds() {
            let mut writer = Writer::after_whole_blocks(kind);
            let in_vain = writer.written_by(|writer| writer.read(40..BLOCKS));
            assert!((1.0..=32.0).contains(&in_vain), "{kind:?}: {in_vain}");
            writer.check();
        }
    });
}

#[test]
fn a_program_that_changes_little_between_flushes_has_only_that_written_back() {
    apart!(120, {
        for kind in kinds() {
            let mut writer = Writer::after_whole_blocks(kind);
            let single = 1.0 / writer.pages() as f64;
            for block in 40..72 {
                writer.written_by(|writer| writer.write(block..block + 1, 3..4));
            }
            for block in 72..BLOCKS {
                let written = writer.written_by(|writer| writer.write(block..block + 1, 3..4));
                assert!(written <= single + 0.001, "{kind:?}: {written}");
            }
            writer.check();
        }
    });
}

#[test]
fn a_program_that_writes_single_pages_has_those_written_and_no_others() {
    apart!(120, {
        for kind in kinds() {
            let mut writer = Writer::new(kind);
            let single = 1.0 / writer.pages() as f64;
            let written = writer.written_by(|writer| writer.write(0..BLOCKS, 9..10));
            let expected = BLOCKS as f64 * single;
            assert!(
                (written - expected).abs() < 0.001,
                "{kind:?}: {written} of {expected}"
            );
            writer.check();
        }
    });
}
