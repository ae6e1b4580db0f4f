//! A value that lives until the process ends.
//!
//! Unsafe: turns a pointer that was leaked here back into a reference.

use std::sync::atomic::{AtomicPtr, Ordering};

/// Leaks `value` and publishes it.
pub(crate) fn publish<T: Sync>(cell: &AtomicPtr<T>, value: T) -> &'static T {
    let leaked: &'static mut T = Box::leak(Box::new(value));
    let pointer: *mut T = leaked;
    cell.store(pointer, Ordering::Release);
    // SAFETY: the box was just leaked, so it is valid for ever, and from here on only shared.
    unsafe { &*pointer }
}

/// What was published last.
pub(crate) fn get<T: Sync>(cell: &AtomicPtr<T>) -> Option<&'static T> {
    // SAFETY: the cell holds null or a pointer that `publish` leaked.
    unsafe { cell.load(Ordering::Acquire).as_ref() }
}
