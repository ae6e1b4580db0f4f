//! What can go wrong, in sentences for the person who asked.

use std::fmt;

/// Why a call failed.
#[derive(Debug, Clone)]
pub enum Error {
    /// The request itself makes no sense.
    Invalid(String),
    /// A system call failed.
    Os {
        /// What was being done.
        call: &'static str,
        /// The kernel's error number.
        errno: i32,
        /// What to do about it.
        advice: String,
    },
    /// The store failed.
    Store {
        /// The store's name.
        store: String,
        /// "read", "write", "sync" or "punch".
        what: &'static str,
        /// Offset in the store, bytes.
        offset: u64,
        /// Length, bytes.
        len: u64,
        /// The store's error number, 0 if it has none.
        errno: i32,
        /// The store's own words.
        message: String,
    },
    /// The bytes could not be had before and are marked so.
    Poisoned {
        /// Offset in the region, bytes.
        offset: u64,
        /// Length, bytes.
        len: u64,
        /// The first error.
        cause: String,
    },
    /// The memory limit does not allow it.
    Memory {
        /// Bytes asked for.
        asked: u64,
        /// The limit, bytes.
        limit: u64,
        /// What was asked.
        what: String,
    },
    /// The region is closed.
    Closed,
    /// The region belongs to the process that opened it.
    Forked,
    /// The region is read-only.
    ReadOnly,
}

impl Error {
    /// The last error of the C library, as the failure of `call`.
    pub(crate) fn last_os(call: &'static str, advice: impl Into<String>) -> Error {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Error::Os {
            call,
            errno,
            advice: advice.into(),
        }
    }

    pub(crate) fn store(
        store: &dyn userfault_store::Store,
        what: &'static str,
        offset: u64,
        len: u64,
        error: &std::io::Error,
    ) -> Error {
        Error::Store {
            store: store.name(),
            what,
            offset,
            len,
            errno: userfault_store::errno(error),
            message: error.to_string(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(text) => f.write_str(text),
            Error::Os { call, errno, advice } => {
                let reason = std::io::Error::from_raw_os_error(*errno);
                write!(f, "{call} failed: {reason}")?;
                if advice.is_empty() { Ok(()) } else { write!(f, "; {advice}") }
            }
            Error::Store { store, what, offset, len, message, .. } => {
                write!(f, "{store}: {what} of {len} bytes at offset {offset} failed: {message}")
            }
            Error::Poisoned { offset, len, cause } => write!(
                f,
                "the {len} bytes at offset {offset} could not be had: {cause}; mend the store and call \
                 heal({offset}, {len})"
            ),
            Error::Memory { asked, limit, what } => write!(
                f,
                "{what} needs {asked} bytes in memory at once, the limit leaves {limit}; raise it with \
                 set_memory_limit or ask for less"
            ),
            Error::Closed => f.write_str("the region is closed"),
            Error::Forked => f.write_str(
                "the region belongs to the process that opened it and cannot be used after fork(); open the \
                 file again in this process",
            ),
            Error::ReadOnly => f.write_str("the region was opened read-only; open it with mode \"r+\" to write"),
        }
    }
}

impl std::error::Error for Error {}
