//! What the engine's tests share: children that cannot hang the run, the kinds of memory, and touches.
#![allow(dead_code, reason = "every test binary uses its own part")]

pub mod apart;
pub mod huge_pages;
pub mod random;
pub mod touch;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use userfault_engine::lock::RwLock;
use userfault_engine::{Access, FaultWay, OnError, Pages, Region, RegionOptions};
use userfault_store::Store;

pub const SMALL: usize = 4096;
pub const HUGE: usize = 2 << 20;

/// A store that can only be read, by a function of the offset and what is to be filled.
pub struct Readable<F> {
    pub len: u64,
    pub preferred: usize,
    pub read: F,
}

impl<F: Fn(u64, &mut [u8]) + Send + Sync> Store for Readable<F> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (self.read)(offset, buf);
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
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

    fn preferred_block(&self) -> usize {
        self.preferred
    }

    fn name(&self) -> String {
        "what can only be read".into()
    }
}

/// A way for a block to be in memory, by block size, pages and access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub block: usize,
    pub pages: Pages,
    /// What `Region::pages` must say.
    pub name: &'static str,
    /// Who answers its faults.
    pub fault: FaultWay,
}

/// 4 KiB pages, filled by UFFDIO_COPY.
pub const COPIED: Kind = Kind {
    block: SMALL,
    pages: Pages::Small,
    name: "4KiB",
    fault: FaultWay::Threads,
};
/// The same, 16 pages a block.
pub const COPIED_64K: Kind = Kind {
    block: 64 << 10,
    ..COPIED
};
/// 4 KiB pages, filled through the view.
pub const VIEWED: Kind = Kind {
    block: HUGE,
    ..COPIED
};
/// As [`COPIED_64K`], answered by the touching thread.
pub const COPIED_INLINE: Kind = Kind {
    fault: FaultWay::Inline,
    ..COPIED_64K
};
/// As [`VIEWED`], answered by the touching thread.
pub const VIEWED_INLINE: Kind = Kind {
    fault: FaultWay::Inline,
    ..VIEWED
};
/// Huge pages of whatever sort the machine has: usually those of a private tmpfs.
pub const HUGE_PAGES: Kind = Kind {
    block: HUGE,
    pages: Pages::Huge,
    name: "2MiB",
    fault: FaultWay::Threads,
};
/// hugetlb pages: only inside of `apart!(..., hugetlb, ...)`.
pub const HUGETLB: Kind = Kind {
    name: "2MiB hugetlb",
    ..HUGE_PAGES
};

/// Every kind that can be written; hugetlb pages alone in a child that has some of its own.
pub fn writable_kinds() -> Vec<Kind> {
    if apart::has_huge_pages() {
        return vec![HUGETLB];
    }
    let mut kinds = vec![COPIED, COPIED_64K, VIEWED, HUGE_PAGES];
    if inline_can_write() {
        kinds.extend([COPIED_INLINE, VIEWED_INLINE]);
    }
    kinds
}

/// True if memory that can be written may be brought by the touching thread itself: with the kernel's evidence of
/// writes (Linux 6.7).
pub fn inline_can_write() -> bool {
    let without = without();
    kernel() >= (6, 7) && !without.contains("wp_async") && !without.contains("continue_wp")
}

/// What the engine is told to do without.
fn without() -> String {
    std::env::var("USERFAULT_WITHOUT").unwrap_or_default()
}

/// The kernel's version.
pub fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// True if what is unmapped whole gives its page tables back: Linux 6.14, unless the protection of pages that
/// can be written is the table's own (see `protect.rs`).
pub fn frees_page_tables(access: Access) -> bool {
    kernel() >= (6, 14) && (access == Access::ReadOnly || !without().contains("wp_async"))
}

/// Options of a region over the whole of a store of `len` bytes.
pub fn options(kind: Kind, access: Access, len: usize, limit: Option<u64>) -> RegionOptions {
    RegionOptions {
        name: "test".into(),
        access,
        offset: 0,
        len: len as u64,
        block: Some(kind.block),
        pages: kind.pages,
        fault: kind.fault,
        memory_limit: limit,
        on_error: OnError::Auto,
        retry_for: Duration::from_secs(20),
    }
}

/// Opens `len` bytes of a store for writing, `blocks` blocks of it in memory at most.
pub fn open(
    kind: Kind,
    store: &Arc<impl Store + 'static>,
    len: usize,
    blocks: usize,
) -> Arc<Region> {
    let limit = Some((blocks * kind.block) as u64 + 16 * SMALL as u64);
    let region = Region::open(store.clone(), options(kind, Access::ReadWrite, len, limit)).unwrap();
    assert!(region.pages().starts_with(kind.name), "{}", region.pages());
    region
}

/// Bytes in memory behind one lock, with counts of calls; reads can be answered at once.
pub struct Bytes {
    bytes: RwLock<Vec<u8>>,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub written: AtomicU64,
    /// While this is true, writes fail with ENOSPC.
    pub full: AtomicBool,
    /// True: `read_now` answers, so a fault is answered by the thread that read its message.
    ready: bool,
}

impl Bytes {
    pub fn new(bytes: Vec<u8>) -> Arc<Bytes> {
        Arc::new(Bytes {
            bytes: RwLock::new(bytes),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            written: AtomicU64::new(0),
            full: AtomicBool::new(false),
            ready: false,
        })
    }

    /// A store whose reads never wait.
    pub fn ready(bytes: Vec<u8>) -> Arc<Bytes> {
        let mut store = Arc::into_inner(Bytes::new(bytes)).unwrap();
        store.ready = true;
        Arc::new(store)
    }

    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    pub fn word(&self, index: usize) -> u64 {
        let bytes = self.bytes.read();
        u64::from_ne_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap())
    }
}

impl Store for Bytes {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let offset = offset as usize;
        buf.copy_from_slice(&self.bytes.read()[offset..offset + buf.len()]);
        Ok(())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.ready {
            self.read(offset, buf)?;
        }
        Ok(self.ready)
    }

    fn read_bare(&self, offset: u64, buf: &mut [u8]) -> bool {
        // A compare-and-swap; where the lock is held, ordinary code waits for it.
        let Some(bytes) = self.bytes.try_read() else {
            return false;
        };
        self.reads.fetch_add(1, Ordering::Relaxed);
        let offset = offset as usize;
        buf.copy_from_slice(&bytes[offset..offset + buf.len()]);
        true
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        if self.full.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        let offset = offset as usize;
        self.bytes.write()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes.write()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.bytes.read().len() as u64
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "bytes".into()
    }
}

/// A byte that belongs to its place: wrong places and zeros are seen.
pub fn pattern(at: usize) -> u8 {
    ((at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 | 1
}

pub fn patterned(len: usize) -> Vec<u8> {
    (0..len).map(pattern).collect()
}
