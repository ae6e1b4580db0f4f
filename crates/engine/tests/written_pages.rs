//! What silent tracking says was written, against what was done to the memory.
//!
//! Unsafe: maps memory, writes to it, throws parts of it away.

use std::collections::BTreeSet;
use std::ops::Range;

use userfault_engine::tracked::Ledger;

const PAGE: usize = 4096;
const PAGES: usize = 3 * 512 + 40;

struct Memory(*mut u8);

impl Memory {
    /// Begins in the middle of a page table's range, touched.
    fn new() -> Memory {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let spare = 4 << 20;
        // SAFETY: the kernel chooses the place.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE + spare,
                rights,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(raw, libc::MAP_FAILED);
        let start = (raw as usize).next_multiple_of(2 << 20) + 20 * PAGE;
        // SAFETY: in the mapping just made.
        unsafe {
            libc::madvise(
                start as *mut libc::c_void,
                PAGES * PAGE,
                libc::MADV_NOHUGEPAGE,
            )
        };
        let memory = Memory(start as *mut u8);
        (0..PAGES).for_each(|page| memory.write(page));
        memory
    }

    fn write(&self, page: usize) {
        // SAFETY: in bounds, and nobody else knows the memory.
        unsafe { self.0.add(page * PAGE + 7).write_volatile(1) };
    }

    fn throw_away(&self, pages: Range<usize>) {
        // SAFETY: in bounds; what is thrown away reads as zeros.
        let done = unsafe {
            let at = self.0.add(pages.start * PAGE).cast();
            libc::madvise(at, pages.len() * PAGE, libc::MADV_DONTNEED)
        };
        assert_eq!(done, 0);
    }
}

fn each(runs: Vec<Range<usize>>) -> BTreeSet<usize> {
    runs.into_iter().flatten().collect()
}

#[test]
fn pages_that_were_written_and_pages_that_were_thrown_away_are_named_and_no_others() {
    let memory = Memory::new();
    let ledger = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    let other = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    let all: BTreeSet<usize> = (0..PAGES).collect();
    assert_eq!(each(ledger.take(0..PAGES)), all);
    assert_eq!(each(other.take(0..PAGES)), all);
    assert_eq!(ledger.take_written(0..PAGES).unwrap(), []);
    // (written, thrown away): single pages, parts of a table's range, all of one, all of several and more.
    let cases: [(Range<usize>, Range<usize>); 6] = [
        (3..4, 9..10),
        (511..513, 491..493),
        (0..0, 492..1004),
        (100..101, 500..1500),
        (1500..PAGES, 0..490),
        (0..0, 0..PAGES),
    ];
    for (written, thrown) in cases {
        written.clone().for_each(|page| memory.write(page));
        memory.throw_away(thrown.clone());
        let expected: BTreeSet<usize> = written.chain(thrown).collect();
        assert_eq!(ledger.written().unwrap(), expected.len());
        // Asked in parts, without protecting; then once more, for nothing was protected.
        let parts = [0..600, 600..601, 601..PAGES];
        let asked = parts.map(|part| each(ledger.take_written(part).unwrap()));
        assert_eq!(
            asked.into_iter().flatten().collect::<BTreeSet<_>>(),
            expected
        );
        assert_eq!(each(ledger.take_written(0..PAGES).unwrap()), expected);
        // Protected again: both consumers hear of it, and then nobody finds anything.
        ledger.harvest(ledger.start(), ledger.len()).unwrap();
        assert_eq!(each(ledger.take(0..PAGES)), expected);
        assert_eq!(each(other.take(0..PAGES)), expected);
        assert_eq!(ledger.take_written(0..PAGES).unwrap(), []);
    }
}

/// The pages of the two whole tables of the memory: it begins 20 pages into one.
const WHOLE: Range<usize> = 492..1516;

#[test]
fn memory_that_is_rewritten_whole_again_and_again_is_named_each_time_and_clean_once_it_rests() {
    let memory = Memory::new();
    let ledger = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    let other = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    let harvest = || ledger.harvest(ledger.start(), ledger.len()).unwrap();
    let taken = |ledger: &Ledger| each(ledger.take(0..PAGES));
    taken(&ledger);
    taken(&other);
    let all: BTreeSet<usize> = (0..PAGES).collect();
    for _ in 0..40 {
        (0..PAGES).for_each(|page| memory.write(page));
        harvest();
        assert_eq!(taken(&ledger), all);
        assert_eq!(taken(&other), all);
    }
    // Whatever is written from here on is named: also what is not protected any more.
    for page in [0, 491, 492, 493, 700, 1003, 1004, 1005, 1515, PAGES - 1] {
        memory.write(page);
        let named = each(ledger.take_written(0..PAGES).unwrap());
        assert!(named.contains(&page), "{page}");
        // What was not written either is named, if at all, because it might have been.
        assert!(
            named.iter().all(|named| *named == page
                || WHOLE.contains(named)
                || *named == 0
                || *named == 491)
        );
    }
    // It rests: that is found out once, and then nothing is named but what is written.
    for _ in 0..3 {
        harvest();
        taken(&ledger);
        taken(&other);
    }
    assert_eq!(ledger.take_written(0..PAGES).unwrap(), []);
    for page in [3, 492, 800, 1515] {
        memory.write(page);
        assert_eq!(
            each(ledger.take_written(0..PAGES).unwrap()),
            BTreeSet::from([page])
        );
        harvest();
        assert_eq!(taken(&ledger), BTreeSet::from([page]));
        assert_eq!(taken(&other), BTreeSet::from([page]));
    }
}

#[test]
fn a_table_that_was_rewritten_whole_and_is_thrown_away_is_named() {
    let memory = Memory::new();
    let ledger = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    for _ in 0..6 {
        (0..PAGES).for_each(|page| memory.write(page));
        ledger.harvest(ledger.start(), ledger.len()).unwrap();
        ledger.take(0..PAGES);
    }
    memory.throw_away(WHOLE);
    assert!(each(ledger.take_written(0..PAGES).unwrap()).is_superset(&WHOLE.collect()));
    ledger.harvest(ledger.start(), ledger.len()).unwrap();
    assert!(each(ledger.take(0..PAGES)).is_superset(&WHOLE.collect()));
    ledger.harvest(ledger.start(), ledger.len()).unwrap();
    ledger.take(0..PAGES);
    assert_eq!(ledger.take_written(0..PAGES).unwrap(), []);
}

#[test]
fn what_one_consumer_leaves_unprotected_the_other_hears_of_as_well() {
    let memory = Memory::new();
    let ledger = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    let other = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    let mut stamps = 0..;
    for round in 0..60 {
        // One of them harvests more often than the other; pages are written whole, or one by one.
        if round % 7 == 6 {
            let page = (stamps.next().unwrap() * 37) % PAGES;
            memory.write(page);
            assert!(each(ledger.take_written(0..PAGES).unwrap()).contains(&page));
            assert!(each(other.take_written(0..PAGES).unwrap()).contains(&page));
        } else {
            (0..PAGES).for_each(|page| memory.write(page));
        }
        let who = if round % 3 == 0 { &other } else { &ledger };
        who.harvest(who.start(), who.len()).unwrap();
        if round % 7 != 6 {
            let all: BTreeSet<usize> = (0..PAGES).collect();
            assert_eq!(each(ledger.take(0..PAGES)), all);
            assert_eq!(each(other.take(0..PAGES)), all);
        }
    }
}

#[test]
fn a_table_that_was_thrown_away_and_written_to_since_is_named_whole() {
    let memory = Memory::new();
    let ledger = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    ledger.take(0..PAGES);
    memory.throw_away(WHOLE);
    // Whichever page it is that has the table made anew.
    for page in [700, 492, 1515] {
        memory.write(page);
        assert_eq!(
            each(ledger.take_written(0..PAGES).unwrap()),
            WHOLE.collect()
        );
    }
    ledger.harvest(ledger.start(), ledger.len()).unwrap();
    assert_eq!(each(ledger.take(0..PAGES)), WHOLE.collect());
    assert_eq!(ledger.take_written(0..PAGES).unwrap(), []);
}

#[test]
fn what_is_known_and_what_the_kernel_knows_is_named_once_and_in_order() {
    let memory = Memory::new();
    let ledger = Ledger::open(memory.0 as usize, PAGES * PAGE).unwrap();
    ledger.take(0..PAGES);
    for known in [9..10, 20..30, 40..42, 600..601, 900..1000] {
        ledger.put_back(known);
    }
    for page in [4, 10, 11, 25, 39, 41, 43, 599, 1550] {
        memory.write(page);
    }
    assert_eq!(
        ledger.take_written(0..1500).unwrap(),
        [4..5, 9..12, 20..30, 39..42, 43..44, 599..601, 900..1000]
    );
    // What was known is not any more; what is not protected is named again.
    assert_eq!(
        ledger.take_written(0..PAGES).unwrap(),
        [
            4..5,
            10..12,
            25..26,
            39..40,
            41..42,
            43..44,
            599..600,
            1550..1551
        ]
    );
}
