//! What can go wrong with a point, in sentences for the person who asked.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Why a call, or a point, failed.
#[derive(Debug, Clone)]
pub enum Error {
    /// The request makes no sense.
    Invalid(String),
    /// A file could not be read or written.
    Io {
        /// Which.
        path: PathBuf,
        /// What was being done.
        call: &'static str,
        /// Why not.
        error: Arc<io::Error>,
    },
    /// A file does not hold what its format says.
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Memory of the program could not be read or tracked.
    Memory(String),
    /// Somebody else saves into the same directory.
    InUse(PathBuf),
    /// Nothing was written for so long.
    TimedOut(Duration),
    /// There is no such point.
    NoPoint(String),
    /// It is closed.
    Closed,
    /// It belongs to the process that made it.
    Forked,
}

impl Error {
    /// A failed call on a file.
    pub(crate) fn io(path: &Path, call: &'static str, error: io::Error) -> Error {
        Error::Io {
            path: path.to_path_buf(),
            call,
            error: Arc::new(error),
        }
    }

    /// A file that is not what it should be.
    pub(crate) fn corrupt(path: &Path, detail: impl Into<String>) -> Error {
        Error::Corrupt {
            path: path.to_path_buf(),
            detail: detail.into(),
        }
    }
}

impl From<userfault_engine::Error> for Error {
    fn from(error: userfault_engine::Error) -> Error {
        match error {
            userfault_engine::Error::Forked => Error::Forked,
            userfault_engine::Error::Closed => Error::Closed,
            other => Error::Memory(other.to_string()),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(text) | Error::Memory(text) | Error::NoPoint(text) => f.write_str(text),
            Error::Io { path, call, error } => {
                write!(f, "{}: {call} failed: {error}", path.display())
            }
            Error::Corrupt { path, detail } => write!(f, "{}: {detail}", path.display()),
            Error::InUse(path) => write!(
                f,
                "{}: another Checkpointer saves into this directory; two would remove each other's files",
                path.display()
            ),
            Error::TimedOut(limit) => write!(
                f,
                "nothing was written for {} s, so the point was given up; the disk does not answer",
                limit.as_secs_f64()
            ),
            Error::Closed => f.write_str("the checkpointer is closed"),
            Error::Forked => f.write_str(
                "the checkpointer belongs to the process that made it and cannot be used after fork()",
            ),
        }
    }
}

impl std::error::Error for Error {}
