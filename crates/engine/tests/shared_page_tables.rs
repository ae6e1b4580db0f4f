//! A hugetlb file that another process maps, too: the kernel lets both use one page table for each aligned
//! GiB, and what the other has touched is then mapped here without a fault. A region must skip no fault.
//!
//! Unsafe: maps hugetlb memory by hand, beside the engine, and touches it.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::*;
use userfault_engine::{Access, Region};
use userfault_store::{Store, ZeroStore};
use userfault_uffd::Pagemap;

const GIB: usize = 1 << 30;
/// What contains one aligned GiB wherever it begins.
const LEN: usize = 2 * GIB;
const OTHERS: u8 = 0xEE;
const ROLE: &str = "USERFAULT_TEST_SECOND_PROCESS";

fn map(len: usize, fd: i32) -> usize {
    let anonymous = if fd < 0 {
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    };
    let rights = if fd < 0 {
        libc::PROT_NONE
    } else {
        libc::PROT_READ | libc::PROT_WRITE
    };
    // SAFETY: the kernel chooses the address.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            rights,
            anonymous | libc::MAP_NORESERVE,
            fd,
            0,
        )
    };
    assert_ne!(raw, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    raw as usize
}

/// Maps `LEN` bytes of a file at an address that has this remainder by a GiB.
fn map_beside(fd: i32, remainder: usize) -> usize {
    let raw = map(LEN + GIB, -1);
    let start = raw.next_multiple_of(GIB) + remainder;
    let start = if start - GIB >= raw {
        start - GIB
    } else {
        start
    };
    // SAFETY: the range lies in what was just reserved.
    let at = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
            fd,
            0,
        )
    };
    assert_eq!(at as usize, start);
    start
}

/// The pages that both touch: two in the first aligned GiB of the mapping.
fn pages(start: usize) -> [usize; 2] {
    let aligned = start.next_multiple_of(GIB) - start;
    [aligned + 3 * HUGE, aligned + 77 * HUGE]
}

/// The second process: maps the file, touches both pages, and stays until its stdin ends.
fn second_process() {
    let role = std::env::var(ROLE).unwrap();
    let (path, remainder) = role.split_once(' ').unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let start = map_beside(file.as_raw_fd(), remainder.parse().unwrap());
    for page in pages(start) {
        // SAFETY: inside of the mapping.
        unsafe { ((start + page) as *mut u8).write_volatile(OTHERS) };
    }
    let mut out = std::io::stdout();
    out.write_all(b"\nready\n").unwrap();
    out.flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

/// Starts the second process and waits until it has touched its pages.
fn start_second(test: &str, fd: i32, start: usize) -> Child {
    let path = format!("/proc/{}/fd/{fd}", std::process::id());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, format!("{path} {}", start % GIB))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = String::new();
    let out = child.stdout.as_mut().unwrap();
    while !told.contains("ready") {
        let mut bytes = [0; 256];
        let count = out.read(&mut bytes).unwrap();
        assert!(count > 0, "the second process has ended: {told}");
        told.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    child
}

fn end(mut child: Child) {
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Without a userfaultfd: true if a page that only the second process touched is mapped here.
fn kernel_shares(test: &str) -> bool {
    // SAFETY: a new descriptor, owned from here on.
    let file = unsafe {
        let fd = libc::memfd_create(c"plain".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: takes a descriptor and a number.
    assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), LEN as i64) }, 0);
    let start = map_beside(file.as_raw_fd(), 0);
    let second = start_second(test, file.as_raw_fd(), start);
    let [touched, not_touched] = pages(start);
    // SAFETY: inside of the mapping.
    let byte = unsafe { ((start + touched) as *const u8).read_volatile() };
    assert_eq!(byte, OTHERS);
    let entry = Pagemap::own().unwrap().entry(start + not_touched).unwrap();
    end(second);
    // SAFETY: mapped above, used by nobody any more.
    unsafe { libc::munmap(start as *mut libc::c_void, LEN) };
    entry.present()
}

/// The descriptor of the one region's memory.
fn memory_file() -> i32 {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    let found = entries.filter_map(|entry| {
        let entry = entry.unwrap();
        let link = std::fs::read_link(entry.path()).ok()?;
        let ours = link.to_string_lossy().starts_with("/memfd:userfault");
        ours.then(|| entry.file_name().to_string_lossy().parse().unwrap())
    });
    found.last().unwrap()
}

#[test]
fn a_region_that_another_process_mapped_first_skips_no_fault() {
    let test = "a_region_that_another_process_mapped_first_skips_no_fault";
    if std::env::var_os(ROLE).is_some() {
        return second_process();
    }
    if !apart::is_child(test) {
        let limit = std::time::Duration::from_secs(60);
        let ended = huge_pages::with(24, || {
            apart::again(test, limit, &[(apart::HUGE_PAGES, "1")])
        });
        if let Some(ended) = ended {
            print!("{}", ended.output);
            apart::check(test, &ended);
        }
        return;
    }
    // The trap is there: else this test shows nothing.
    println!("the kernel shares page tables: {}", kernel_shares(test));

    let store = Arc::new(Sparse(ZeroStore::new(LEN as u64)));
    let limit = Some(8 * HUGE as u64);
    let region = Region::open(store, options(HUGETLB, Access::ReadWrite, LEN, limit)).unwrap();
    assert_eq!(region.pages(), "2MiB hugetlb");
    let start = region.base() as usize;
    let second = start_second(test, memory_file(), start);
    let pagemap = Pagemap::own().unwrap();
    for (nth, page) in pages(start).into_iter().enumerate() {
        assert!(
            !pagemap.entry(start + page).unwrap().present(),
            "a fault is skipped"
        );
        for at in [page, page + HUGE - 1] {
            assert_eq!(
                touch::read(&region, at),
                pattern(at / HUGE),
                "what the second one wrote"
            );
        }
        let stats = region.stats();
        assert_eq!(
            stats.faults_missing + stats.faults_minor,
            nth as u64 + 1,
            "{stats:?}"
        );
    }
    // Nor is a write missed, or a page unmapped for one alone.
    let [first, other] = pages(start);
    touch::write(&region, first + 5, 1);
    region.evict(first as u64, 1).unwrap();
    assert_eq!(region.stats().bytes_written, HUGE as u64);
    assert_eq!(touch::read(&region, other), pattern(other / HUGE));
    end(second);
    region.close().unwrap();
}

/// Each block is filled with a byte of its own; what is written is only counted.
struct Sparse(ZeroStore);

impl Store for Sparse {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(pattern(offset as usize / HUGE));
        Ok(())
    }
    fn write(&self, _offset: u64, _data: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
    fn punch(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "sparse".into()
    }
}
