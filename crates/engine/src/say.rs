//! One line on stderr.
//!
//! Unsafe: write(2), since the standard library's stderr takes a lock that a sleeping thread may hold.

/// Writes `line` and a newline in one call.
pub(crate) fn line(line: &str) {
    let text = format!("{line}\n");
    // SAFETY: the pointer and length are those of `text`. A short write loses the rest: there is nobody
    // to tell.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}
