//! The numbers and struct layouts of Linux 6.18, and one table of both.
//!
//! Names are the kernel's (`linux/userfaultfd.h`, `linux/fs.h`, `Documentation/admin-guide/mm/pagemap.rst`).
//! The macros below write each name once and put it into [`CONSTANTS`] or [`LAYOUTS`], so that a test can
//! compare all of them with `userfault.abi` and with the header of the machine.

#![allow(non_camel_case_types, reason = "the kernel's names are kept")]

use std::mem::{offset_of, size_of};

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: u64 = $value;)*
        /// Every constant of this file with its name.
        pub const CONSTANTS: &[(&str, u64)] = &[$((stringify!($name), $name)),*];
    };
}

macro_rules! structs {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* })*
        /// Every struct of this file that has named fields only.
        pub const LAYOUTS: &[Layout] = &[$(Layout {
            name: stringify!($name),
            size: size_of::<$name>(),
            fields: &[$((stringify!($field), offset_of!($name, $field), size_of::<$type>())),*],
        }),*];
    };
}

/// Size and field offsets of one struct, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The struct's name in the kernel header.
    pub name: &'static str,
    /// `sizeof`.
    pub size: usize,
    /// Name, offset and size of every field.
    pub fields: &'static [(&'static str, usize, usize)],
}

const fn ioc(direction: u64, kind: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | kind << 8 | number
}

const fn iowr(number: u64, size: usize) -> u64 {
    ioc(3, UFFDIO, number, size)
}

const fn ior(number: u64, size: usize) -> u64 {
    ioc(2, UFFDIO, number, size)
}

constants! {
    /// The API number that UFFDIO_API must name.
    UFFD_API = 0xAA;
    /// The type byte of every userfaultfd ioctl.
    UFFDIO = 0xAA;
    /// Flag of the system call: faults of user mode only; the kernel's own accesses get EFAULT.
    UFFD_USER_MODE_ONLY = 1;
    /// ioctl of /dev/userfaultfd that makes a userfaultfd; its argument is the system call's flags.
    USERFAULTFD_IOC_NEW = ioc(0, 0xAA, 0, 0);

    /// Number of UFFDIO_REGISTER, and its bit in the mask of ioctls.
    _UFFDIO_REGISTER = 0x00;
    /// Number of UFFDIO_UNREGISTER.
    _UFFDIO_UNREGISTER = 0x01;
    /// Number of UFFDIO_WAKE.
    _UFFDIO_WAKE = 0x02;
    /// Number of UFFDIO_COPY.
    _UFFDIO_COPY = 0x03;
    /// Number of UFFDIO_ZEROPAGE.
    _UFFDIO_ZEROPAGE = 0x04;
    /// Number of UFFDIO_MOVE.
    _UFFDIO_MOVE = 0x05;
    /// Number of UFFDIO_WRITEPROTECT.
    _UFFDIO_WRITEPROTECT = 0x06;
    /// Number of UFFDIO_CONTINUE.
    _UFFDIO_CONTINUE = 0x07;
    /// Number of UFFDIO_POISON.
    _UFFDIO_POISON = 0x08;
    /// Number of UFFDIO_API.
    _UFFDIO_API = 0x3F;

    /// Handshake: [`uffdio_api`].
    UFFDIO_API = iowr(_UFFDIO_API, size_of::<uffdio_api>());
    /// Put a range under user-space paging: [`uffdio_register`].
    UFFDIO_REGISTER = iowr(_UFFDIO_REGISTER, size_of::<uffdio_register>());
    /// Take a range out again: [`uffdio_range`].
    UFFDIO_UNREGISTER = ior(_UFFDIO_UNREGISTER, size_of::<uffdio_range>());
    /// Wake the threads that sleep on a range: [`uffdio_range`].
    UFFDIO_WAKE = ior(_UFFDIO_WAKE, size_of::<uffdio_range>());
    /// Fill pages from a buffer, atomically: [`uffdio_copy`].
    UFFDIO_COPY = iowr(_UFFDIO_COPY, size_of::<uffdio_copy>());
    /// Fill pages with zeros: [`uffdio_zeropage`].
    UFFDIO_ZEROPAGE = iowr(_UFFDIO_ZEROPAGE, size_of::<uffdio_zeropage>());
    /// Fill pages by moving others: [`uffdio_move`].
    UFFDIO_MOVE = iowr(_UFFDIO_MOVE, size_of::<uffdio_move>());
    /// Protect or unprotect pages: [`uffdio_writeprotect`].
    UFFDIO_WRITEPROTECT = iowr(_UFFDIO_WRITEPROTECT, size_of::<uffdio_writeprotect>());
    /// Map pages that the page cache holds: [`uffdio_continue`].
    UFFDIO_CONTINUE = iowr(_UFFDIO_CONTINUE, size_of::<uffdio_continue>());
    /// Make pages raise SIGBUS: [`uffdio_poison`].
    UFFDIO_POISON = iowr(_UFFDIO_POISON, size_of::<uffdio_poison>());

    /// Faults on pages that are not there.
    UFFDIO_REGISTER_MODE_MISSING = 1 << 0;
    /// Faults on writes to protected pages.
    UFFDIO_REGISTER_MODE_WP = 1 << 1;
    /// Faults on pages that the page cache holds but that are not mapped.
    UFFDIO_REGISTER_MODE_MINOR = 1 << 2;

    /// Do not wake the sleepers.
    UFFDIO_COPY_MODE_DONTWAKE = 1 << 0;
    /// Map write-protected.
    UFFDIO_COPY_MODE_WP = 1 << 1;
    /// Do not wake the sleepers.
    UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0;
    /// Protect (without it: unprotect). The other way round than COPY's bits.
    UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0;
    /// Do not wake the sleepers; only with unprotecting.
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1;
    /// Do not wake the sleepers.
    UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0;
    /// Map write-protected (Linux 6.4).
    UFFDIO_CONTINUE_MODE_WP = 1 << 1;
    /// Do not wake the sleepers.
    UFFDIO_POISON_MODE_DONTWAKE = 1 << 0;
    /// Do not wake the sleepers.
    UFFDIO_MOVE_MODE_DONTWAKE = 1 << 0;
    /// Skip holes of the source.
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1;

    /// Messages say whether a fault was a write to a protected page.
    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0;
    /// fork() raises an event that carries the child's userfaultfd. Needs CAP_SYS_PTRACE.
    UFFD_FEATURE_EVENT_FORK = 1 << 1;
    /// mremap() raises an event.
    UFFD_FEATURE_EVENT_REMAP = 1 << 2;
    /// madvise(MADV_DONTNEED, MADV_REMOVE, MADV_FREE) raises an event.
    UFFD_FEATURE_EVENT_REMOVE = 1 << 3;
    /// MISSING works on hugetlb memory.
    UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4;
    /// MISSING works on shared memory.
    UFFD_FEATURE_MISSING_SHMEM = 1 << 5;
    /// munmap() raises an event.
    UFFD_FEATURE_EVENT_UNMAP = 1 << 6;
    /// A fault raises SIGBUS in the touching thread instead of a message.
    UFFD_FEATURE_SIGBUS = 1 << 7;
    /// Messages carry the touching thread's id.
    UFFD_FEATURE_THREAD_ID = 1 << 8;
    /// MINOR works on hugetlb memory.
    UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9;
    /// MINOR works on shared memory.
    UFFD_FEATURE_MINOR_SHMEM = 1 << 10;
    /// Messages carry the exact address, not the page's.
    UFFD_FEATURE_EXACT_ADDRESS = 1 << 11;
    /// WP works on hugetlb and shared memory.
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12;
    /// WRITEPROTECT also protects anonymous pages that are not there yet (Linux 6.4).
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13;
    /// UFFDIO_POISON exists (Linux 6.6).
    UFFD_FEATURE_POISON = 1 << 14;
    /// Write-protect faults are resolved by the kernel; PAGEMAP_SCAN tells who was written (Linux 6.7).
    UFFD_FEATURE_WP_ASYNC = 1 << 15;
    /// UFFDIO_MOVE exists (Linux 6.8).
    UFFD_FEATURE_MOVE = 1 << 16;

    /// A fault.
    UFFD_EVENT_PAGEFAULT = 0x12;
    /// fork().
    UFFD_EVENT_FORK = 0x13;
    /// mremap().
    UFFD_EVENT_REMAP = 0x14;
    /// madvise() took pages away.
    UFFD_EVENT_REMOVE = 0x15;
    /// munmap().
    UFFD_EVENT_UNMAP = 0x16;

    /// The fault was a write.
    UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0;
    /// The page is there, but protected.
    UFFD_PAGEFAULT_FLAG_WP = 1 << 1;
    /// The page cache holds the page, but it is not mapped.
    UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2;

    /// ioctl of a process's pagemap file: [`pm_scan_arg`].
    PAGEMAP_SCAN = ioc(3, 0x66, 16, size_of::<pm_scan_arg>());
    /// The page may be write-protected by userfaultfd: its VMA has WP and WP_ASYNC.
    PAGE_IS_WPALLOWED = 1 << 0;
    /// Not write-protected: written since it was protected last, or never protected.
    PAGE_IS_WRITTEN = 1 << 1;
    /// The page belongs to a file.
    PAGE_IS_FILE = 1 << 2;
    /// The page is in memory and mapped.
    PAGE_IS_PRESENT = 1 << 3;
    /// The entry is a swap entry or a marker.
    PAGE_IS_SWAPPED = 1 << 4;
    /// The page is the kernel's page of zeros.
    PAGE_IS_PFNZERO = 1 << 5;
    /// The page is mapped as a huge page.
    PAGE_IS_HUGE = 1 << 6;
    /// The soft-dirty bit is set.
    PAGE_IS_SOFT_DIRTY = 1 << 7;
    /// The page is a guard page (Linux 6.15).
    PAGE_IS_GUARD = 1 << 8;
    /// Write-protect the pages that match.
    PM_SCAN_WP_MATCHING = 1 << 0;
    /// Fail with EPERM where a VMA is not tracked by WP_ASYNC.
    PM_SCAN_CHECK_WPASYNC = 1 << 1;

    /// Bit of a pagemap entry: soft-dirty.
    PM_SOFT_DIRTY = 1 << 55;
    /// Bit of a pagemap entry: mapped exactly once.
    PM_MMAP_EXCLUSIVE = 1 << 56;
    /// Bit of a pagemap entry: write-protected by userfaultfd.
    PM_UFFD_WP = 1 << 57;
    /// Bit of a pagemap entry: a guard page.
    PM_GUARD_REGION = 1 << 58;
    /// Bit of a pagemap entry: a file page or shared anonymous.
    PM_FILE = 1 << 61;
    /// Bit of a pagemap entry: a swap entry or a marker.
    PM_SWAP = 1 << 62;
    /// Bit of a pagemap entry: present.
    PM_PRESENT = 1 << 63;
}

structs! {
    /// Argument of UFFDIO_API.
    struct uffdio_api {
        /// Asked API number, 0xAA.
        api: u64,
        /// In: the features wanted. Out: all that the kernel has, a menu and not the choice.
        features: u64,
        /// Out: the mask of ioctls that the descriptor takes.
        ioctls: u64,
    }
    /// A range of addresses.
    struct uffdio_range {
        /// First byte, a multiple of the page.
        start: u64,
        /// Bytes, a multiple of the page.
        len: u64,
    }
    /// Argument of UFFDIO_REGISTER.
    struct uffdio_register {
        /// What to register.
        range: uffdio_range,
        /// UFFDIO_REGISTER_MODE_ bits.
        mode: u64,
        /// Out: the mask of ioctls that the range takes.
        ioctls: u64,
    }
    /// Argument of UFFDIO_COPY.
    struct uffdio_copy {
        /// Where to.
        dst: u64,
        /// Where from; any alignment.
        src: u64,
        /// Bytes.
        len: u64,
        /// UFFDIO_COPY_MODE_ bits.
        mode: u64,
        /// Out: bytes done or -errno.
        copy: i64,
    }
    /// Argument of UFFDIO_ZEROPAGE.
    struct uffdio_zeropage {
        /// What to fill.
        range: uffdio_range,
        /// UFFDIO_ZEROPAGE_MODE_ bits.
        mode: u64,
        /// Out: bytes done or -errno.
        zeropage: i64,
    }
    /// Argument of UFFDIO_WRITEPROTECT.
    struct uffdio_writeprotect {
        /// What to protect or unprotect.
        range: uffdio_range,
        /// UFFDIO_WRITEPROTECT_MODE_ bits.
        mode: u64,
    }
    /// Argument of UFFDIO_CONTINUE.
    struct uffdio_continue {
        /// What to map.
        range: uffdio_range,
        /// UFFDIO_CONTINUE_MODE_ bits.
        mode: u64,
        /// Out: bytes done or -errno.
        mapped: i64,
    }
    /// Argument of UFFDIO_POISON.
    struct uffdio_poison {
        /// What to poison.
        range: uffdio_range,
        /// UFFDIO_POISON_MODE_ bits.
        mode: u64,
        /// Out: bytes done or -errno.
        updated: i64,
    }
    /// Argument of UFFDIO_MOVE. The kernel calls the last field `move`, which Rust cannot.
    struct uffdio_move {
        /// Where to.
        dst: u64,
        /// Where from.
        src: u64,
        /// Bytes.
        len: u64,
        /// UFFDIO_MOVE_MODE_ bits.
        mode: u64,
        /// Out: bytes done or -errno.
        r#move: i64,
    }
    /// Argument of PAGEMAP_SCAN.
    struct pm_scan_arg {
        /// Size of this struct.
        size: u64,
        /// PM_SCAN_ bits.
        flags: u64,
        /// First byte of the range.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// Out: how far the scan came.
        walk_end: u64,
        /// Address of an array of [`page_region`].
        vec: u64,
        /// Entries of that array.
        vec_len: u64,
        /// Stop after so many pages; 0: no bound.
        max_pages: u64,
        /// PAGE_IS_ bits whose sense is turned round before matching.
        category_inverted: u64,
        /// PAGE_IS_ bits that must all be set.
        category_mask: u64,
        /// PAGE_IS_ bits of which one must be set.
        category_anyof_mask: u64,
        /// PAGE_IS_ bits to be reported.
        return_mask: u64,
    }
    /// One answer of PAGEMAP_SCAN: neighbouring pages of the same categories.
    struct page_region {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// PAGE_IS_ bits.
        categories: u64,
    }
    /// The argument of a fault message.
    struct uffd_msg_pagefault {
        /// UFFD_PAGEFAULT_FLAG_ bits.
        flags: u64,
        /// Where.
        address: u64,
        /// What a feature adds.
        feat: uffd_msg_feat,
    }
    /// What a feature adds to a fault message.
    struct uffd_msg_feat {
        /// The touching thread, with UFFD_FEATURE_THREAD_ID; else 0.
        ptid: u32,
    }
    /// The argument of a fork message.
    struct uffd_msg_fork {
        /// The child's userfaultfd.
        ufd: u32,
    }
    /// The argument of a remap message.
    struct uffd_msg_remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes.
        len: u64,
    }
    /// The argument of a remove or unmap message.
    struct uffd_msg_remove {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    }
}

/// The part of a message that depends on its event.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_arg {
    /// With UFFD_EVENT_PAGEFAULT.
    pub pagefault: uffd_msg_pagefault,
    /// With UFFD_EVENT_FORK.
    pub fork: uffd_msg_fork,
    /// With UFFD_EVENT_REMAP.
    pub remap: uffd_msg_remap,
    /// With UFFD_EVENT_REMOVE and UFFD_EVENT_UNMAP.
    pub remove: uffd_msg_remove,
    /// The raw words.
    pub reserved: [u64; 3],
}

/// One message as read(2) delivers it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    /// UFFD_EVENT_.
    pub event: u8,
    /// Zero.
    pub reserved1: u8,
    /// Zero.
    pub reserved2: u16,
    /// Zero.
    pub reserved3: u32,
    /// What the event says.
    pub arg: uffd_msg_arg,
}

impl uffd_msg {
    /// A message of zeros, to be read into.
    pub const EMPTY: uffd_msg = uffd_msg {
        event: 0,
        reserved1: 0,
        reserved2: 0,
        reserved3: 0,
        arg: uffd_msg_arg { reserved: [0; 3] },
    };
}

const ARG: usize = offset_of!(uffd_msg, arg);

/// Size of [`uffd_msg`] and where its fields lie, by their names in the kernel header.
pub const MESSAGE_LAYOUT: Layout = Layout {
    name: "uffd_msg",
    size: size_of::<uffd_msg>(),
    fields: &[
        ("event", offset_of!(uffd_msg, event), 1),
        (
            "arg.pagefault.flags",
            ARG + offset_of!(uffd_msg_pagefault, flags),
            8,
        ),
        (
            "arg.pagefault.address",
            ARG + offset_of!(uffd_msg_pagefault, address),
            8,
        ),
        (
            "arg.pagefault.feat.ptid",
            ARG + offset_of!(uffd_msg_pagefault, feat),
            4,
        ),
        ("arg.fork.ufd", ARG + offset_of!(uffd_msg_fork, ufd), 4),
        ("arg.remap.from", ARG + offset_of!(uffd_msg_remap, from), 8),
        ("arg.remap.to", ARG + offset_of!(uffd_msg_remap, to), 8),
        ("arg.remap.len", ARG + offset_of!(uffd_msg_remap, len), 8),
        (
            "arg.remove.start",
            ARG + offset_of!(uffd_msg_remove, start),
            8,
        ),
        ("arg.remove.end", ARG + offset_of!(uffd_msg_remove, end), 8),
    ],
};

// The kernel declares the message packed; the natural layout is the same 32 bytes.
const _: () = assert!(size_of::<uffd_msg>() == 32);
const _: () = assert!(size_of::<pm_scan_arg>() == 0x60);

/// The names of the feature bits in `mask`, for messages to people.
pub fn feature_names(mask: u64) -> Vec<String> {
    (0..64)
        .filter(|bit| mask & (1 << bit) != 0)
        .map(|bit| {
            CONSTANTS
                .iter()
                .find(|(name, value)| name.starts_with("UFFD_FEATURE_") && *value == 1 << bit)
                .map_or_else(|| format!("bit {bit}"), |(name, _)| (*name).to_owned())
        })
        .collect()
}
