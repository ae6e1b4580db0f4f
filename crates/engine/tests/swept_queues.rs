//! The queues of a pool are swept when they hold many more entries than the limit has blocks.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use userfault_engine::{Access, Region, set_memory_limit, stats};
use userfault_store::{Action, Call, FaultyStore, MemoryStore, Rule};

/// A block without an entry never leaves, and once all of the limit is such blocks nothing comes in any more.
#[test]
fn a_sweep_forgets_no_block_that_is_being_written_back() {
    apart!(60, {
        let kind = COPIED_64K;
        let (regions, blocks, most) = (3, 64, 16);
        let len = blocks * kind.block;
        let slow = Rule::every(Call::Write, Action::Delay(Duration::from_millis(2)));
        let regions: Vec<_> = (0..regions)
            .map(|_| {
                let store =
                    FaultyStore::new(Arc::new(MemoryStore::new(vec![0; len])), vec![slow.clone()]);
                Region::open(Arc::new(store), options(kind, Access::ReadWrite, len, None)).unwrap()
            })
            .collect();
        for round in 1..8u8 {
            set_memory_limit(None).unwrap();
            for region in &regions {
                for block in 0..blocks {
                    touch::write(region, block * kind.block, round);
                }
            }
            set_memory_limit(Some((most * kind.block) as u64)).unwrap();
            for region in &regions {
                for block in 0..blocks {
                    assert_eq!(touch::read(region, block * kind.block), round);
                }
            }
            // Whatever is left can leave.
            for region in &regions {
                for block in (0..blocks).rev() {
                    touch::read(region, block * kind.block);
                }
            }
            assert_eq!(stats().errors, 0);
        }
    });
}
