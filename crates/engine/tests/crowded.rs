//! Many threads that together need more memory than there is run on a few at a time.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::readahead::Advice;
use userfault_engine::{Access, Region, RegionOptions, set_memory_limit};

const BLOCK: usize = 64 << 10;
const THREADS: usize = 48;
/// Blocks of each thread.
const OWN: usize = 6;
const ROUNDS: usize = 12;
/// Blocks of memory: enough for a third of the threads.
const MEMORY: usize = THREADS * OWN / 3;

/// What is read when each thread goes through its own blocks again and again, in blocks. The region's own limit is
/// `limit` blocks.
fn blocks_read(kind: Kind, slow: Duration, limit: usize) -> usize {
    static READ: AtomicUsize = AtomicUsize::new(0);
    let len = THREADS * OWN * BLOCK;
    let store = Arc::new(Readable {
        len: len as u64,
        preferred: 0,
        read: move |offset: u64, buf: &mut [u8]| {
            READ.fetch_add(buf.len(), SeqCst);
            thread::sleep(slow);
            buf.fill((offset / BLOCK as u64) as u8);
        },
    });
    let options = RegionOptions {
        block: Some(BLOCK),
        ..options(kind, Access::ReadOnly, len, Some((limit * BLOCK) as u64))
    };
    let region = Region::open(store, options).unwrap();
    region.advise(0, len as u64, Advice::Random).unwrap();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let region = &region;
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    for block in thread * OWN..(thread + 1) * OWN {
                        assert_eq!(touch::read(region, block * BLOCK), block as u8);
                    }
                }
            });
        }
    });
    READ.load(SeqCst) / BLOCK
}

#[test]
fn threads_that_share_too_little_memory_run_on_a_few_at_a_time() {
    apart!(120, {
        let read = blocks_read(COPIED_64K, Duration::from_millis(1), MEMORY);
        let fair = THREADS * OWN * ROUNDS;
        // Nobody reads less than every block once; each in turn would read all of them in every round.
        assert!(read < fair / 2, "{read} blocks of {fair}");
    });
}

/// The region may use more than the process has: by default that is half of what a control group leaves.
#[test]
fn so_do_they_when_it_is_the_process_that_has_too_little() {
    apart!(120, {
        set_memory_limit(Some((MEMORY * BLOCK) as u64)).unwrap();
        let read = blocks_read(COPIED_64K, Duration::from_millis(1), 2 * THREADS * OWN);
        let fair = THREADS * OWN * ROUNDS;
        assert!(read < fair / 2, "{read} blocks of {fair}");
    });
}
