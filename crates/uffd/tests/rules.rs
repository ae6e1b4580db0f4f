//! What needs no kernel: the retry rules against scripted answers, and the table of numbers.

use userfault_uffd::abi::{CONSTANTS, LAYOUTS, feature_names};
use userfault_uffd::fill::fill;
use userfault_uffd::{Fill, Filled, Outcome};

const PAGE: usize = 4096;
const LEN: usize = 8 * PAGE;

fn pages(n: usize) -> i64 {
    (n * PAGE) as i64
}

/// Runs `fill` over eight pages; the answers come in order, and the calls made are returned.
fn run(exists: Fill, answers: &[(i64, i32)]) -> (Filled, Vec<(usize, usize)>) {
    let mut calls = Vec::new();
    let mut answers = answers.iter();
    let filled = fill(LEN, PAGE, exists, |at, len| {
        calls.push((at, len));
        let &(done, errno) = answers.next().expect("no call after the last answer");
        Outcome { done, errno }
    });
    assert!(answers.next().is_none(), "every answer is asked for");
    (filled, calls)
}

#[test]
fn one_success_is_the_whole() {
    let (filled, calls) = run(Fill::OwnAbsent, &[(pages(8), 0)]);
    assert_eq!(filled, Filled::Whole { skipped: 0 });
    assert_eq!(calls, [(0, LEN)]);
}

#[test]
fn after_partial_progress_the_rest_is_asked_for_and_gives_the_reason() {
    let (filled, calls) = run(
        Fill::OwnAbsent,
        &[(pages(3), libc::EAGAIN), (0, libc::EEXIST)],
    );
    assert_eq!(filled, Filled::StalePage { at: 3 * PAGE });
    assert_eq!(calls, [(0, LEN), (3 * PAGE, 5 * PAGE)]);
}

#[test]
fn where_others_fill_too_a_page_that_is_there_is_skipped() {
    let answers = [
        (0, libc::EEXIST),
        (pages(2), libc::EAGAIN),
        (0, libc::EEXIST),
        (pages(4), 0),
    ];
    let (filled, calls) = run(Fill::Shared, &answers);
    assert_eq!(filled, Filled::Whole { skipped: 2 * PAGE });
    assert_eq!(
        calls[1..],
        [(PAGE, 7 * PAGE), (3 * PAGE, 5 * PAGE), (4 * PAGE, 4 * PAGE)]
    );
}

#[test]
fn an_unread_event_ends_the_fill_and_is_never_retried_here() {
    let (filled, calls) = run(Fill::Shared, &[(pages(1), libc::EAGAIN), (0, libc::EAGAIN)]);
    assert_eq!(filled, Filled::EventPending { at: PAGE });
    assert_eq!(calls.len(), 2);
}

#[test]
fn a_changed_layout_a_dead_process_and_a_mistake_are_told_apart() {
    assert_eq!(
        run(Fill::Shared, &[(0, libc::ENOENT)]).0,
        Filled::LayoutChanged { at: 0 }
    );
    assert_eq!(
        run(Fill::Shared, &[(0, libc::ESRCH)]).0,
        Filled::ProcessGone
    );
    let failed = Filled::Failed {
        at: PAGE,
        errno: libc::EFAULT,
    };
    assert_eq!(
        run(Fill::Shared, &[(pages(1), libc::EAGAIN), (0, libc::EFAULT)]).0,
        failed
    );
}

#[test]
fn a_success_that_did_nothing_is_not_repeated_for_ever() {
    let failed = Filled::Failed {
        at: 0,
        errno: libc::EIO,
    };
    assert_eq!(run(Fill::Shared, &[(0, 0)]).0, failed);
}

#[test]
fn a_tail_shorter_than_a_page_is_skipped_as_what_it_is() {
    let filled = fill(PAGE, 2 << 20, Fill::Shared, |_, _| Outcome {
        done: 0,
        errno: libc::EEXIST,
    });
    assert_eq!(filled, Filled::Whole { skipped: PAGE });
}

#[test]
fn every_name_of_the_table_is_there_once() {
    let mut names: Vec<_> = CONSTANTS.iter().map(|(name, _)| *name).collect();
    names.extend(LAYOUTS.iter().map(|layout| layout.name));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn the_fields_of_a_struct_follow_each_other_without_a_gap() {
    for layout in LAYOUTS
        .iter()
        .filter(|layout| layout.name != "uffd_msg_pagefault")
    {
        let mut at = 0;
        for &(field, offset, size) in layout.fields {
            assert_eq!(offset, at, "{}.{field}", layout.name);
            at += size;
        }
        assert_eq!(at, layout.size, "{}", layout.name);
    }
}

#[test]
fn feature_bits_have_names() {
    assert_eq!(
        feature_names(1 << 16 | 1 << 40),
        ["UFFD_FEATURE_MOVE", "bit 40"]
    );
}
