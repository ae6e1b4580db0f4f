//! Serving another process from Rust alone. What that process may do to its memory is tested from Python, in
//! `tests/serving`.
//!
//! Unsafe: fork(2), a mapping, and touches of it that another process answers.

mod common;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use userfault_engine::{Error, Lies, OnError, ServeOptions, serve};
use userfault_store::MemoryStore;
use userfault_uffd::abi::{UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING};
use userfault_uffd::{OpenOptions, Uffd};

const PAGES: usize = 32;

fn options() -> ServeOptions {
    ServeOptions {
        name: "the child".into(),
        block: Some(SMALL),
        on_error: OnError::Auto,
        retry_for: Duration::from_secs(5),
        pid: None,
        track: false,
    }
}

/// Number and address, through a pipe.
fn tell(pipe: i32, numbers: [usize; 2]) {
    // SAFETY: the array is alive and as long as the call is told.
    let written = unsafe { libc::write(pipe, numbers.as_ptr().cast(), size_of_val(&numbers)) };
    assert_eq!(written as usize, size_of_val(&numbers));
}

/// The program of the child: maps memory, tells of it, and reads it once it is told to go on.
fn child(tell_to: i32, go: i32) -> i32 {
    let len = PAGES * SMALL;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel chooses the place.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, flags, -1, 0) };
    let uffd = Uffd::open(&OpenOptions {
        require: UFFD_FEATURE_EVENT_REMOVE,
        ..OpenOptions::default()
    })
    .unwrap();
    assert!(
        uffd.register(memory as usize, len, UFFDIO_REGISTER_MODE_MISSING)
            .is_ok()
    );
    tell(tell_to, [uffd.as_raw_fd() as usize, memory as usize]);
    let mut one = [0u8];
    // SAFETY: one byte, and one byte of room.
    assert_eq!(unsafe { libc::read(go, one.as_mut_ptr().cast(), 1) }, 1);
    // SAFETY: the memory is this child's own, and the other process answers the touches.
    let byte = |at: usize| unsafe { memory.cast::<u8>().add(at).read_volatile() };
    for at in (0..len).step_by(997) {
        assert_eq!(byte(at), pattern(at), "at {at}");
    }
    // SAFETY: throws away a page of its own.
    let thrown_away = unsafe { libc::madvise(memory, SMALL, libc::MADV_DONTNEED) };
    assert_eq!(thrown_away, 0);
    assert_eq!(byte(1), 0);
    0
}

#[test]
fn a_child_reads_the_store_and_zeros_where_it_threw_the_page_away() {
    apart!(30, {
        let (mut there, mut back) = ([0; 2], [0; 2]);
        // SAFETY: two arrays of two numbers.
        unsafe {
            assert_eq!(libc::pipe(there.as_mut_ptr()), 0);
            assert_eq!(libc::pipe(back.as_mut_ptr()), 0);
        }
        // SAFETY: the child runs what it is given above, and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let ended = std::panic::catch_unwind(|| child(there[1], back[0]));
            // SAFETY: ends the child alone.
            unsafe { libc::_exit(ended.unwrap_or(9)) };
        }
        let mut told = [0usize; 2];
        // SAFETY: room for what the child writes; then its descriptor is copied, which is a number to the kernel.
        let uffd = unsafe {
            let size = size_of_val(&told);
            assert_eq!(
                libc::read(there[0], told.as_mut_ptr().cast(), size) as usize,
                size
            );
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32;
            assert!(pidfd >= 0);
            let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd, told[0], 0) as i32;
            libc::close(pidfd);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        let lies = Lies {
            address: told[1],
            len: PAGES * SMALL,
            store_offset: 0,
            page: SMALL,
            shared: None,
        };
        let store = Arc::new(MemoryStore::new(patterned(PAGES * SMALL)));
        let served = serve(uffd, &[lies], store, options()).unwrap();
        // SAFETY: one byte.
        assert_eq!(unsafe { libc::write(back[1], b"x".as_ptr().cast(), 1) }, 1);
        assert!(served.wait(Some(Duration::from_secs(20))).unwrap());
        let mut status = 0;
        // SAFETY: reaps the child.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert_eq!(status, 0);
        assert_eq!(served.events()[2], ("remove", 1));
        assert_eq!(served.stats().bytes_read, (PAGES * SMALL) as u64);
        assert_eq!(served.owed_bytes(), 0);
        assert!(served.take_written().unwrap().is_empty());
        served.close(true).unwrap();
    });
}

#[test]
fn what_is_no_userfaultfd_is_not_served() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let lies = Lies {
        address: 1 << 30,
        len: SMALL,
        store_offset: 0,
        page: SMALL,
        shared: None,
    };
    let store = Arc::new(MemoryStore::new(vec![1; SMALL]));
    let error = serve(null.into(), &[lies], store, options()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Os {
                errno: libc::EINVAL,
                ..
            }
        ),
        "{error}"
    );
}
