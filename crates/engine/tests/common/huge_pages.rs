//! Huge pages for a while. The pool is one number for the whole machine: what a test needs is added to it,
//! and taken off again at the end, under one lock. The lock file lists who holds how much, so that whoever
//! comes next can give back what a killed test could not. The Python tests keep the same list.
//!
//! Unsafe: flock(2), which std has only since a newer Rust than this crate needs.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Pages of a process that was killed come back a little later.
const COME_BACK: Duration = Duration::from_secs(5);

fn size() -> Option<u64> {
    fs::read_to_string(POOL).ok()?.trim().parse().ok()
}

/// How many of so many pages cannot be had, after some patience.
fn short_of(pages: u64) -> u64 {
    let began = Instant::now();
    loop {
        let short = pages.saturating_sub(userfault_engine::hugetlb_free());
        if short == 0 || began.elapsed() > COME_BACK {
            return short;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes the pool larger by so many pages; false if it could not be, and is as before.
fn grow(pages: u64) -> bool {
    let before = size().unwrap_or(0);
    let grown = fs::write(POOL, (before + pages).to_string())
        .ok()
        .and_then(|()| size())
        .map_or(0, |after| after.saturating_sub(before));
    if grown < pages {
        shrink(grown);
    }
    grown >= pages
}

fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.rsplit_once(')')?.1;
    rest.split_whitespace().nth(19).map(str::to_owned)
}

struct Ledger {
    file: File,
    entries: Vec<String>,
}

impl Ledger {
    fn open() -> Ledger {
        let path = std::env::temp_dir().join("userfault-hugepages.lock");
        let mut open = OpenOptions::new();
        open.read(true).write(true);
        // Without O_CREAT first: the kernel refuses to create over another user's file in a sticky folder.
        let mut file = open
            .open(&path)
            .or_else(|_| open.create(true).open(&path))
            .unwrap();
        // SAFETY: flock takes a descriptor, which `file` keeps open.
        assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        let mut entries = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if started(words[0].parse().unwrap()).as_deref() == Some(words[1]) {
                entries.push(line.to_owned());
            } else {
                shrink(words[2].parse().unwrap());
            }
        }
        Ledger { file, entries }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        let text: String = self
            .entries
            .iter()
            .map(|line| format!("{line}\n"))
            .collect();
        self.file.rewind().unwrap();
        self.file.set_len(0).unwrap();
        self.file.write_all(text.as_bytes()).unwrap();
    }
}

fn shrink(pages: u64) {
    let left = size().unwrap_or(0).saturating_sub(pages);
    let _ = fs::write(POOL, left.to_string());
}

struct Held(String, u64);

impl Drop for Held {
    fn drop(&mut self) {
        let mut ledger = Ledger::open();
        // Somebody may have given it back already: then the line is gone.
        if let Some(index) = ledger.entries.iter().position(|line| *line == self.0) {
            ledger.entries.remove(index);
            shrink(self.1);
        }
    }
}

/// Runs `test` while the pool has `pages` more pages of 2 MiB. Where it cannot be made larger the test is
/// left out, and says so.
pub fn with<R>(pages: u64, test: impl FnOnce() -> R) -> Option<R> {
    let held = {
        let mut ledger = Ledger::open();
        let mut added = 0;
        // Pages that are in the pool but reserved for somebody, even for nobody who lives, are no use: then it is
        // made larger once more.
        for more in [|pages| pages, short_of] {
            let more = more(pages);
            if !grow(more) {
                shrink(added);
                println!("left out: {pages} huge pages cannot be reserved on this machine");
                return None;
            }
            added += more;
        }
        let pages = added;
        let pid = std::process::id();
        let line = format!("{pid} {} {pages}", started(pid).unwrap());
        ledger.entries.push(line.clone());
        Held(line, pages)
    };
    let result = test();
    drop(held);
    Some(result)
}
