//! Errors of the crates below as Python's exceptions.

use std::io;
use std::path::Path;

use pyo3::exceptions::{PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use userfault_engine::Error;
use userfault_store::OpenError;

/// A class of `userfault.errors`, which is Python's own file: its docstrings are read there.
fn class<'py>(
    py: Python<'py>,
    cell: &'static PyOnceLock<Py<PyType>>,
    name: &str,
) -> PyResult<Bound<'py, PyType>> {
    cell.import(py, "userfault.errors", name).cloned()
}

/// An exception of `userfault.errors`; if that cannot be had, the reason why.
fn raise(
    py: Python<'_>,
    cell: &'static PyOnceLock<Py<PyType>>,
    name: &str,
    arguments: impl FnOnce(Bound<'_, PyType>) -> PyResult<Bound<'_, PyAny>>,
) -> PyErr {
    match class(py, cell, name).and_then(arguments) {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// A store's failure as `userfault.StoreError`.
pub fn store_error(
    py: Python<'_>,
    store: &str,
    what: &str,
    (offset, len): (u64, u64),
    errno: i32,
    message: &str,
) -> PyErr {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    raise(py, &CLASS, "StoreError", |class| {
        let value = class.call1((errno, message, store))?;
        value.setattr("what", what)?;
        value.setattr("offset", offset)?;
        value.setattr("length", len)?;
        Ok(value)
    })
}

/// An I/O error of one call on a store as `userfault.StoreError`.
pub fn io_error(
    py: Python<'_>,
    store: &str,
    what: &str,
    range: (u64, u64),
    error: &io::Error,
) -> PyErr {
    let (offset, len) = range;
    let message = match what {
        "sync" => format!("sync failed: {error}"),
        _ => format!("{what} of {len} bytes at {offset} failed: {error}"),
    };
    // A store's own error, such as that of a truncated file, has a text and no number.
    let errno = match userfault_store::errno(error) {
        0 => libc::EIO,
        errno => errno,
    };
    store_error(py, store, what, range, errno, &message)
}

/// A file that cannot be opened: `userfault.InUseError`, or the OSError that open() would raise.
pub fn open_error(py: Python<'_>, error: &OpenError) -> PyErr {
    match error {
        OpenError::InUse { path, .. } => in_use(py, &error.to_string(), path.as_os_str()),
        OpenError::Kind { path } if path.is_dir() => {
            os_error(libc::EISDIR, "Is a directory", Some(path))
        }
        OpenError::Kind { .. } => PyValueError::new_err(error.to_string()),
        OpenError::Io { error: cause, .. } | OpenError::Scratch { error: cause, .. }
            if cause.kind() == io::ErrorKind::InvalidInput && cause.raw_os_error().is_none() =>
        {
            // A path with a NUL in it, for instance: no system call was asked.
            PyValueError::new_err(error.to_string())
        }
        OpenError::Io {
            path,
            call: "open",
            error: cause,
        } => {
            let errno = cause.raw_os_error().unwrap_or(libc::EIO);
            failed_call(&io::Error::from_raw_os_error(errno), cause, path)
        }
        OpenError::Scratch {
            folder,
            error: cause,
            ..
        } => failed_call(error, cause, folder),
        OpenError::Io {
            path, error: cause, ..
        } => failed_call(error, cause, path),
    }
}

/// A failed system call in the words of `text`.
fn failed_call(text: &impl ToString, cause: &io::Error, path: &Path) -> PyErr {
    let errno = cause.raw_os_error().unwrap_or(libc::EIO);
    let text = text.to_string();
    // Rust adds "(os error 2)", which Python says in its own way.
    let text = text
        .strip_suffix(&format!(" (os error {errno})"))
        .unwrap_or(&text);
    os_error(errno, text, Some(path))
}

/// An error of the engine as the exception that a Python programmer expects.
pub fn engine_error(py: Python<'_>, error: &Error) -> PyErr {
    static POISONED: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static UNSUPPORTED: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let text = error.to_string();
    match error {
        Error::Invalid(_) => PyValueError::new_err(text),
        Error::Os { errno, .. } => os_error(*errno, &text, None),
        Error::Store {
            store,
            what,
            offset,
            len,
            errno,
            message,
        } => {
            let text = match *what {
                "sync" => format!("sync failed: {message}"),
                _ => format!("{what} of {len} bytes at {offset} failed: {message}"),
            };
            let errno = if *errno == 0 { libc::EIO } else { *errno };
            store_error(py, store, what, (*offset, *len), errno, &text)
        }
        Error::Poisoned { offset, len, .. } => raise(py, &POISONED, "PoisonedError", |class| {
            let value = class.call1((text,))?;
            value.setattr("offset", *offset)?;
            value.setattr("length", *len)?;
            Ok(value)
        }),
        Error::Memory { .. } => PyMemoryError::new_err(text),
        Error::Closed => closed(),
        Error::Forked => PyRuntimeError::new_err(text),
        Error::ReadOnly => match UNSUPPORTED.import(py, "io", "UnsupportedOperation") {
            Ok(class) => PyErr::from_type(class.clone(), text),
            Err(error) => error,
        },
    }
}

/// An error of a save or of a point as the exception that a Python programmer expects.
pub fn snapshot_error(py: Python<'_>, error: &userfault_snapshot::Error) -> PyErr {
    use userfault_snapshot::Error as Snapshot;
    static CORRUPT: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let text = error.to_string();
    match error {
        Snapshot::Invalid(_) | Snapshot::Closed => PyValueError::new_err(text),
        Snapshot::Io { path, error, .. } => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            os_error(errno, &text, Some(path))
        }
        Snapshot::Corrupt { .. } => {
            raise(py, &CORRUPT, "CorruptError", |class| class.call1((text,)))
        }
        Snapshot::Memory(_) | Snapshot::Forked => PyRuntimeError::new_err(text),
        Snapshot::InUse(path) => in_use(py, &text, path.as_os_str()),
        Snapshot::TimedOut(_) => pyo3::exceptions::PyTimeoutError::new_err(text),
        Snapshot::NoPoint(_) => os_error(libc::ENOENT, &text, None),
    }
}

/// What every file-like object of Python says once it is closed.
pub fn closed() -> PyErr {
    PyValueError::new_err("I/O operation on closed region")
}

/// Somebody in this process writes the store already.
pub fn in_use_error(py: Python<'_>, name: &str) -> PyErr {
    let text = "a writable region of this store is open already: two writers would lose each other's bytes. \
                Close the other one, open this one read-only, or pass locking=False if you see to it that they \
                never write the same pages";
    in_use(py, text, name)
}

fn in_use(py: Python<'_>, text: &str, file: impl for<'p> IntoPyObject<'p>) -> PyErr {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    raise(py, &CLASS, "InUseError", |class| {
        class.call1((libc::EAGAIN, text, file))
    })
}

/// An OSError; Python picks its subclass by the number.
pub fn os_error(errno: i32, text: &str, path: Option<&Path>) -> PyErr {
    match path {
        Some(path) => PyOSError::new_err((errno, text.to_owned(), path.as_os_str().to_owned())),
        None => PyOSError::new_err((errno, text.to_owned())),
    }
}
