//! What the tests of points share: folders, memory of some kind, reading a point.
//!
//! Unsafe: writes to tracked memory through raw pointers, as programs do.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use userfault_engine::tracked::Tracked;
use userfault_snapshot::{Array, ArrayReader, Checkpointer, Error, OpenPoint};

pub const MIB: usize = 1 << 20;

/// A folder that is removed at the end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "userfault-points-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Memory of some kind, written as a program would.
pub enum Memory {
    Own(Arc<Tracked>, usize),
    Foreign(Vec<u8>),
}

impl Memory {
    pub fn start(&self) -> usize {
        match self {
            Memory::Own(memory, _) => memory.start(),
            Memory::Foreign(bytes) => bytes.as_ptr() as usize,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Memory::Own(_, len) => *len,
            Memory::Foreign(bytes) => bytes.len(),
        }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the memory is the test's own, and no other thread of it has a reference.
        unsafe { std::slice::from_raw_parts_mut(self.start() as *mut u8, self.len()) }
    }

    pub fn array(&self, name: &str) -> Array {
        Array {
            name: name.into(),
            description: "{}".into(),
            start: self.start(),
            nbytes: self.len(),
            always_copy: false,
        }
    }
}

pub fn random(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as usize
}

pub fn read(path: &Path, step: u64, array: usize) -> Vec<u8> {
    let point = OpenPoint::open(path, Some(step)).unwrap();
    let data = point.arrays()[array].data;
    let reader: ArrayReader = point.reader(data).unwrap();
    let mut bytes = vec![1; reader.record().nbytes as usize];
    reader.read_array(0, &mut bytes, 2).unwrap();
    bytes
}

pub fn settle(checkpointer: &Checkpointer) -> Result<(), Error> {
    checkpointer
        .wait(Duration::from_secs(60))
        .expect("done within a minute")
}
