//! What had left memory when a store could not make it durable is written again.

mod common;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use userfault_engine::lock::Mutex;
use userfault_store::Store;

/// A page cache over a disk, as the kernel has it: a sync writes what is dirty, and when the disk refuses, it
/// forgets that it was dirty. The cache still has it.
struct Forgetful {
    cached: Mutex<Vec<u8>>,
    disk: Mutex<Vec<u8>>,
    dirty: Mutex<BTreeSet<usize>>,
    syncs_to_fail: AtomicUsize,
}

impl Forgetful {
    fn new(bytes: Vec<u8>, syncs_to_fail: usize) -> Arc<Forgetful> {
        Arc::new(Forgetful {
            cached: Mutex::new(bytes.clone()),
            disk: Mutex::new(bytes),
            dirty: Mutex::default(),
            syncs_to_fail: AtomicUsize::new(syncs_to_fail),
        })
    }
}

impl Store for Forgetful {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        buf.copy_from_slice(&self.cached.lock()[offset..offset + buf.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = offset as usize;
        self.cached.lock()[offset..offset + data.len()].copy_from_slice(data);
        let pages = offset / SMALL..(offset + data.len()).div_ceil(SMALL);
        self.dirty.lock().extend(pages);
        Ok(())
    }
    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        let dirty = std::mem::take(&mut *self.dirty.lock());
        let less = |left: usize| left.checked_sub(1);
        let fails = self
            .syncs_to_fail
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        if fails.is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let (cached, mut disk) = (self.cached.lock(), self.disk.lock());
        for page in dirty {
            let bytes = page * SMALL..(page + 1) * SMALL;
            disk[bytes.clone()].copy_from_slice(&cached[bytes]);
        }
        Ok(())
    }
    fn len(&self) -> u64 {
        self.cached.lock().len() as u64
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "forgetful".into()
    }
}

#[test]
fn what_had_left_memory_before_a_sync_failed_is_written_again() {
    apart!(60, hugetlb, {
        for kind in writable_kinds() {
            let blocks = if kind.block == SMALL { 48 } else { 16 };
            let len = blocks * kind.block;
            let store = Forgetful::new(patterned(len), 2);
            let region = open(kind, &store, len, 5);
            for block in 0..blocks {
                touch::write(&region, block * kind.block + 7, 0);
            }
            // Some blocks have left, some rest, some are mapped.
            let error = region.flush(0, len as u64).unwrap_err();
            let told = error.to_string();
            assert!(told.contains("have left memory: the next flush"), "{told}");
            // One is touched again, one is overwritten, one is read in; then the second failure.
            touch::write(&region, 9, 0);
            region
                .pwrite(&vec![3; kind.block], kind.block as u64)
                .unwrap();
            assert_eq!(touch::read(&region, 2 * kind.block + 7), 0);
            region.flush(0, len as u64).unwrap_err();
            region.flush(0, len as u64).unwrap();
            let disk = store.disk.lock().clone();
            for block in (0..blocks).filter(|block| *block != 1) {
                assert_eq!(disk[block * kind.block + 7], 0, "{kind:?}: block {block}");
            }
            assert_eq!(disk[9], 0);
            assert!(disk[kind.block..2 * kind.block] == vec![3; kind.block]);
            // That was all: nothing is written any more.
            region.flush(0, len as u64).unwrap();
            region.close().unwrap();
            assert!(store.dirty.lock().is_empty(), "{kind:?}");
        }
    });
}
