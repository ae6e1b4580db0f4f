//! A store whose file is in memory itself is copied from and written to straight, and nobody notices but by the time.
//!
//! Unsafe: makes a file in memory by hand.

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::random::Random;
use common::*;
use userfault_engine::readahead::Advice;
use userfault_engine::{Access, Pages, Region, RegionOptions};
use userfault_store::{FileMode, FileOptions, FileStore};

const NAME: &str = "memfd:the-store";

/// A file in memory, which has as many bytes and no page.
fn file(len: usize) -> File {
    // SAFETY: the name ends in NUL; a new descriptor, owned from here on.
    let file = unsafe {
        let fd = libc::memfd_create(c"the-store".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len as u64).unwrap();
    file
}

/// Opens all of `file` but what is before `offset`, with `blocks` blocks in memory at most.
fn open(kind: Kind, access: Access, file: &File, offset: u64, blocks: usize) -> Arc<Region> {
    let mode = match access {
        Access::ReadOnly => FileMode::Read,
        _ => FileMode::ReadWrite,
    };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let store = FileStore::open(path, FileOptions::new(mode)).unwrap();
    let len = file.metadata().unwrap().len() - offset;
    let limit = Some((blocks * kind.block) as u64 + 16 * SMALL as u64);
    let options = RegionOptions {
        offset,
        retry_for: Duration::from_secs(2),
        ..options(kind, access, len as usize, limit)
    };
    let region = Region::open(Arc::new(store), options).unwrap();
    region.advise(0, len, Advice::Random).unwrap();
    region
}

/// What comes in straight, and leaves so.
fn huge_kinds() -> impl Iterator<Item = Kind> {
    let kinds = writable_kinds().into_iter();
    kinds.filter(|kind| kind.pages == Pages::Huge)
}

/// What leaves straight.
fn kinds() -> impl Iterator<Item = Kind> {
    let kinds = writable_kinds().into_iter();
    kinds.filter(|kind| *kind != COPIED)
}

/// Bytes of the store that this process has mapped, and those of them that are present.
fn mapped() -> (usize, usize) {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut sizes) = (false, (0, 0));
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap();
        if !first.ends_with(':') {
            inside = line.contains(NAME);
        }
        let kib = || {
            line.split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<usize>()
                .unwrap()
                << 10
        };
        match first {
            "Size:" if inside => sizes.0 += kib(),
            "Rss:" if inside => sizes.1 += kib(),
            _ => {}
        }
    }
    sizes
}

/// Where the kernel keeps the evidence of writes: elsewhere each write-back protects first, by calls of the engine's own.
fn is_mapped(access: Access) -> bool {
    access == Access::ReadOnly || inline_can_write()
}

#[test]
fn whatever_is_read_and_written_is_what_a_plain_file_would_hold() {
    apart!(120, hugetlb, {
        const BLOCKS: usize = 24;
        for (kind, offset) in kinds().flat_map(|kind| [(kind, 0), (kind, 128)]) {
            // The last block is not whole, and neither is its last page.
            let len = BLOCKS * HUGE - 3 * SMALL - 100;
            let file = file(offset + len);
            let mut bytes = patterned(len);
            file.write_all_at(&bytes, offset as u64).unwrap();
            let region = open(kind, Access::ReadWrite, &file, offset as u64, 6);
            let mut random = Random::new(7);
            for round in 0..3000 {
                let at = random.below(len);
                assert_eq!(touch::read(&region, at), bytes[at], "{kind:?} {at}");
                match random.below(4) {
                    0 => {
                        bytes[at] = round as u8;
                        touch::write(&region, at, bytes[at]);
                    }
                    1 if round % 16 == 0 => {
                        let more = random.below(3 * HUGE).min(len - at);
                        bytes[at..at + more].fill(round as u8);
                        region.pwrite(&bytes[at..at + more], at as u64).unwrap();
                    }
                    2 if round % 64 == 0 => region.flush(0, len as u64).unwrap(),
                    _ => {}
                }
            }
            let (size, present) = mapped();
            assert_eq!(size > len && present > 0, is_mapped(Access::ReadWrite));
            region.flush(0, len as u64).unwrap();
            let mut stored = vec![0; len];
            file.read_exact_at(&mut stored, offset as u64).unwrap();
            assert!(stored == bytes, "{kind:?}");
            region.close().unwrap();
            assert_eq!(mapped(), (0, 0), "nothing stays mapped");
        }
    });
}

#[test]
fn threads_that_write_while_blocks_leave_and_are_flushed_lose_nothing() {
    apart!(120, hugetlb, {
        const THREADS: usize = 4;
        for kind in kinds() {
            let (blocks, len) = (16, 16 * HUGE);
            let file = file(len);
            let region = open(kind, Access::ReadWrite, &file, 0, 6);
            // Each thread adds to words of its own, a few in each block.
            let word = |block: usize, thread: usize| (block * HUGE / 8) + 70_000 + thread;
            thread::scope(|scope| {
                for thread in 0..THREADS {
                    let region = &region;
                    scope.spawn(move || {
                        let mut random = Random::new(thread as u64 + 1);
                        for _ in 0..60 {
                            let first = random.below(blocks);
                            for block in 0..blocks {
                                let block = (first + block) % blocks;
                                touch::add_word(region, word(block, thread), 1);
                            }
                            if thread == 0 {
                                region.flush(0, len as u64).unwrap();
                            }
                        }
                    });
                }
            });
            region.flush(0, len as u64).unwrap();
            for block in 0..blocks {
                for thread in 0..THREADS {
                    let mut bytes = [0; 8];
                    let at = word(block, thread) * 8;
                    file.read_exact_at(&mut bytes, at as u64).unwrap();
                    assert_eq!(u64::from_ne_bytes(bytes), 60, "{kind:?} {block} {thread}");
                }
            }
        }
    });
}

#[test]
fn reading_a_hole_leaves_it_one() {
    apart!(60, hugetlb, {
        for kind in kinds() {
            let len = 8 * HUGE;
            let file = file(len);
            file.write_all_at(&[7; SMALL], (3 * HUGE + 5 * SMALL) as u64)
                .unwrap();
            let region = open(kind, Access::ReadOnly, &file, 0, 16);
            for at in (0..len).step_by(SMALL) {
                let there = at == 3 * HUGE + 5 * SMALL;
                assert_eq!(touch::read(&region, at), if there { 7 } else { 0 });
            }
            assert_eq!(file.metadata().unwrap().blocks() * 512, SMALL as u64);
        }
    });
}

#[test]
fn a_file_that_was_cut_short_is_an_error_and_never_zeros() {
    apart!(60, hugetlb, {
        for kind in kinds() {
            let len = 8 * HUGE;
            let file = file(len);
            file.write_all_at(&patterned(len), 0).unwrap();
            let region = open(kind, Access::ReadWrite, &file, 0, 16);
            for block in [0, 1, 5] {
                touch::write(&region, block * HUGE + 9, 1);
            }
            // In the last page of a block, all of whose pages are still there.
            file.set_len((3 * HUGE - 100) as u64).unwrap();
            for block in [2, 3, 7] {
                let read = region
                    .pin(((block + 1) * HUGE - 1) as u64, 1, false)
                    .map(drop);
                let error = read.unwrap_err().to_string();
                assert!(error.contains("was truncated"), "{error}");
            }
            let error = region.flush(0, len as u64).unwrap_err().to_string();
            assert!(error.contains("was truncated"), "{error}");
            assert_eq!(touch::read(&region, 5 * HUGE + 9), 1, "it stays in memory");
            file.set_len(len as u64).unwrap();
            region.flush(0, len as u64).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, (5 * HUGE + 9) as u64)
                .unwrap();
            assert_eq!(byte, [1]);
        }
    });
}

#[test]
fn what_leaves_memory_into_a_hole_is_stored_and_changes_the_time_of_the_file() {
    apart!(60, hugetlb, {
        for kind in kinds() {
            let len = 16 * HUGE;
            let file = file(len);
            let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1000);
            file.set_modified(long_ago).unwrap();
            let region = open(kind, Access::ReadWrite, &file, 0, 4);
            for block in 0..16 {
                assert_eq!(touch::read(&region, block * HUGE), 0);
            }
            region.flush(0, len as u64).unwrap();
            let time = || file.metadata().unwrap().modified().unwrap();
            assert_eq!(time(), long_ago, "it was only read");
            for block in 0..16 {
                touch::write(&region, block * HUGE + block, 1 + block as u8);
            }
            for block in 0..16 {
                let at = block * HUGE + block;
                assert_eq!(touch::read(&region, at), 1 + block as u8);
            }
            assert!(time() > long_ago, "blocks have left");
            file.set_modified(long_ago).unwrap();
            touch::write(&region, 0, 1);
            region.flush(0, len as u64).unwrap();
            assert!(time() > long_ago);
            let mut page = [0; 16];
            file.read_exact_at(&mut page, (9 * HUGE) as u64).unwrap();
            assert_eq!(page[9], 10);
        }
    });
}

#[test]
fn no_more_of_the_store_is_mapped_than_page_tables_may_take() {
    apart!(60, hugetlb, {
        for kind in huge_kinds() {
            // With fewer blocks what is charged for the tables would raise the limit.
            let (blocks, memory) = (80, 8);
            let file = file(blocks * HUGE);
            file.write_all_at(&patterned(blocks * HUGE), 0).unwrap();
            let region = open(kind, Access::ReadOnly, &file, 0, memory);
            for _ in 0..2 {
                for block in 0..blocks {
                    let at = block * HUGE + block;
                    assert_eq!(touch::read(&region, at), pattern(at));
                }
            }
            // One page table maps 2 MiB, and takes a page.
            let most = (memory * HUGE + 16 * SMALL) / 64 / SMALL;
            assert!(most < blocks, "or nothing is shown");
            let present = mapped().1;
            assert!(present <= most * HUGE, "{present}");
            // Where hugetlb pages cannot be poisoned they are read in another way.
            let without = std::env::var("USERFAULT_WITHOUT").unwrap_or_default();
            let poison = kernel() >= (6, 6) && !without.contains("poison");
            let straight = kind != HUGETLB || poison;
            assert_eq!(present > 0, straight);
            assert!(region.stats().bytes_read >= (2 * (blocks - memory) * HUGE) as u64);
        }
    });
}
