//! The three ways to get a userfaultfd.
//!
//! * The system call without flags: faults of user mode and of the kernel's own accesses (read(2) into the
//!   memory). Needs CAP_SYS_PTRACE, or the sysctl `vm.unprivileged_userfaultfd` set to 1.
//! * /dev/userfaultfd (Linux 6.1): the same without a capability, by the permissions of the device. It also
//!   passes a seccomp filter that forbids the system call.
//! * The system call with UFFD_USER_MODE_ONLY: everybody may; a system call that meets a missing page
//!   gets EFAULT.
//!
//! They are tried in this order, as far as the caller wants them. An error names all that was tried, and
//! the command that would mend it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use crate::abi::{UFFD_USER_MODE_ONLY, USERFAULTFD_IOC_NEW};
use crate::ioctl::last_errno;
use crate::negotiate::{Features, NegotiateError};

/// Whether faults that the kernel's own accesses raise must be served too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KernelFaults {
    /// Fail if the machine does not allow it.
    Required,
    /// Take it if the machine allows it.
    #[default]
    Preferred,
    /// Ask for UFFD_USER_MODE_ONLY.
    Unwanted,
}

/// How a userfaultfd was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// userfaultfd(2).
    Syscall,
    /// The ioctl of /dev/userfaultfd.
    Device,
    /// Somebody handed it over.
    Given,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Syscall => "the system call userfaultfd(2)",
            Way::Device => "/dev/userfaultfd",
            Way::Given => "a descriptor handed over",
        })
    }
}

/// What the caller asks for.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Faults of the kernel's own accesses.
    pub kernel_faults: KernelFaults,
    /// O_NONBLOCK: needed for poll(2), selectors and [`Uffd::wait`].
    pub nonblocking: bool,
    /// Try this way only; `None`: whatever works.
    pub way: Option<Way>,
    /// Features without which there is no use in going on.
    pub require: u64,
    /// Features to switch on where the kernel has them.
    pub prefer: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            kernel_faults: KernelFaults::Preferred,
            nonblocking: true,
            way: None,
            require: 0,
            prefer: 0,
        }
    }
}

/// One try that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// How.
    pub way: Way,
    /// With UFFD_USER_MODE_ONLY.
    pub user_mode_only: bool,
    /// Why not.
    pub errno: i32,
}

/// No userfaultfd.
#[derive(Debug)]
pub enum OpenError {
    /// No way to a descriptor worked.
    Refused {
        /// All that was tried, in order.
        attempts: Vec<Attempt>,
    },
    /// There was a descriptor, but not the features.
    Negotiate(NegotiateError),
}

impl OpenError {
    /// The errno that says most: that of the last try.
    pub fn errno(&self) -> i32 {
        match self {
            OpenError::Refused { attempts } => attempts.last().map_or(libc::EINVAL, |a| a.errno),
            OpenError::Negotiate(error) => error.errno(),
        }
    }

    /// What would mend it: a command, or a sentence where no command would.
    pub fn advice(&self) -> String {
        match self {
            OpenError::Refused { attempts } => advice(attempts),
            OpenError::Negotiate(error) => error.advice(),
        }
    }
}

fn advice(attempts: &[Attempt]) -> String {
    let all = |errnos: &[i32]| attempts.iter().all(|a| errnos.contains(&a.errno));
    let has = |errno: i32| attempts.iter().any(|a| a.errno == errno);
    if has(libc::EMFILE) {
        return "too many files are open: ulimit -n 65536".to_owned();
    }
    if all(&[libc::ENOSYS, libc::ENOENT, libc::ENXIO]) {
        return "this kernel was built without CONFIG_USERFAULTFD; boot one that has it".to_owned();
    }
    let device = "let the device in: sudo setfacl -m u:$(id -un):rw /dev/userfaultfd \
                  (in a container: --device /dev/userfaultfd)";
    if attempts
        .iter()
        .any(|a| a.way == Way::Syscall && a.user_mode_only)
    {
        // Everybody may make such a descriptor: only a filter refuses it.
        return format!("a seccomp filter forbids userfaultfd(2); {device}");
    }
    format!("{device}, or: sudo sysctl vm.unprivileged_userfaultfd=1, or run with CAP_SYS_PTRACE")
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::Refused { attempts } => {
                f.write_str("no userfaultfd: ")?;
                for (i, attempt) in attempts.iter().enumerate() {
                    let separator = if i == 0 { "" } else { "; " };
                    let mode = if attempt.user_mode_only {
                        " with UFFD_USER_MODE_ONLY"
                    } else {
                        ""
                    };
                    let why = io::Error::from_raw_os_error(attempt.errno);
                    write!(f, "{separator}{}{mode}: {why}", attempt.way)?;
                }
                write!(f, ". To mend it, {}", self.advice())
            }
            OpenError::Negotiate(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for OpenError {}

/// One userfaultfd, its handshake done.
///
/// It serves the memory of the process that made it, also when another process holds it. Dropping the last
/// copy of the descriptor unregisters everything and lets every sleeper go on into zeros: keep it open
/// until the memory is unmapped or made inaccessible.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    way: Way,
    user_mode_only: bool,
    features: Features,
}

impl Uffd {
    /// Opens a userfaultfd and shakes hands.
    pub fn open(options: &OpenOptions) -> Result<Uffd, OpenError> {
        let (fd, way, user_mode_only) = open_descriptor(options)?;
        let features = Features::negotiate(fd.as_fd(), options.require, options.prefer)
            .map_err(OpenError::Negotiate)?;
        Ok(Uffd {
            fd,
            way,
            user_mode_only,
            features,
        })
    }

    /// Takes a descriptor over whose handshake is done: a fork message's, or one passed by another process.
    /// `features` are the ones that were asked for in the handshake (the kernel does not tell them again).
    pub fn from_fd(fd: OwnedFd, features: u64) -> Uffd {
        Uffd {
            fd,
            way: Way::Given,
            user_mode_only: false,
            features: Features {
                enabled: features,
                offered: 0,
                ioctls: 0,
            },
        }
    }

    /// As [`Uffd::from_fd`], with the features that /proc tells, and non-blocking from here on (for everybody who
    /// holds a copy of the descriptor). EINVAL: it is no userfaultfd, or its handshake was never done.
    pub fn given(fd: OwnedFd) -> io::Result<Uffd> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let features = given_features(&info).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: both calls take numbers and touch no memory.
        let set = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Uffd::from_fd(fd, features))
    }

    /// How it was made.
    pub fn way(&self) -> Way {
        self.way
    }

    /// True if system calls on missing pages wait too; false if they get EFAULT. A descriptor that was
    /// handed over says true, as its flags cannot be asked for.
    pub fn kernel_faults(&self) -> bool {
        !self.user_mode_only
    }

    /// What the handshake agreed on.
    pub fn features(&self) -> Features {
        self.features
    }

    /// True if all bits of `mask` are switched on.
    pub fn has(&self, mask: u64) -> bool {
        self.features.enabled & mask == mask
    }

    /// Another descriptor of the same userfaultfd.
    pub fn try_clone(&self) -> io::Result<Uffd> {
        Ok(Uffd {
            fd: self.fd.try_clone()?,
            ..*self
        })
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> OwnedFd {
        uffd.fd
    }
}

impl IntoRawFd for Uffd {
    fn into_raw_fd(self) -> RawFd {
        self.fd.into_raw_fd()
    }
}

/// The features in the fdinfo of a userfaultfd: `API: aa:FEATURES:IOCTLS`, in hexadecimal. The kernel's own mark
/// for a handshake that is done is bit 31.
fn given_features(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()?;
    (features & DONE != 0).then_some(features & !DONE)
}

/// See [`given_features`].
const DONE: u64 = 1 << 31;

/// The tries in order: kernel faults first if they are wanted, the system call before the device.
fn open_descriptor(options: &OpenOptions) -> Result<(OwnedFd, Way, bool), OpenError> {
    let scopes: &[bool] = match options.kernel_faults {
        KernelFaults::Required => &[false],
        KernelFaults::Preferred => &[false, true],
        KernelFaults::Unwanted => &[true],
    };
    let mut attempts = Vec::new();
    for &user_mode_only in scopes {
        for way in [Way::Syscall, Way::Device] {
            if options.way.is_some_and(|only| only != way) {
                continue;
            }
            let mut flags = libc::O_CLOEXEC;
            if options.nonblocking {
                flags |= libc::O_NONBLOCK;
            }
            if user_mode_only {
                flags |= UFFD_USER_MODE_ONLY as i32;
            }
            match create(way, flags) {
                Ok(fd) => return Ok((fd, way, user_mode_only)),
                Err(errno) => attempts.push(Attempt {
                    way,
                    user_mode_only,
                    errno,
                }),
            }
        }
    }
    Err(OpenError::Refused { attempts })
}

/// Makes one descriptor in one way, without a handshake.
pub(crate) fn create(way: Way, flags: i32) -> Result<OwnedFd, i32> {
    let fd = match way {
        // SAFETY: the call takes one integer.
        Way::Syscall => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as RawFd },
        Way::Device => {
            let path = c"/dev/userfaultfd";
            // SAFETY: the path is a terminated string.
            let device = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
            if device < 0 {
                return Err(last_errno());
            }
            // SAFETY: open(2) just returned it and nobody else has it.
            let device = unsafe { OwnedFd::from_raw_fd(device) };
            // SAFETY: this request takes an integer by value and touches no memory.
            unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) }
        }
        Way::Given => return Err(libc::EINVAL),
    };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel just made it and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
