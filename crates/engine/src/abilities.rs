//! What the running kernel can do for the engine, and what a test has it do without.
//!
//! Everything that Linux 5.19 has is required. What came later is used where it is there, and each has
//! something that takes its place:
//!
//! | name | since | without it |
//! |---|---|---|
//! | `continue_wp` | 6.4 | mapped writable, protected, and compared with what it held (`kernel`) |
//! | `poison` | 6.6 | a mapping of nothing over the block: a touch is SIGBUS all the same (`bar`) |
//! | `wp_async` | 6.7 | the first write to a page is a message (`protect`) |
//! | `aio` | 4.14, if allowed | a thread waits for each read (`flight`) |
//!
//! One more thing differs, and nothing takes its place: since 6.14 the kernel frees page tables whose whole span
//! is unmapped; before, they stay until the region is closed, and are counted for as long.
//!
//! USERFAULT_WITHOUT in the environment names those to do without, for instance "wp_async,poison". `hugetlb` in it
//! leaves the machine's pool of huge pages to others, who may need all of it: huge pages then come from a
//! private tmpfs. It is read once, when the engine comes to life.

use userfault_uffd::abi::{
    UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_HUGETLBFS,
    UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_POISON,
    UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED,
};
use userfault_uffd::{NegotiateError, OpenError, OpenOptions, Uffd};

use crate::error::Error;

/// Features without which nothing works (Linux 5.19).
pub(crate) const REQUIRED: u64 = UFFD_FEATURE_MISSING_SHMEM
    | UFFD_FEATURE_MISSING_HUGETLBFS
    | UFFD_FEATURE_MINOR_SHMEM
    | UFFD_FEATURE_MINOR_HUGETLBFS
    | UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_THREAD_ID;

/// The environment variable that names what to do without.
pub const WITHOUT: &str = "USERFAULT_WITHOUT";

/// What may be absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// The kernel notes a first write by itself, and PAGEMAP_SCAN tells of it.
    pub wp_async: bool,
    /// UFFDIO_CONTINUE can map write-protected.
    pub continue_protects: bool,
    /// UFFDIO_POISON.
    pub poison: bool,
    /// Unmapping all that a page table maps frees the table.
    pub frees_tables: bool,
    /// Pages may be taken from the machine's pool of huge pages.
    pub hugetlb: bool,
    /// Native asynchronous reads may be tried.
    pub aio: bool,
}

impl Abilities {
    const ALL: Abilities = Abilities {
        wp_async: true,
        continue_protects: true,
        poison: true,
        frees_tables: true,
        hugetlb: true,
        aio: true,
    };

    /// What is left when a list of names is taken away. An unknown name is an error: a test that misspells
    /// one would test nothing.
    fn without(names: &str) -> Result<Abilities, Error> {
        let mut left = Abilities::ALL;
        for name in names
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
        {
            match name {
                "wp_async" => left.wp_async = false,
                "continue_wp" => left.continue_protects = false,
                "poison" => left.poison = false,
                "hugetlb" => left.hugetlb = false,
                "aio" => left.aio = false,
                _ => {
                    return Err(Error::Invalid(format!(
                        "{WITHOUT} names {name:?}; what can be done without is wp_async, continue_wp, poison, \
                         hugetlb and aio"
                    )));
                }
            }
        }
        Ok(left)
    }

    fn and(self, other: Abilities) -> Abilities {
        Abilities {
            wp_async: self.wp_async && other.wp_async,
            continue_protects: self.continue_protects && other.continue_protects,
            poison: self.poison && other.poison,
            frees_tables: self.frees_tables && other.frees_tables,
            hugetlb: self.hugetlb && other.hugetlb,
            aio: self.aio && other.aio,
        }
    }

    /// The names of what is done without.
    pub fn missing(self) -> Vec<&'static str> {
        [
            (self.wp_async, "wp_async"),
            (self.continue_protects, "continue_wp"),
            (self.poison, "poison"),
            (self.hugetlb, "hugetlb"),
            (self.aio, "aio"),
        ]
        .into_iter()
        .filter_map(|(there, name)| (!there).then_some(name))
        .collect()
    }

    /// A userfaultfd for paging, and what can be done with it.
    pub(crate) fn open() -> Result<(Uffd, Abilities), Error> {
        let asked = Abilities::without(&std::env::var(WITHOUT).unwrap_or_default())?;
        let mut prefer = UFFD_FEATURE_WP_UNPOPULATED;
        for (wanted, feature) in [
            (asked.wp_async, UFFD_FEATURE_WP_ASYNC),
            (asked.poison, UFFD_FEATURE_POISON),
        ] {
            prefer |= if wanted { feature } else { 0 };
        }
        let options = OpenOptions {
            nonblocking: false,
            require: REQUIRED,
            prefer,
            ..OpenOptions::default()
        };
        let uffd = Uffd::open(&options).map_err(|error| refused(&error))?;
        let found = Abilities {
            wp_async: uffd.has(UFFD_FEATURE_WP_ASYNC),
            continue_protects: uffd.continue_protects(),
            poison: uffd.has(UFFD_FEATURE_POISON),
            frees_tables: frees_tables(
                &std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default(),
            ),
            hugetlb: true,
            // Whether it may be used is found out by the first read in flight.
            aio: true,
        };
        Ok((uffd, found.and(asked)))
    }
}

/// CONFIG_PT_RECLAIM, which no file or call tells of: Linux 6.14, on x86-64 only.
fn frees_tables(release: &str) -> bool {
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    cfg!(target_arch = "x86_64") && version >= (6, 14)
}

fn refused(error: &OpenError) -> Error {
    let advice = match error {
        OpenError::Negotiate(NegotiateError::Missing { .. }) => {
            format!("{error}. Paging needs Linux 5.19 or newer; `userfault doctor` says more")
        }
        _ => format!("{error}; `userfault doctor` says more"),
    };
    Error::Os {
        call: "opening a userfaultfd",
        errno: error.errno(),
        advice,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_missing() {
        assert_eq!(
            Abilities::without("").unwrap().missing(),
            Vec::<&str>::new()
        );
        assert_eq!(
            Abilities::without("poison, wp_async").unwrap().missing(),
            ["wp_async", "poison"]
        );
        assert_eq!(
            Abilities::without("continue_wp").unwrap().missing(),
            ["continue_wp"]
        );
        assert_eq!(
            Abilities::without("hugetlb").unwrap().missing(),
            ["hugetlb"]
        );
    }

    #[test]
    fn page_tables_are_freed_from_the_version_on_that_can() {
        for (release, frees) in [
            ("6.1.0-56-amd64", false),
            ("6.12.117+deb12-amd64", false),
            ("6.14.0", true),
            ("6.18.3", true),
            ("7.0.0-rc1", true),
        ] {
            assert_eq!(
                frees_tables(release),
                frees && cfg!(target_arch = "x86_64"),
                "{release}"
            );
        }
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let error = Abilities::without("wp_sync").unwrap_err().to_string();
        assert!(error.contains("\"wp_sync\""), "{error}");
    }

    #[test]
    fn a_kernel_that_is_too_old_is_told_what_is_needed_and_what_it_lacks() {
        let error = refused(&OpenError::Negotiate(NegotiateError::Missing {
            features: UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
        }))
        .to_string();
        for part in ["Linux 5.19", "MINOR_SHMEM", "WP_HUGETLBFS_SHMEM"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
