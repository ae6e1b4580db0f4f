//! A store of zeros.

use std::io;

use crate::Store;

/// Zeros without end of memory: nothing is kept, so nothing can be written.
#[derive(Debug)]
pub struct ZeroStore {
    len: u64,
}

impl ZeroStore {
    /// A store of `len` zero bytes.
    pub fn new(len: u64) -> Self {
        Self { len }
    }
}

impl Store for ZeroStore {
    fn read(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read(offset, buf).map(|()| true)
    }

    fn read_bare(&self, _offset: u64, buf: &mut [u8]) -> bool {
        buf.fill(0);
        true
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
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

    fn name(&self) -> String {
        format!("zeros ({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_zeros_over_whatever_was_in_the_buffer() {
        let mut buf = [7u8; 100];
        ZeroStore::new(50).read(20, &mut buf).unwrap();
        assert_eq!(buf, [0u8; 100]);
    }

    #[test]
    fn refuses_to_be_written() {
        let store = ZeroStore::new(50);
        assert!(!store.writable());
        assert_eq!(
            store.write(0, b"x").unwrap_err().raw_os_error(),
            Some(libc::EROFS)
        );
        assert_eq!(
            store.punch(0, 1).unwrap_err().raw_os_error(),
            Some(libc::EROFS)
        );
    }
}
