//! Regions against a plain array, on every kind of memory.
//!
//! Unsafe: touches the memory of regions through raw pointers, as programs do.

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use userfault_engine::{Access, FaultWay, OnError, Pages, Region, RegionOptions};
use userfault_store::Store;

/// Bytes in memory, behind a lock for each 64 KiB.
struct Plain {
    chunks: Vec<std::sync::Mutex<Vec<u8>>>,
    len: u64,
    reads: AtomicU64,
    writes: AtomicU64,
}

const HUGE: usize = 2 << 20;
const CHUNK: usize = 64 << 10;

impl Plain {
    fn new(len: usize, fill: impl Fn(usize) -> u8) -> Arc<Plain> {
        let chunks = (0..len.div_ceil(CHUNK))
            .map(|chunk| {
                std::sync::Mutex::new((chunk * CHUNK..(chunk + 1) * CHUNK).map(&fill).collect())
            })
            .collect();
        Arc::new(Plain {
            chunks,
            len: len as u64,
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        })
    }

    fn byte(&self, at: usize) -> u8 {
        self.chunks[at / CHUNK].lock().unwrap()[at % CHUNK]
    }
}

impl Store for Plain {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut at = offset as usize;
        let mut rest = buf;
        while !rest.is_empty() {
            let step = rest.len().min(CHUNK - at % CHUNK);
            rest[..step].copy_from_slice(
                &self.chunks[at / CHUNK].lock().unwrap()[at % CHUNK..at % CHUNK + step],
            );
            rest = &mut rest[step..];
            at += step;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        assert!(offset + data.len() as u64 <= self.len);
        let mut at = offset as usize;
        let mut rest = data;
        while !rest.is_empty() {
            let step = rest.len().min(CHUNK - at % CHUNK);
            self.chunks[at / CHUNK].lock().unwrap()[at % CHUNK..at % CHUNK + step]
                .copy_from_slice(&rest[..step]);
            rest = &rest[step..];
            at += step;
        }
        Ok(())
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "plain".into()
    }
}

fn options(access: Access, len: usize, block: usize, pages: Pages, limit: u64) -> RegionOptions {
    RegionOptions {
        name: "test".into(),
        access,
        offset: 0,
        len: len as u64,
        block: Some(block),
        pages,
        fault: FaultWay::Threads,
        memory_limit: Some(limit),
        on_error: OnError::Auto,
        retry_for: Duration::from_secs(30),
    }
}

fn pattern(at: usize) -> u8 {
    (at as u64)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .to_be_bytes()[0]
}

#[test]
fn a_read_only_sweep_sees_every_byte() {
    for (block, pages) in [
        (4096, Pages::Small),
        (65536, Pages::Small),
        (2 << 20, Pages::Small),
        (2 << 20, Pages::Huge),
    ] {
        let len = (20 << 20) + 12345;
        let store = Plain::new(len, pattern);
        let region = Region::open(
            store.clone(),
            options(Access::ReadOnly, len, block, pages, 8 << 20),
        )
        .unwrap();
        for round in 0..2 {
            for at in (0..len).step_by(977) {
                // SAFETY: inside of the region.
                let byte = unsafe { region.base().add(at).read_volatile() };
                assert_eq!(
                    byte,
                    pattern(at),
                    "round {round}, byte {at}, {}",
                    region.pages()
                );
            }
        }
        let stats = region.stats();
        println!("{} {block}: {stats:?}", region.pages());
        assert!(stats.used <= 8 << 20);
        region.close().unwrap();
    }
}

#[test]
fn writers_under_a_small_limit_lose_nothing() {
    for (block, pages) in [
        (4096, Pages::Small),
        (65536, Pages::Small),
        (2 << 20, Pages::Small),
        (2 << 20, Pages::Huge),
    ] {
        let len = 24 << 20;
        let store = Plain::new(len, |_| 0);
        let limit = (4 * block as u64).max(1 << 20);
        let region = Region::open(
            store.clone(),
            options(Access::ReadWrite, len, block, pages, limit),
        )
        .unwrap();
        let rounds = if block < HUGE { 20_000 } else { 2_000 };
        let words = len / 8;
        let base = region.base() as usize;
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                scope.spawn(move || {
                    let mut seed = 88172645463325252u64 + thread as u64;
                    for _ in 0..rounds {
                        seed ^= seed << 13;
                        seed ^= seed >> 7;
                        seed ^= seed << 17;
                        let word = (seed as usize % (words / 4)) * 4 + thread;
                        let place = (base + word * 8) as *mut u64;
                        // SAFETY: each thread has words of its own inside of the region.
                        unsafe { place.write_volatile(place.read_volatile() + word as u64 + 1) };
                    }
                });
            }
        });
        println!("{} {block}: {:?}", region.pages(), region.stats());
        // Replay.
        let mut expected = vec![0u64; words];
        for thread in 0..4usize {
            let mut seed = 88172645463325252u64 + thread as u64;
            for _ in 0..rounds {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let word = (seed as usize % (words / 4)) * 4 + thread;
                expected[word] += word as u64 + 1;
            }
        }
        region.close().unwrap();
        for (word, expected) in expected.iter().enumerate() {
            let mut bytes = [0; 8];
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = store.byte(word * 8 + index);
            }
            assert_eq!(
                u64::from_ne_bytes(bytes),
                *expected,
                "word {word}, {pages:?} {block}"
            );
        }
    }
}

/// A figure of /proc/self/status.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn page_tables() -> u64 {
    status("VmPTE:") << 10
}

/// Page tables of one more thread: its stack, and an arena of malloc of its own.
const THREAD_TABLES: u64 = 4 * 4096;

#[test]
fn a_sweep_leaves_no_page_tables_behind_or_counts_them() {
    let len = 512 << 20;
    let store = Plain::new(CHUNK, |_| 0);
    for (access, pages, block) in [
        (Access::ReadOnly, Pages::Small, 65536),
        (Access::ReadWrite, Pages::Small, 65536),
        (Access::ReadWrite, Pages::Huge, HUGE),
    ] {
        let region = Region::open(
            Arc::new(Sparse(store.clone(), len)),
            options(access, len, block, pages, 16 << 20),
        )
        .unwrap();
        let (before, threads) = (page_tables(), status("Threads:"));
        for at in (0..len).step_by(4096) {
            // SAFETY: inside of the region.
            unsafe { region.base().add(at).read_volatile() };
        }
        let (grown, counted) = (
            page_tables().saturating_sub(before),
            region.stats().page_tables,
        );
        println!("{}: {grown} bytes grown, {counted} counted", region.pages());
        // Without releasing them it would be 1 or 2 MiB: 4 KiB for each 2 MiB and mapping.
        // A busy machine makes the engine start more threads, which have tables of their own.
        let spare = (256 << 10) + status("Threads:").saturating_sub(threads) * THREAD_TABLES;
        if common::frees_page_tables(access) || region.pages() == "2MiB hugetlb" {
            assert!(grown <= spare, "{grown} bytes of page tables stay");
            assert!(counted <= 256 << 10);
        } else {
            assert!(counted >= 1 << 20, "only {counted} bytes are counted");
            assert!(
                grown <= counted + spare,
                "{grown} bytes of page tables stay"
            );
        }
    }
}

/// Zeros of any length.
struct Sparse(Arc<Plain>, usize);

impl Store for Sparse {
    fn read(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> u64 {
        self.1 as u64
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "sparse".into()
    }
}
