//! A pool of huge pages belongs to everybody: what the limit allows, others may have taken.
//!
//! Unsafe: takes huge pages by hand, beside the engine.

mod common;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::*;
use userfault_engine::{Access, Region};

/// Huge pages that are nobody's to use as long as this lives.
fn take(pages: usize) -> OwnedFd {
    // SAFETY: a new descriptor, owned from here on; fallocate takes it and numbers.
    unsafe {
        let fd = libc::memfd_create(c"others".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
        assert!(fd >= 0);
        let file = OwnedFd::from_raw_fd(fd);
        let len = (pages * HUGE) as i64;
        assert_eq!(libc::ftruncate(file.as_raw_fd(), len), 0);
        let taken = libc::fallocate(file.as_raw_fd(), 0, 0, len);
        assert_eq!(taken, 0, "{}", std::io::Error::last_os_error());
        file
    }
}

#[test]
fn huge_pages_that_others_take_are_waited_for() {
    let test = "huge_pages_that_others_take_are_waited_for";
    if !apart::is_child(test) {
        let limit = std::time::Duration::from_secs(100);
        if let Some(ended) = huge_pages::with(24, || {
            apart::again(test, limit, &[(apart::HUGE_PAGES, "1")])
        }) {
            apart::check(test, &ended);
        }
        return;
    }
    let (blocks, most) = (30, 20);
    let len = blocks * HUGE;
    let store = Bytes::ready(patterned(len));
    let limit = Some((most * HUGE) as u64);
    let region = Region::open(
        store.clone(),
        options(HUGETLB, Access::ReadWrite, len, limit),
    )
    .unwrap();
    assert_eq!(region.pages(), "2MiB hugetlb");
    // Of the pages that the limit counts on, others have 16 now.
    let others = take(16);
    for round in 0..2 {
        for block in 0..blocks {
            let at = block * HUGE + 5;
            let expected = if round == 0 { pattern(at) } else { 0 };
            assert_eq!(touch::read(&region, at), expected);
            touch::write(&region, at, 0);
        }
    }
    drop(others);
    for block in 0..blocks {
        assert_eq!(touch::read(&region, block * HUGE + 5), 0);
    }
    region.close().unwrap();
    assert!((0..blocks).all(|block| store.to_vec()[block * HUGE + 5] == 0));
}
