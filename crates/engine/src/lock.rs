//! Locks that a fork leaves usable: each is a word of its own, and nothing beside it.
//!
//! A child of fork() has copies of all locks and of none of the threads that hold them or sleep on them. The
//! engine of a child begins with new locks, so that does no harm, as long as a lock is all in one place.
//! Locks that keep their sleepers in a table of the process (as `parking_lot` does) break there: the table
//! of the child names threads that are gone, whose stacks its own threads are given; it was seen to hang
//! and can crash as soon as the child starts a few threads. The standard library's locks sleep on their own word.
//!
//! A thread that holds one is not interrupted by a signal whose handler might touch a region (see
//! [`signals::shield`]): the engine's threads may need the same lock before they can answer that touch.
//!
//! They are wrapped so that a lock whose holder panicked is as good as any: a panic of the engine ends the
//! process (see `threads`), and a panic of a test must not hide behind a second one.

use std::ops::{Deref, DerefMut};
use std::sync::{self, PoisonError, TryLockError, WaitTimeoutResult};
use std::time::{Duration, Instant};

use crate::signals::{self, Shield};

/// Mutual exclusion.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

/// A held [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'a, T: ?Sized> {
    /// Empty only inside of [`Condvar::wait`] and its kin.
    held: Option<sync::MutexGuard<'a, T>>,
    /// Let go of after the lock.
    _shield: Option<Shield>,
}

impl<T> Mutex<T> {
    /// A free lock over `value`.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(sync::Mutex::new(value))
    }
}

impl<T> Mutex<T> {
    /// Waits for the lock and takes it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let shield = signals::shield();
        MutexGuard {
            held: Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)),
            _shield: shield,
        }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let shield = signals::shield();
        let held = match self.0.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(MutexGuard {
            held: Some(held),
            _shield: shield,
        })
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("held")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("held")
    }
}

/// Sleeping until somebody notifies.
#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    /// Nobody sleeps on it.
    pub const fn new() -> Condvar {
        Condvar(sync::Condvar::new())
    }

    /// Wakes one sleeper.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all sleepers.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }

    /// Lets go of the lock, sleeps until somebody notifies, and takes the lock again.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.held.take().expect("held");
        guard.held = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
    }

    /// As [`Condvar::wait`], at most so long.
    pub fn wait_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        at_most: Duration,
    ) -> WaitTimeoutResult {
        let held = guard.held.take().expect("held");
        let (held, result) = self
            .0
            .wait_timeout(held, at_most)
            .unwrap_or_else(PoisonError::into_inner);
        guard.held = Some(held);
        result
    }

    /// As [`Condvar::wait`], at most until then.
    pub fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        until: Instant,
    ) -> WaitTimeoutResult {
        self.wait_for(guard, until.saturating_duration_since(Instant::now()))
    }
}

/// Many readers or one writer.
#[derive(Debug, Default)]
pub struct RwLock<T>(sync::RwLock<T>);

/// An [`RwLock`] held for reading.
#[derive(Debug)]
pub struct RwLockReadGuard<'a, T: ?Sized> {
    held: sync::RwLockReadGuard<'a, T>,
    _shield: Option<Shield>,
}

/// An [`RwLock`] held for writing.
#[derive(Debug)]
pub struct RwLockWriteGuard<'a, T: ?Sized> {
    held: sync::RwLockWriteGuard<'a, T>,
    _shield: Option<Shield>,
}

impl<T> RwLock<T> {
    /// A free lock over `value`.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock(sync::RwLock::new(value))
    }

    /// Waits until nobody writes.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        let shield = signals::shield();
        RwLockReadGuard {
            held: self.0.read().unwrap_or_else(PoisonError::into_inner),
            _shield: shield,
        }
    }

    /// For reading, if nobody writes or waits to.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        let shield = signals::shield();
        let held = match self.0.try_read() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(RwLockReadGuard {
            held,
            _shield: shield,
        })
    }

    /// Waits until nobody reads or writes.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        let shield = signals::shield();
        RwLockWriteGuard {
            held: self.0.write().unwrap_or_else(PoisonError::into_inner),
            _shield: shield,
        }
    }
}

impl<T: ?Sized> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.held
    }
}
