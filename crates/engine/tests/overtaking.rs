//! A program that walks faster than its store reads keeps the store busy all the time.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::{Access, Region, RegionOptions};

const BLOCK: usize = 256 << 10;

#[test]
fn the_next_window_is_asked_for_while_the_last_is_on_its_way() {
    apart!(60, {
        static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        let len = 128 * BLOCK;
        let store = Arc::new(Readable {
            len: len as u64,
            preferred: 0,
            read: |_, buf: &mut [u8]| {
                MOST.fetch_max(UNDER_WAY.fetch_add(1, SeqCst) + 1, SeqCst);
                thread::sleep(Duration::from_millis(20));
                buf.fill(1);
                UNDER_WAY.fetch_sub(1, SeqCst);
            },
        });
        let options = RegionOptions {
            block: Some(BLOCK),
            ..options(COPIED, Access::ReadOnly, len, Some(len as u64 * 4))
        };
        let region = Region::open(store, options).unwrap();
        for at in (0..len).step_by(BLOCK) {
            assert_eq!(touch::read(&region, at), 1);
        }
        // A window has two readers; the touch behind its end, which waits for all of it, is a third.
        let most = MOST.load(SeqCst);
        assert!(most >= 4, "{most} reads under way at most");
    });
}
