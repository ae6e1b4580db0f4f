//! Small neighbours that a walk brings in at one go, and takes out at one go.
//!
//! Unsafe: has the kernel forget what it has of a file.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::*;
use userfault_engine::{Access, Region};
use userfault_store::{FileMode, FileOptions, FileStore};

const LEN: usize = 32 << 20;

/// A convoy of 64 blocks of 4 KiB needs a limit of 64 convoys.
const LIMIT: u64 = 16 << 20;

fn opened(store: &Arc<Bytes>, access: Access, kind: Kind) -> Arc<Region> {
    let options = options(kind, access, LEN, Some(LIMIT));
    Region::open(store.clone(), options).unwrap()
}

/// Reads a word of each page in some order; how often the store was asked.
fn walk(region: &Region, store: &Bytes, pages: impl Iterator<Item = usize>) -> u64 {
    let before = store.reads.load(Ordering::Relaxed);
    for page in pages {
        let at = page * SMALL + page % 512 * 8;
        let word = touch::read_word(region, at);
        assert_eq!(word.to_ne_bytes(), *patterned_at(at), "page {page}");
    }
    store.reads.load(Ordering::Relaxed) - before
}

fn patterned_at(at: usize) -> Box<[u8]> {
    (at..at + 8).map(pattern).collect()
}

#[test]
fn a_walk_over_small_blocks_asks_the_store_for_many_at_once() {
    apart!(60, {
        let store = Bytes::ready(patterned(LEN));
        for access in [Access::ReadOnly, Access::ReadWrite] {
            // A convoy is 256 KiB at most, and the beginning of a walk is none.
            for (kind, most) in [(COPIED, 0.5), (COPIED_64K, 0.9)] {
                let most = ((LEN / kind.block) as f64 * most) as u64;
                let region = opened(&store, access, kind);
                let forward = walk(&region, &store, 0..LEN / SMALL);
                let backward = walk(&region, &store, (0..LEN / SMALL).rev());
                region.close().unwrap();
                assert!(forward < most, "{kind:?} forward: {forward} reads");
                assert!(backward < most, "{kind:?} backward: {backward} reads");
            }
        }
    });
}

#[test]
fn a_store_that_would_wait_is_asked_for_one_block_after_the_other() {
    apart!(60, {
        let store = Bytes::new(patterned(LEN));
        let region = opened(&store, Access::ReadOnly, COPIED);
        let reads = walk(&region, &store, 0..LEN / SMALL);
        assert!(reads as usize >= LEN / SMALL, "{reads}");
        region.close().unwrap();
    });
}

#[test]
fn what_was_written_among_neighbours_that_leave_together_is_kept() {
    apart!(60, {
        for ready in [true, false] {
            let store = match ready {
                true => Bytes::ready(patterned(LEN)),
                false => Bytes::new(patterned(LEN)),
            };
            let region = opened(&store, Access::ReadWrite, COPIED);
            let words = LEN / 8;
            let written = |word: usize| word.is_multiple_of(3 * SMALL / 8);
            for turn in 1..=2u64 {
                for word in (0..words).step_by(SMALL / 8) {
                    if written(word) {
                        touch::write_word(&region, word * 8, turn << 32 | word as u64);
                    } else {
                        assert_eq!(touch::read(&region, word * 8), pattern(word * 8));
                    }
                }
                for word in (0..words).step_by(SMALL / 8).rev() {
                    if written(word) {
                        assert_eq!(
                            touch::read_word(&region, word * 8),
                            turn << 32 | word as u64,
                            "word {word}"
                        );
                    }
                }
            }
            region.close().unwrap();
            for word in (0..words).filter(|word| written(*word)) {
                assert_eq!(store.word(word), 2 << 32 | word as u64, "word {word}");
            }
        }
    });
}

#[test]
fn memory_stays_within_its_limit_while_convoys_come_and_go() {
    apart!(60, {
        let store = Bytes::ready(patterned(LEN));
        let region = opened(&store, Access::ReadWrite, COPIED);
        let mut most = 0;
        for page in 0..LEN / SMALL {
            touch::read(&region, page * SMALL);
            if page.is_multiple_of(512) {
                most = most.max(region.stats().used);
            }
        }
        assert!(most <= LIMIT, "{most}");
        assert!(most > LIMIT / 2, "{most}: it is used");
        region.close().unwrap();
    });
}

#[test]
fn a_cold_file_is_fetched_and_then_brought_in_at_one_go() {
    apart!(60, {
        let directory = std::env::temp_dir();
        let path = directory.join(format!("userfault-convoys-{}", std::process::id()));
        std::fs::write(&path, patterned(LEN)).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        // SAFETY: takes a descriptor that lives, and numbers.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let store = FileStore::open(&path, FileOptions::new(FileMode::Read)).unwrap();
        std::fs::remove_file(&path).unwrap();
        let options = options(COPIED, Access::ReadOnly, LEN, Some(LIMIT));
        let region = Region::open(Arc::new(store), options).unwrap();
        for at in (0..LEN).step_by(1021) {
            assert_eq!(touch::read(&region, at), pattern(at));
        }
        region.close().unwrap();
    });
}
