//! A store in this process's own memory, for tests and examples.

use std::io;
use std::sync::{PoisonError, RwLock};

use crate::Store;

/// Bytes in a vector of a fixed length. Nothing of it outlives the process.
#[derive(Debug)]
pub struct MemoryStore {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStore {
    /// A store that holds `bytes`; its length never changes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: RwLock::new(bytes),
        }
    }

    /// A copy of all bytes as they are now.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The part of `offset .. offset + len` that lies within `end`, as indices.
fn within(offset: u64, len: usize, end: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).map_or(end, |o| o.min(end));
    start..start.saturating_add(len).min(end)
}

impl Store for MemoryStore {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let range = within(offset, buf.len(), bytes.len());
        let (head, tail) = buf.split_at_mut(range.len());
        head.copy_from_slice(&bytes[range]);
        tail.fill(0);
        Ok(())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read(offset, buf).map(|()| true)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let range = within(offset, data.len(), bytes.len());
        if range.len() != data.len() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        bytes[range].copy_from_slice(data);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let range = within(
            offset,
            usize::try_from(len).unwrap_or(usize::MAX),
            bytes.len(),
        );
        bytes[range].fill(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.bytes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len() as u64
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        format!("memory ({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_back_what_was_written_and_zeros_past_its_end() {
        let store = MemoryStore::new(b"abcdef".to_vec());
        store.write(2, b"XY").unwrap();
        let mut buf = [9u8; 8];
        store.read(1, &mut buf).unwrap();
        assert_eq!(&buf, b"bXYef\0\0\0");
        store.read(u64::MAX, &mut buf).unwrap();
        assert_eq!(buf, [0; 8]);
    }

    #[test]
    fn never_grows() {
        let store = MemoryStore::new(vec![1; 6]);
        assert_eq!(
            store.write(4, b"abc").unwrap_err().raw_os_error(),
            Some(libc::ENOSPC)
        );
        assert_eq!(store.to_vec(), vec![1; 6]);
    }

    #[test]
    fn a_punched_range_reads_as_zeros() {
        let store = MemoryStore::new(vec![1; 6]);
        store.punch(4, 100).unwrap();
        store.punch(0, 1).unwrap();
        assert_eq!(store.to_vec(), [0, 1, 1, 1, 0, 0]);
    }
}
