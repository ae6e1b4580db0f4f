//! kill -9 in the middle of a write-back: every 4 KiB of the file is old or new, and what a flush covered is
//! there.
//!
//! A child stamps pages of a region over a file on disk: each word of a page names the page and a version. It
//! notes in a second file which versions it began to write, what a flush that returned covered, and how many
//! writes of the store are under way. The parent kills it while there is one, looks at the file, and starts
//! the next child on it. `USERFAULT_KILLS` says how often, for each kind of memory and each way of writing.
//!
//! What the kernel writes in one piece is a page, not a block (hazard K1); and a page that the program writes
//! during its write-back may hold words of several versions, all of them its own.

mod common;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::random::Random;
use common::*;
use userfault_engine::lock::Mutex;
use userfault_engine::{Access, Region};
use userfault_store::{FileMode, FileOptions, FileStore, Store};

const WORDS: usize = SMALL / 8;

/// How often each child is killed, unless the environment says otherwise.
const KILLS: usize = 25;

/// A child that has written nothing by then will not.
const LATEST: Duration = Duration::from_secs(30);

/// How a child writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Everything fits into memory. The one writer flushes, and writes nothing meanwhile: every page of the file
    /// is one version, the one of the last flush or the one under way.
    Phases,
    /// Little fits, so that evictions write as well, and two writers go on during flushes.
    Pressure,
}

/// What a child notes: plain numbers in a file.
struct Notes {
    file: File,
    pages: usize,
}

impl Notes {
    const BEGUN: usize = 0;
    const BEFORE: usize = 1;
    const COVERED: usize = 2;

    fn open(path: &PathBuf, pages: usize) -> Notes {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).open(path);
        Notes {
            file: file.unwrap(),
            pages,
        }
    }

    fn set(&self, list: usize, page: usize, version: u32) {
        let at = 8 + 4 * (list * self.pages + page) as u64;
        self.file.write_all_at(&version.to_ne_bytes(), at).unwrap();
    }

    fn set_all(&self, list: usize, versions: &[u32]) {
        let bytes: Vec<u8> = versions.iter().flat_map(|v| v.to_ne_bytes()).collect();
        let at = 8 + 4 * (list * self.pages) as u64;
        self.file.write_all_at(&bytes, at).unwrap();
    }

    fn all(&self, list: usize) -> Vec<u32> {
        let mut bytes = vec![0; 4 * self.pages];
        let at = 8 + 4 * (list * self.pages) as u64;
        self.file.read_exact_at(&mut bytes, at).unwrap();
        let numbers = bytes.chunks_exact(4);
        numbers
            .map(|four| u32::from_ne_bytes(four.try_into().unwrap()))
            .collect()
    }

    fn set_writes(&self, under_way: u64) {
        self.file.write_all_at(&under_way.to_ne_bytes(), 0).unwrap();
    }

    fn writes(&self) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_ne_bytes(bytes)
    }
}

/// A file store that notes when a write is under way.
struct Noting {
    file: FileStore,
    notes: Notes,
    under_way: Mutex<u64>,
}

impl Noting {
    fn note(&self, more: bool) {
        let mut under_way = self.under_way.lock();
        *under_way = if more { *under_way + 1 } else { *under_way - 1 };
        self.notes.set_writes(*under_way);
    }

    fn noted(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.note(true);
        let result = write();
        self.note(false);
        result
    }
}

impl Store for Noting {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, buf)
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.noted(|| self.file.write(offset, data))
    }
    fn write_leaving(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.noted(|| self.file.write_leaving(offset, data))
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        self.file.name()
    }
}

fn word(page: usize, version: u32) -> u64 {
    (page as u64) << 32 | u64::from(version)
}

fn write_page(region: &Region, page: usize, version: u32) {
    for index in 0..WORDS {
        touch::write_word(region, page * SMALL + 8 * index, word(page, version));
    }
}

fn files(name: &str) -> (PathBuf, PathBuf) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    (
        folder.join(format!("kills-{name}.data")),
        folder.join(format!("kills-{name}.notes")),
    )
}

/// Writes until it is killed.
fn child(name: &str, kind: Kind, way: Way, blocks: usize) {
    let (data, notes) = files(name);
    let pages = blocks * kind.block / SMALL;
    let mut options = FileOptions::new(FileMode::ReadWrite);
    options.direct = true;
    let store = Arc::new(Noting {
        file: FileStore::open(&data, options).unwrap(),
        notes: Notes::open(&notes, pages),
        under_way: Mutex::new(0),
    });
    let limit = match way {
        Way::Phases => blocks + 4,
        Way::Pressure => 5,
    };
    let limit = Some((limit * kind.block) as u64 + (128 << 10));
    let options = common::options(kind, Access::ReadWrite, blocks * kind.block, limit);
    let region = Region::open(store, options).unwrap();
    assert!(region.pages().starts_with(kind.name), "{}", region.pages());
    let notes = Notes::open(&notes, pages);
    let first = notes.all(Notes::BEGUN).into_iter().max().unwrap() + 1;
    match way {
        Way::Phases => phases(&region, &notes, first),
        Way::Pressure => pressure(&region, &notes, first),
    }
}

fn phases(region: &Region, notes: &Notes, first: u32) {
    let mut random = Random::new(u64::from(first));
    let mut current = notes.all(Notes::BEGUN);
    for version in first.. {
        let (step, start) = (1 + random.below(3), random.below(3));
        for page in (start..notes.pages).step_by(step) {
            notes.set(Notes::BEFORE, page, current[page]);
            notes.set(Notes::BEGUN, page, version);
            current[page] = version;
            write_page(region, page, version);
        }
        region.flush(0, region.len() as u64).unwrap();
        notes.set_all(Notes::COVERED, &current);
    }
}

fn pressure(region: &Region, notes: &Notes, first: u32) {
    let done: Vec<AtomicU32> = notes
        .all(Notes::COVERED)
        .into_iter()
        .map(AtomicU32::new)
        .collect();
    thread::scope(|scope| {
        for writer in 0..2usize {
            let done = &done;
            scope.spawn(move || {
                let mut random = Random::new(u64::from(first) * 2 + writer as u64);
                for version in first.. {
                    // A few neighbours, as programs write; each writer has pages of its own.
                    let start = random.below(notes.pages);
                    for page in
                        (start..notes.pages.min(start + 24)).filter(|page| page % 2 == writer)
                    {
                        notes.set(Notes::BEGUN, page, version);
                        write_page(region, page, version);
                        done[page].store(version, Ordering::Release);
                    }
                }
            });
        }
        loop {
            let before: Vec<u32> = done.iter().map(|v| v.load(Ordering::Acquire)).collect();
            region.flush(0, region.len() as u64).unwrap();
            notes.set_all(Notes::COVERED, &before);
        }
    });
}

/// What the file must hold after a kill; returns the newest version of each page.
fn check(name: &str, way: Way, pages: usize) -> Vec<u32> {
    let (data, notes) = files(name);
    let notes = Notes::open(&notes, pages);
    let bytes = std::fs::read(&data).unwrap();
    assert_eq!(bytes.len(), pages * SMALL, "the file's length has changed");
    let begun = notes.all(Notes::BEGUN);
    let before = notes.all(Notes::BEFORE);
    let covered = notes.all(Notes::COVERED);
    let mut newest = Vec::with_capacity(pages);
    for page in 0..pages {
        let words: Vec<u64> = bytes[page * SMALL..(page + 1) * SMALL]
            .chunks_exact(8)
            .map(|eight| u64::from_ne_bytes(eight.try_into().unwrap()))
            .collect();
        for word in &words {
            let (whose, version) = ((word >> 32) as usize, *word as u32);
            assert_eq!(whose, page, "page {page} holds {word:#x}");
            assert!(
                (covered[page]..=begun[page].max(covered[page])).contains(&version),
                "page {page} holds version {version}; {} was flushed, {} was begun",
                covered[page],
                begun[page]
            );
            if way == Way::Phases {
                let allowed = if covered[page] == begun[page] {
                    [begun[page]; 2]
                } else {
                    [before[page], begun[page]]
                };
                assert!(
                    allowed.contains(&version),
                    "page {page} holds version {version} and not one of {allowed:?}"
                );
            }
        }
        if way == Way::Phases {
            let torn = words.iter().position(|word| *word != words[0]);
            assert_eq!(torn, None, "page {page} is torn");
        }
        newest.push(words.iter().map(|word| *word as u32).max().unwrap());
    }
    newest
}

/// Kills children in the middle of a write, time after time.
fn kill_again_and_again(name: &str, kind: Kind, way: Way, blocks: usize) {
    if apart::is_child(name) {
        return child(name, kind, way, blocks);
    }
    let environment: &[_] = if kind.name == HUGETLB.name {
        &[(apart::HUGE_PAGES, "1")]
    } else {
        &[]
    };
    let kills = std::env::var("USERFAULT_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    let pages = blocks * kind.block / SMALL;
    let (data, notes_path) = files(name);
    let first: Vec<u8> = (0..pages)
        .flat_map(|page| word(page, 1).to_ne_bytes().repeat(WORDS))
        .collect();
    std::fs::write(&data, first).unwrap();
    let notes = Notes::open(&notes_path, pages);
    for list in [Notes::BEGUN, Notes::BEFORE, Notes::COVERED] {
        notes.set_all(list, &vec![1; pages]);
    }
    let mut random = Random::new(11);
    let (mut inside, mut flushed) = (0, 0);
    for kill in 0..kills {
        notes.set_writes(0);
        let start = notes.all(Notes::COVERED);
        let mut child = apart::start(name, environment);
        let began = Instant::now();
        // Every other kill comes after a flush has returned; the rest may come before the first one has.
        let not_before = Duration::from_millis(random.below(120) as u64);
        let after_flush = kill % 2 == 1;
        while notes.writes() == 0
            || began.elapsed() < not_before
            || after_flush && notes.all(Notes::COVERED) == start
        {
            assert!(began.elapsed() < LATEST, "kill {kill}: nothing was written");
            assert!(
                child.try_wait().unwrap().is_none(),
                "kill {kill}: the child ended by itself"
            );
            thread::yield_now();
        }
        thread::sleep(Duration::from_micros(random.below(200) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        inside += usize::from(notes.writes() > 0);
        flushed += usize::from(notes.all(Notes::COVERED) != start);
        let newest = check(name, way, pages);
        // What is in the file is what the next child begins with.
        for list in [Notes::BEGUN, Notes::BEFORE, Notes::COVERED] {
            notes.set_all(list, &newest);
        }
        if way == Way::Pressure {
            // A page of several versions is written anew, so that the next child begins with whole ones.
            mend(&data, &newest);
        }
    }
    println!("{name}: {kills} kills, {inside} inside of a write, {flushed} after a flush");
    assert!(
        inside * 10 >= kills && flushed >= kills / 2,
        "of {kills} kills only {inside} were inside of a write, {flushed} after a flush"
    );
    let _ = std::fs::remove_file(&data);
    let _ = std::fs::remove_file(&notes_path);
}

fn mend(data: &PathBuf, newest: &[u32]) {
    let file = File::options().write(true).open(data).unwrap();
    for (page, version) in newest.iter().enumerate() {
        let bytes = word(page, *version).to_ne_bytes().repeat(WORDS);
        file.write_all_at(&bytes, (page * SMALL) as u64).unwrap();
    }
}

#[test]
fn small_blocks_in_phases() {
    kill_again_and_again("small_blocks_in_phases", COPIED_64K, Way::Phases, 48);
}

#[test]
fn small_blocks_under_pressure() {
    kill_again_and_again("small_blocks_under_pressure", COPIED_64K, Way::Pressure, 48);
}

#[test]
fn large_blocks_of_small_pages_in_phases() {
    kill_again_and_again(
        "large_blocks_of_small_pages_in_phases",
        VIEWED,
        Way::Phases,
        6,
    );
}

#[test]
fn huge_pages_in_phases() {
    kill_again_and_again("huge_pages_in_phases", HUGE_PAGES, Way::Phases, 6);
}

#[test]
fn huge_pages_under_pressure() {
    kill_again_and_again("huge_pages_under_pressure", HUGE_PAGES, Way::Pressure, 8);
}

#[test]
fn hugetlb_pages_in_phases() {
    let name = "hugetlb_pages_in_phases";
    if apart::is_child(name) {
        return kill_again_and_again(name, HUGETLB, Way::Phases, 6);
    }
    huge_pages::with(24, || kill_again_and_again(name, HUGETLB, Way::Phases, 6));
}
