//! UFFDIO_API: one handshake for each descriptor.
//!
//! The kernel's rules, which make asking less simple than it looks:
//!
//! * Its answer is a menu, always the same one, and not what was switched on: that is what was asked for.
//! * An unknown bit fails the whole call with EINVAL and zeroes the struct, but the descriptor can be asked
//!   again. Nothing says which bit it was.
//! * A success is final: no second call succeeds. So the menu cannot be read first on the same descriptor.
//! * EVENT_FORK without CAP_SYS_PTRACE fails with EPERM, and asking again without it works.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::abi::*;
use crate::ioctl;
use crate::open::{Way, create};

/// What a handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Switched on.
    pub enabled: u64,
    /// All that the kernel has.
    pub offered: u64,
    /// The mask of ioctls that the descriptor takes.
    pub ioctls: u64,
}

/// Why a handshake failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NegotiateError {
    /// The kernel lacks required features.
    Missing {
        /// The bits it lacks.
        features: u64,
    },
    /// EVENT_FORK was required and is not permitted.
    ForkNotPermitted,
    /// Anything else, for instance a descriptor whose handshake is already done (EINVAL).
    Refused {
        /// The errno of UFFDIO_API.
        errno: i32,
    },
}

impl NegotiateError {
    /// The errno of the last UFFDIO_API.
    pub fn errno(&self) -> i32 {
        match self {
            NegotiateError::Missing { .. } => libc::EINVAL,
            NegotiateError::ForkNotPermitted => libc::EPERM,
            NegotiateError::Refused { errno } => *errno,
        }
    }

    /// What would mend it.
    pub fn advice(&self) -> String {
        match self {
            NegotiateError::Missing { .. } => {
                "boot a newer kernel (6.8 has all features)".to_owned()
            }
            NegotiateError::ForkNotPermitted => {
                "run with CAP_SYS_PTRACE, for instance: sudo setcap cap_sys_ptrace+ep PROGRAM"
                    .to_owned()
            }
            NegotiateError::Refused { .. } => {
                "use a fresh descriptor: each takes one handshake".to_owned()
            }
        }
    }
}

impl fmt::Display for NegotiateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NegotiateError::Missing { features } => {
                write!(
                    f,
                    "this kernel's userfaultfd lacks {}",
                    feature_names(*features).join(", ")
                )?;
            }
            NegotiateError::ForkNotPermitted => {
                f.write_str("UFFD_FEATURE_EVENT_FORK needs CAP_SYS_PTRACE")?;
            }
            NegotiateError::Refused { errno } => {
                write!(
                    f,
                    "UFFDIO_API failed: {}",
                    io::Error::from_raw_os_error(*errno)
                )?;
            }
        }
        write!(f, ". To mend it, {}", self.advice())
    }
}

impl std::error::Error for NegotiateError {}

/// One UFFDIO_API, nothing retried. On failure the struct is the kernel's, zeroed.
pub fn handshake(fd: BorrowedFd<'_>, api: u64, features: u64) -> Result<Features, i32> {
    let mut argument = uffdio_api {
        api,
        features,
        ioctls: 0,
    };
    // SAFETY: the struct is the one of this request, and the call reads and writes no other memory.
    match unsafe { ioctl::call(fd.as_raw_fd(), UFFDIO_API, &mut argument) } {
        0 => Ok(Features {
            enabled: features,
            offered: argument.features,
            ioctls: argument.ioctls,
        }),
        errno => Err(errno),
    }
}

/// All features that this kernel has, learned on a descriptor that is thrown away.
pub fn offered() -> Result<u64, i32> {
    let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY as i32;
    let fd = create(Way::Syscall, flags).or_else(|_| create(Way::Device, flags))?;
    handshake(fd.as_fd(), UFFD_API, 0).map(|features| features.offered)
}

impl Features {
    /// Asks for everything; where that is refused, asks again for what can be had.
    pub fn negotiate(
        fd: BorrowedFd<'_>,
        require: u64,
        prefer: u64,
    ) -> Result<Features, NegotiateError> {
        let mut ask = require | prefer;
        let mut known = false;
        loop {
            match handshake(fd, UFFD_API, ask) {
                Ok(features) => return Ok(features),
                Err(libc::EPERM) if ask & UFFD_FEATURE_EVENT_FORK != 0 => {
                    if require & UFFD_FEATURE_EVENT_FORK != 0 {
                        return Err(NegotiateError::ForkNotPermitted);
                    }
                    ask &= !UFFD_FEATURE_EVENT_FORK;
                }
                // Some bit is unknown here, or the handshake is already done. The menu of a second
                // descriptor says which bit; if it knows them all, the descriptor itself is at fault.
                Err(libc::EINVAL) if !known => {
                    let menu = offered().map_err(|errno| NegotiateError::Refused { errno })?;
                    if require & !menu != 0 {
                        return Err(NegotiateError::Missing {
                            features: require & !menu,
                        });
                    }
                    ask &= menu;
                    known = true;
                }
                Err(errno) => return Err(NegotiateError::Refused { errno }),
            }
        }
    }
}
