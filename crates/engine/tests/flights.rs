//! Reads in flight: what is read by the kernel while nobody waits for it comes whole, with its errors and its
//! deadlines; and where the machine forbids such reads, everything is as before.
//!
//! Unsafe: posix_fadvise(2), for which the standard library has no function.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::*;
use userfault_engine::{Access, Region};
use userfault_store::{FileMode, FileOptions, FileStore, OverlayStore, Store};

const BLOCKS: usize = 2048;
const READERS: usize = 16;

/// A file of a pattern on a disk, of which nothing is in the page cache; removed at the end.
struct Cold(PathBuf);

impl Cold {
    fn new(name: &str, len: usize) -> Cold {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(folder).unwrap();
        let path = folder.join(format!("flights-{name}-{}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        file.write_all(&patterned(len)).unwrap();
        let cold = Cold(path);
        cold.cool();
        cold
    }

    fn cool(&self) {
        let file = File::open(&self.0).unwrap();
        file.sync_all().unwrap();
        // SAFETY: a descriptor that is open, and numbers.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    fn store(&self) -> Arc<FileStore> {
        Arc::new(FileStore::open(&self.0, FileOptions::new(FileMode::ReadWrite)).unwrap())
    }

    /// True if reads of this file can fly: a disk's file system, and a kernel that tells what it has in its cache.
    fn flies(&self) -> bool {
        self.store().direct(0, SMALL).is_some()
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// True if this process has asked the kernel for reads that nobody waits for.
fn has_flown() -> bool {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .contains("[aio]")
}

/// Many threads read all of a cold file at random places, and write into some of its blocks, in a quarter of the
/// memory that it would need. Every byte is right, then and in the file.
fn many_threads_read_and_write(name: &str) -> bool {
    let len = BLOCKS * SMALL;
    let cold = Cold::new(name, len);
    let flies = cold.flies();
    let region = open(COPIED, &cold.store(), len, BLOCKS / 4);
    thread::scope(|scope| {
        for reader in 0..READERS {
            let region = &region;
            scope.spawn(move || {
                for step in 0..BLOCKS {
                    // All blocks, in an order of this reader's own.
                    let block = (step * (2 * reader + 1) + reader * 131) % BLOCKS;
                    let at = block * SMALL + (step * 37) % (SMALL - 64);
                    assert_eq!(touch::read(region, at), pattern(at), "{at}");
                    if block % READERS == reader {
                        touch::write(region, (block + 1) * SMALL - 1 - reader, !pattern(block));
                    }
                }
            });
        }
    });
    region.flush(0, len as u64).unwrap();
    region.close().unwrap();
    let written = fs::read(&cold.0).unwrap();
    for (at, byte) in written.iter().enumerate() {
        let (block, place) = (at / SMALL, at % SMALL);
        let expected = if place == SMALL - 1 - block % READERS {
            !pattern(block)
        } else {
            pattern(at)
        };
        assert_eq!(*byte, expected, "{at}");
    }
    flies
}

/// The same over private changes: the file stays as it was, and what was changed is read from scratch.
fn many_threads_change_for_themselves(name: &str) -> bool {
    let len = BLOCKS * SMALL;
    let cold = Cold::new(name, len);
    let flies = cold.flies();
    let folder = cold.0.parent().unwrap();
    let overlay = OverlayStore::new(Some(cold.store()), 0, len as u64, folder, "private".into());
    let limit = Some((BLOCKS / 4 * SMALL) as u64);
    let options = options(COPIED, Access::Private, len, limit);
    let region = Region::open(Arc::new(overlay.unwrap()), options).unwrap();
    for round in 0..2 {
        thread::scope(|scope| {
            for reader in 0..READERS {
                let region = &region;
                scope.spawn(move || {
                    for step in 0..BLOCKS / READERS {
                        let block = step * READERS + (reader + round * 5) % READERS;
                        let changed = block.is_multiple_of(3) && round > 0;
                        let byte = pattern(block * SMALL);
                        let expected = if changed { !byte } else { byte };
                        assert_eq!(touch::read(region, block * SMALL), expected, "{block}");
                        assert_eq!(
                            touch::read(region, block * SMALL + 9),
                            pattern(block * SMALL + 9)
                        );
                        if block.is_multiple_of(3) {
                            touch::write(region, block * SMALL, !byte);
                        }
                    }
                });
            }
        });
    }
    region.close().unwrap();
    assert!(fs::read(&cold.0).unwrap() == patterned(len));
    flies
}

/// A touch by a system call, which ends in an error where the program's own would be SIGBUS: 1, or -errno.
fn touched(region: &Region, at: usize) -> isize {
    let (_reader, writer) = std::io::pipe().unwrap();
    touch::write_to(region, at, 1, writer.as_raw_fd())
}

#[test]
fn many_threads_get_every_byte_of_a_cold_file_from_reads_in_flight() {
    apart!(100, {
        let flies = many_threads_read_and_write("many");
        assert_eq!(has_flown(), flies);
    });
}

#[test]
fn more_threads_than_places_get_their_bytes() {
    const READERS: usize = 320;
    apart!(100, {
        let len = 4 * BLOCKS * SMALL;
        let cold = Cold::new("crowd", len);
        let region = open(COPIED, &cold.store(), len, BLOCKS);
        thread::scope(|scope| {
            for reader in 0..READERS {
                let region = &region;
                scope.spawn(move || {
                    for step in 0..4 * BLOCKS / READERS {
                        let at = (step * READERS + reader) * SMALL + reader;
                        assert_eq!(touch::read(region, at), pattern(at));
                    }
                });
            }
        });
        region.close().unwrap();
    });
}

#[test]
fn private_changes_lie_over_reads_in_flight() {
    apart!(100, {
        let flies = many_threads_change_for_themselves("private");
        assert_eq!(has_flown(), flies);
    });
}

#[test]
fn where_such_reads_are_forbidden_threads_wait_for_theirs() {
    let name = "where_such_reads_are_forbidden_threads_wait_for_theirs";
    if apart::is_child(name) {
        many_threads_read_and_write("forbidden");
        assert!(!has_flown());
        return;
    }
    let already = std::env::var("USERFAULT_WITHOUT").unwrap_or_default();
    let without = format!("{already},aio");
    let environment = [("USERFAULT_WITHOUT", without.as_str())];
    let ended = apart::again(name, Duration::from_secs(100), &environment);
    apart::check(name, &ended);
}

#[test]
fn a_file_that_is_truncated_underneath_is_an_error_also_in_flight() {
    apart!(60, {
        let len = 64 * SMALL;
        let cold = Cold::new("truncated", len);
        let mut options = options(COPIED, Access::ReadOnly, len, None);
        options.retry_for = Duration::from_millis(200);
        let region = Region::open(cold.store(), options).unwrap();
        assert_eq!(touch::read(&region, 0), pattern(0));
        let file = fs::OpenOptions::new().write(true).open(&cold.0).unwrap();
        file.set_len((32 * SMALL) as u64).unwrap();
        assert_eq!(touched(&region, 40 * SMALL), -(libc::EFAULT as isize));
        let told = region.errors();
        assert!(
            told.iter().any(|error| error.message.contains("truncated")),
            "{told:?}"
        );
        assert_eq!(touched(&region, 7 * SMALL), 1);
    });
}

#[cfg(feature = "defects")]
mod hangs {
    use super::*;
    use std::time::Instant;

    fn with(name: &str, variable: &str, milliseconds: &str, test: impl FnOnce()) {
        if apart::is_child(name) {
            return test();
        }
        let ended = apart::again(name, Duration::from_secs(60), &[(variable, milliseconds)]);
        apart::check(name, &ended);
    }

    #[test]
    fn a_read_that_does_not_arrive_in_time_is_given_up_and_its_block_heals_later() {
        let name =
            "hangs::a_read_that_does_not_arrive_in_time_is_given_up_and_its_block_heals_later";
        with(name, "USERFAULT_ARRIVAL_IS_LATE", "2000", || {
            // A shorter file is never read direct.
            let len = 64 * SMALL;
            let cold = Cold::new("late", len);
            if kernel() < (6, 5) {
                return eprintln!("this kernel does not tell what it has in its page cache");
            }
            assert!(cold.flies(), "the tests' files are on no disk");
            let mut options = options(COPIED, Access::ReadOnly, len, None);
            options.retry_for = Duration::from_millis(300);
            let region = Region::open(cold.store(), options).unwrap();
            let began = Instant::now();
            assert_eq!(touched(&region, 3 * SMALL), -(libc::EFAULT as isize));
            assert!(
                began.elapsed() < Duration::from_millis(1900),
                "{:?}",
                began.elapsed()
            );
            let told = region.errors();
            assert!(told.iter().any(|error| error.offset == 3 * SMALL as u64
                && error.message.contains("has not come back")));
            let healed = loop {
                if let Ok(bytes) = region.heal(0, len as u64) {
                    break bytes;
                }
                thread::sleep(Duration::from_millis(50));
            };
            assert_eq!(healed, SMALL as u64);
            assert_eq!(touch::read(&region, 3 * SMALL + 5), pattern(3 * SMALL + 5));
        });
    }

    #[test]
    fn more_late_reads_than_there_are_places_are_all_given_up_and_all_heal() {
        let name = "hangs::more_late_reads_than_there_are_places_are_all_given_up_and_all_heal";
        with(name, "USERFAULT_ARRIVAL_IS_LATE", "1500", || {
            let len = 320 * SMALL;
            let cold = Cold::new("many-late", len);
            let mut options = options(COPIED, Access::ReadOnly, len, None);
            options.retry_for = Duration::from_millis(300);
            let region = Region::open(cold.store(), options).unwrap();
            for _ in 0..2 {
                thread::scope(|scope| {
                    for block in 0..320 {
                        let region = &region;
                        // Given up, or read in the ordinary way when no place was left.
                        scope.spawn(move || touched(region, block * SMALL));
                    }
                });
                while region.heal(0, len as u64).is_err() {
                    thread::sleep(Duration::from_millis(50));
                }
                for block in 0..320 {
                    assert_eq!(touch::read(&region, block * SMALL), pattern(block * SMALL));
                }
                region.evict(0, len as u64).unwrap();
                cold.cool();
            }
            region.close().unwrap();
        });
    }

    #[test]
    fn a_leader_that_hangs_while_it_gives_reads_to_the_kernel_stops_nobody_else() {
        let name =
            "hangs::a_leader_that_hangs_while_it_gives_reads_to_the_kernel_stops_nobody_else";
        with(name, "USERFAULT_SUBMISSION_HANGS", "4000", || {
            // A shorter file is never read direct.
            let len = 64 * SMALL;
            let cold = Cold::new("hangs", len);
            if kernel() < (6, 5) {
                return eprintln!("this kernel does not tell what it has in its page cache");
            }
            assert!(cold.flies(), "the tests' files are on no disk");
            let region = open(COPIED, &cold.store(), len, 16);
            let other = open(COPIED, &Bytes::ready(patterned(len)), len, 16);
            thread::scope(|scope| {
                let waits = scope.spawn(|| touch::read(&region, 5));
                thread::sleep(Duration::from_millis(300));
                let began = Instant::now();
                for block in 0..16 {
                    let at = block * SMALL + 9;
                    assert_eq!(touch::read(&other, at), pattern(at));
                }
                assert!(
                    began.elapsed() < Duration::from_secs(3),
                    "{:?}",
                    began.elapsed()
                );
                assert!(!waits.is_finished(), "the leader did not hang");
                assert_eq!(waits.join().unwrap(), pattern(5));
            });
            // Whoever was relieved is of use again.
            assert_eq!(touch::read(&region, 2 * SMALL), pattern(2 * SMALL));
        });
    }
}
