//! What a file store promises about bytes.
//!
//! Unsafe: cachestat(2), to see what stands in the page cache, and aligned memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{self, File};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use userfault_store::{FileMode, FileOptions, FileStore, OpenError, Store};

const MIB: usize = 1 << 20;

/// Bytes that begin on a page, as a region's do.
struct Aligned {
    at: *mut u8,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        // SAFETY: the layout has a size above zero.
        let at = unsafe { alloc_zeroed(Self::layout(len)) };
        assert!(!at.is_null());
        Self { at, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), 4096).unwrap()
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `at` names `len` initialised bytes that only this value owns.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout, and not used afterwards.
        unsafe { dealloc(self.at, Self::layout(self.len)) }
    }
}

/// A file that is removed with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn on_disk(name: &str) -> Self {
        Self(
            Path::new(env!("CARGO_TARGET_TMPDIR"))
                .join(format!("store-{}-{name}", std::process::id())),
        )
    }

    fn in_memory(name: &str) -> Self {
        Self(Path::new("/dev/shm").join(format!("userfault-store-{}-{name}", std::process::id())))
    }

    fn holding(self, bytes: &[u8]) -> Self {
        fs::write(&self.0, bytes).unwrap();
        // What a test says about the page cache begins with clean pages.
        File::open(&self.0).unwrap().sync_all().unwrap();
        self
    }

    fn open(&self, mode: FileMode) -> FileStore {
        FileStore::open(&self.0, FileOptions::new(mode)).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.next() as u8).collect()
}

/// xorshift64*: the same numbers on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
}

/// Pages of the file in the page cache; `None` before Linux 6.5.
fn cached_pages(path: &Path) -> Option<u64> {
    let file = File::open(path).unwrap();
    let (range, mut stat) = ([0u64, 0], [0u64; 5]);
    // SAFETY: the arrays have the layout of struct cachestat_range and struct cachestat.
    let rc = unsafe { libc::syscall(451, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
    (rc == 0).then_some(stat[0])
}

fn forget(path: &Path) {
    let file = File::open(path).unwrap();
    // SAFETY: takes a descriptor and numbers.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// Reads, buffered and direct writes, punches and syncs at random against a vector.
fn agrees_with_a_vector(scratch: Scratch, seed: u64) {
    let len = 4 * MIB + 1234;
    let mut model = noise(len, seed);
    let scratch = scratch.holding(&model);
    let store = scratch.open(FileMode::ReadWrite);
    let other = File::open(&scratch.0).unwrap();
    let mut random = Random(seed);
    let mut buf = Aligned::new(MIB + 4096);
    for step in 0..1500 {
        // Half of the calls are aligned and long enough for direct I/O.
        let (at, n, skew) = if random.below(2) == 0 {
            (
                4096 * random.below(len / 4096),
                4096 * (1 + random.below(256)),
                0,
            )
        } else {
            (
                random.below(len),
                1 + random.below(20_000),
                random.below(4096),
            )
        };
        let n = n.min(len - at);
        match random.below(6) {
            0 | 1 => {
                let data = noise(n, step + 1);
                buf[skew..skew + n].copy_from_slice(&data);
                store.write(at as u64, &buf[skew..skew + n]).unwrap();
                model[at..at + n].copy_from_slice(&data);
            }
            2 => {
                store.punch(at as u64, n as u64).unwrap();
                model[at..at + n].fill(0);
            }
            3 if step % 10 == 0 => store.sync().unwrap(),
            4 => {
                // Another program reads through the page cache, and fills it.
                let mut seen = vec![0; n];
                other.read_exact_at(&mut seen, at as u64).unwrap();
                assert!(
                    seen == model[at..at + n],
                    "another reader differs at {at}+{n}, step {step}"
                );
            }
            _ => {
                let past = random.below(5000);
                let want = (n + past).min(MIB);
                let buf = &mut buf[skew..skew + want];
                buf.fill(0xAA);
                if !store.read_now(at as u64, buf).unwrap() {
                    store.read(at as u64, buf).unwrap();
                }
                let there = want.min(len - at);
                assert!(
                    buf[..there] == model[at..at + there],
                    "read differs at {at}+{want}, step {step}"
                );
                assert!(
                    buf[there..].iter().all(|&b| b == 0),
                    "not zero past the end, step {step}"
                );
            }
        }
    }
    store.sync().unwrap();
    drop(store);
    assert!(
        fs::read(&scratch.0).unwrap() == model,
        "the file differs at the end (seed {seed})"
    );
}

#[test]
fn direct_and_buffered_calls_agree_with_a_vector_on_disk() {
    for seed in 1..4 {
        agrees_with_a_vector(Scratch::on_disk(&format!("vector{seed}")), seed);
    }
}

#[test]
fn calls_agree_with_a_vector_on_tmpfs() {
    agrees_with_a_vector(Scratch::in_memory("vector"), 9);
}

#[test]
fn neighbours_written_direct_and_buffered_at_once_keep_their_bytes() {
    let len = 8 * MIB;
    let scratch = Scratch::on_disk("neighbours").holding(&vec![0; len]);
    let store = scratch.open(FileMode::ReadWrite);
    std::thread::scope(|scope| {
        for who in 0..2u8 {
            let store = &store;
            scope.spawn(move || {
                let mut random = Random(77 + u64::from(who));
                let mut buf = Aligned::new(512 * 1024);
                // One owner a block of 512 KiB, as in the engine: even blocks for one thread, odd for the other.
                for round in 1..200u64 {
                    let block = 2 * random.below(8) + usize::from(who);
                    let at = (block * 512 * 1024) as u64;
                    buf.fill(round as u8);
                    if random.below(2) == 0 {
                        store.write(at, &buf).unwrap();
                    } else {
                        for part in 0..4 {
                            let part = part * 128 * 1024;
                            store
                                .write(at + part as u64, &buf[part..part + 128 * 1024])
                                .unwrap();
                        }
                    }
                    let mut back = Aligned::new(512 * 1024);
                    store.read(at, &mut back).unwrap();
                    assert!(
                        back.iter().all(|&b| b == round as u8),
                        "block {block} lost a write"
                    );
                }
            });
        }
    });
}

#[test]
fn a_large_read_leaves_nothing_in_the_page_cache() {
    let scratch = Scratch::on_disk("large").holding(&noise(4 * MIB, 3));
    let store = scratch.open(FileMode::Read);
    forget(&scratch.0);
    if cached_pages(&scratch.0).is_none() {
        eprintln!("not checked: this kernel has no cachestat");
        return;
    }
    let mut buf = Aligned::new(2 * MIB);
    store.read(MIB as u64, &mut buf).unwrap();
    assert!(buf[..] == noise(4 * MIB, 3)[MIB..3 * MIB]);
    assert_eq!(cached_pages(&scratch.0), Some(0));
}

#[test]
fn a_small_read_leaves_nothing_in_the_page_cache_and_reads_nothing_ahead() {
    let scratch = Scratch::on_disk("small").holding(&noise(4 * MIB, 4));
    let store = scratch.open(FileMode::Read);
    forget(&scratch.0);
    if cached_pages(&scratch.0).is_none() {
        eprintln!("not checked: this kernel has no cachestat");
        return;
    }
    let mut buf = Aligned::new(4096);
    for page in [0, 1, 2, 100, 101, 102] {
        assert!(!store.read_now(page * 4096, &mut buf).unwrap());
        store.read(page * 4096, &mut buf).unwrap();
    }
    assert_eq!(cached_pages(&scratch.0), Some(0));
}

#[test]
fn a_run_that_is_announced_is_fetched_at_one_go_and_leaves_nothing_in_the_page_cache() {
    let bytes = noise(4 * MIB, 6);
    let scratch = Scratch::on_disk("announced").holding(&bytes);
    let store = scratch.open(FileMode::Read);
    forget(&scratch.0);
    if cached_pages(&scratch.0).is_none() {
        eprintln!("not checked: this kernel has no cachestat");
        return;
    }
    assert!(store.will_read(8192, MIB as u64));
    assert_eq!(cached_pages(&scratch.0), Some(256));
    let mut buf = Aligned::new(4096);
    for page in 2..258 {
        store.read(page * 4096, &mut buf).unwrap();
        assert!(buf[..] == bytes[page as usize * 4096..][..4096]);
    }
    assert_eq!(cached_pages(&scratch.0), Some(256), "one read for all");
    store.was_read(8192, MIB as u64);
    assert_eq!(cached_pages(&scratch.0), Some(0));
}

#[test]
fn what_stands_in_the_page_cache_already_is_not_announced_and_stays() {
    let scratch = Scratch::on_disk("stands").holding(&noise(MIB, 7));
    let store = scratch.open(FileMode::Read);
    fs::read(&scratch.0).unwrap();
    assert!(!store.will_read(0, MIB as u64));
    assert!(!store.will_read(2 * MIB as u64, MIB as u64), "past the end");
    let memory = Scratch::in_memory("stands").holding(&noise(MIB, 7));
    assert!(!memory.open(FileMode::Read).will_read(0, MIB as u64));
}

#[test]
fn read_now_answers_from_the_page_cache_alone() {
    let bytes = noise(MIB, 5);
    let scratch = Scratch::on_disk("now").holding(&bytes);
    let store = scratch.open(FileMode::Read);
    if cached_pages(&scratch.0).is_none() {
        eprintln!("not checked: this kernel has no cachestat");
        return;
    }
    fs::read(&scratch.0).unwrap();
    let mut buf = Aligned::new(64 * 1024);
    assert!(store.read_now(65_536, &mut buf).unwrap());
    assert!(buf[..] == bytes[65_536..131_072]);
    forget(&scratch.0);
    assert!(!store.read_now(65_536, &mut buf).unwrap());
    assert_eq!(
        cached_pages(&scratch.0),
        Some(0),
        "read_now started a read of its own"
    );
}

#[test]
fn buffered_writes_do_not_pile_up_in_the_page_cache() {
    let len = 64 * MIB;
    let scratch = Scratch::on_disk("pile");
    let options = FileOptions {
        min_len: len as u64,
        ..FileOptions::new(FileMode::Truncate)
    };
    let store = FileStore::open(&scratch.0, options).unwrap();
    if cached_pages(&scratch.0).is_none() {
        eprintln!("not checked: this kernel has no cachestat");
        return;
    }
    let page = Aligned::new(4096);
    let mut most = 0;
    for i in 0..len / 4096 {
        // Every page once, never two neighbours in a row.
        let page_number = (i * 7919) % (len / 4096);
        store.write((page_number * 4096) as u64, &page).unwrap();
        if i % 64 == 0 {
            most = most.max(cached_pages(&scratch.0).unwrap());
        }
    }
    assert!(
        most * 4096 <= 20 << 20,
        "{} MiB stood in the page cache",
        (most * 4096) >> 20
    );
    store.sync().unwrap();
    assert_eq!(cached_pages(&scratch.0), Some(0));
}

#[test]
fn a_file_truncated_underneath_is_an_error_and_never_zeros() {
    for (scratch, aligned) in [
        (Scratch::on_disk("cut-direct"), true),
        (Scratch::on_disk("cut-buffered"), false),
        (Scratch::in_memory("cut"), true),
    ] {
        let scratch = scratch.holding(&vec![7; 2 * MIB]);
        let store = scratch.open(FileMode::ReadWrite);
        fs::OpenOptions::new()
            .write(true)
            .open(&scratch.0)
            .unwrap()
            .set_len(MIB as u64 + 100)
            .unwrap();
        let mut buf = Aligned::new(MIB);
        let buf = if aligned {
            &mut buf[..]
        } else {
            &mut buf[1..100_000]
        };
        store.read(0, buf).unwrap();
        for offset in [
            MIB as u64 - if aligned { 4096 } else { 0 },
            MIB as u64 + 8192,
        ] {
            let error = match store.read_now(offset, buf) {
                Ok(true) => panic!("zeros for bytes that were there"),
                Ok(false) => store.read(offset, buf).unwrap_err(),
                Err(error) => error,
            };
            let text = error.to_string();
            assert!(
                text.contains("truncated") && text.contains("2097152"),
                "{text}"
            );
        }
        let error = store.write(0, &[1; 10]).unwrap_err();
        assert!(error.to_string().contains("truncated"), "{error}");
        assert_eq!(fs::metadata(&scratch.0).unwrap().len(), MIB as u64 + 100);
    }
}

#[test]
fn a_file_that_grew_meanwhile_still_reads_as_zeros_past_its_length_at_open() {
    let scratch = Scratch::on_disk("grew").holding(&[1; 5000]);
    let store = scratch.open(FileMode::Read);
    let more = fs::OpenOptions::new().write(true).open(&scratch.0).unwrap();
    more.write_all_at(&vec![2; 300_000], 5000).unwrap();
    let mut buf = Aligned::new(256 * 1024);
    store.read(4096, &mut buf).unwrap();
    assert!(buf[..904].iter().all(|&b| b == 1) && buf[904..].iter().all(|&b| b == 0));
    assert_eq!(store.len(), 5000);
}

#[test]
fn a_file_of_any_length_keeps_its_length() {
    for len in [1, 511, 4095, 4097, 300_001] {
        let scratch = Scratch::on_disk(&format!("len{len}")).holding(&noise(len, 6));
        let store = scratch.open(FileMode::ReadWrite);
        let mut buf = Aligned::new(512 * 1024);
        store.read(0, &mut buf).unwrap();
        assert!(buf[..len] == noise(len, 6) && buf[len..].iter().all(|&b| b == 0));
        buf[..len].fill(9);
        store.write(0, &buf[..len]).unwrap();
        assert_eq!(
            store.write(0, &buf[..len + 1]).unwrap_err().raw_os_error(),
            Some(libc::ENOSPC)
        );
        store.sync().unwrap();
        assert_eq!(fs::read(&scratch.0).unwrap(), vec![9; len]);
    }
}

#[test]
fn a_sparse_file_stays_sparse_and_a_punch_gives_its_space_back() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::on_disk("sparse");
    let options = FileOptions {
        min_len: 1 << 30,
        ..FileOptions::new(FileMode::CreateNew)
    };
    let store = FileStore::open(&scratch.0, options).unwrap();
    let mut buf = Aligned::new(MIB);
    store.read(512 << 20, &mut buf).unwrap();
    assert!(buf.iter().all(|&b| b == 0));
    assert_eq!(fs::metadata(&scratch.0).unwrap().blocks(), 0);
    buf.fill(1);
    store.write(512 << 20, &buf).unwrap();
    store.sync().unwrap();
    let full = fs::metadata(&scratch.0).unwrap().blocks();
    assert!(full * 512 >= MIB as u64);
    store.punch(512 << 20, MIB as u64).unwrap();
    assert!(fs::metadata(&scratch.0).unwrap().blocks() < full);
    store.read(512 << 20, &mut buf).unwrap();
    assert!(buf.iter().all(|&b| b == 0));
}

#[test]
fn modes_create_empty_and_lengthen_files_as_they_say() {
    let scratch = Scratch::on_disk("modes");
    let open = |mode, min_len| {
        FileStore::open(
            &scratch.0,
            FileOptions {
                min_len,
                ..FileOptions::new(mode)
            },
        )
    };
    for mode in [FileMode::Read, FileMode::ReadWrite] {
        let error = open(mode, 0).unwrap_err();
        assert!(
            matches!(&error, OpenError::Io { error, .. } if error.kind() == io::ErrorKind::NotFound)
        );
    }
    drop(open(FileMode::CreateNew, 10).unwrap());
    let error = open(FileMode::CreateNew, 10).unwrap_err();
    assert!(
        matches!(&error, OpenError::Io { error, .. } if error.kind() == io::ErrorKind::AlreadyExists)
    );
    fs::write(&scratch.0, b"0123456789").unwrap();
    drop(open(FileMode::Create, 12).unwrap());
    assert_eq!(fs::read(&scratch.0).unwrap(), b"0123456789\0\0");
    drop(open(FileMode::ReadWrite, 3).unwrap());
    assert_eq!(fs::read(&scratch.0).unwrap().len(), 12);
    let read_only = open(FileMode::Read, 100).unwrap();
    assert_eq!(read_only.len(), 12);
    assert_eq!(
        read_only.write(0, b"x").unwrap_err().raw_os_error(),
        Some(libc::EBADF)
    );
    drop(open(FileMode::Truncate, 4).unwrap());
    assert_eq!(fs::read(&scratch.0).unwrap(), [0; 4]);
}

#[test]
fn a_file_in_use_is_not_emptied() {
    let scratch = Scratch::on_disk("inuse").holding(b"precious");
    let _writer = scratch.open(FileMode::ReadWrite);
    let error = FileStore::open(&scratch.0, FileOptions::new(FileMode::Truncate)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("in this process") && text.contains("locking=False"),
        "{text}"
    );
    assert_eq!(fs::read(&scratch.0).unwrap(), b"precious");
}

#[test]
fn an_unlocked_store_lets_the_next_writer_in() {
    let scratch = Scratch::on_disk("unlock").holding(b"x");
    let done_with = scratch.open(FileMode::ReadWrite);
    done_with.unlock();
    scratch.open(FileMode::ReadWrite);
}

#[test]
fn another_process_is_refused_too() {
    const PATH: &str = "USERFAULT_TEST_LOCKED_FILE";
    if let Some(path) = std::env::var_os(PATH) {
        // The child's part.
        let error = FileStore::open(path, FileOptions::new(FileMode::ReadWrite)).unwrap_err();
        assert!(
            matches!(
                error,
                OpenError::InUse {
                    holder: Some(_),
                    ..
                }
            ),
            "{error}"
        );
        return;
    }
    let scratch = Scratch::on_disk("process").holding(b"x");
    let _writer = scratch.open(FileMode::ReadWrite);
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "another_process_is_refused_too"])
        .env(PATH, &scratch.0)
        .output()
        .unwrap();
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
}

#[test]
fn directories_and_pipes_are_refused() {
    let error = FileStore::open("/dev/null", FileOptions::new(FileMode::Read)).unwrap_err();
    assert!(matches!(error, OpenError::Kind { .. }), "{error}");
    let error = FileStore::open("/", FileOptions::new(FileMode::Read)).unwrap_err();
    assert!(matches!(error, OpenError::Kind { .. }), "{error}");
}
