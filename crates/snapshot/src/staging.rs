//! Memory for what was copied aside at a cut, until it is written.
//!
//! Unsafe: one anonymous mapping, lent out in chunks.
//!
//! It lies on huge pages where the machine has them, so that copying into it for the first time costs
//! little, and chunks that were used stay hot: the last one given back is the next one lent.

use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use userfault_engine::lock::{Condvar, Mutex};

/// Bytes of a chunk.
pub const CHUNK: usize = 2 << 20;

struct State {
    /// The last one is the next one lent.
    free: Vec<usize>,
    /// Which chunks may have memory.
    touched: Vec<bool>,
    used: usize,
    peak: usize,
}

impl State {
    fn lend(&mut self) -> Option<usize> {
        let number = self.free.pop()?;
        self.touched[number] = true;
        self.used += 1;
        self.peak = self.peak.max(self.used);
        Some(number)
    }
}

/// A bounded amount of memory, by chunks.
pub struct Staging {
    raw: usize,
    raw_len: usize,
    start: usize,
    chunks: usize,
    state: Mutex<State>,
    freed: Condvar,
}

impl Staging {
    /// At most `limit` bytes, at least two chunks. Fails if there is no address space.
    pub fn new(limit: usize) -> std::io::Result<Arc<Staging>> {
        let chunks = (limit / CHUNK).max(2);
        let raw_len = (chunks + 1) * CHUNK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the address; nothing is replaced.
        let raw = unsafe { libc::mmap(ptr::null_mut(), raw_len, rights, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = (raw as usize).next_multiple_of(CHUNK);
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] {
            // SAFETY: the range was just mapped. Advice only: without huge pages it is slower, and a child
            // that inherits it has a copy of nothing.
            unsafe { libc::madvise(raw, raw_len, advice) };
        }
        Ok(Arc::new(Staging {
            raw: raw as usize,
            raw_len,
            start,
            chunks,
            state: Mutex::new(State {
                free: (0..chunks).rev().collect(),
                touched: vec![false; chunks],
                used: 0,
                peak: 0,
            }),
            freed: Condvar::new(),
        }))
    }

    /// Bytes of all of it.
    pub fn len(&self) -> usize {
        self.chunks * CHUNK
    }

    /// Lends a chunk. Waits for one; `None` once `stop` says so.
    pub fn take(self: &Arc<Self>, stop: &dyn Fn() -> bool) -> Option<Chunk> {
        self.take_within(usize::MAX, stop)
    }

    /// As [`Staging::take`], and waits until fewer than `most` chunks are lent.
    pub fn take_within(self: &Arc<Self>, most: usize, stop: &dyn Fn() -> bool) -> Option<Chunk> {
        let mut state = self.state.lock();
        loop {
            if stop() {
                return None;
            }
            if state.used < most
                && let Some(number) = state.lend()
            {
                return Some(self.chunk(number));
            }
            self.freed.wait_for(&mut state, Duration::from_millis(20));
        }
    }

    /// Lends a chunk if one is free.
    pub fn try_take(self: &Arc<Self>) -> Option<Chunk> {
        let number = self.state.lock().lend()?;
        Some(self.chunk(number))
    }

    fn chunk(self: &Arc<Self>, number: usize) -> Chunk {
        Chunk {
            staging: self.clone(),
            number,
        }
    }

    /// Touches what a cut is going to need, so that it need not wait for zeroed pages. Bytes.
    pub fn warm(self: &Arc<Self>, bytes: usize) {
        let wanted = bytes.div_ceil(CHUNK).min(self.chunks);
        let mut held = Vec::new();
        for _ in 0..wanted {
            let mut state = self.state.lock();
            let Some(number) = state.free.pop() else {
                break;
            };
            state.touched[number] = true;
            drop(state);
            let mut chunk = self.chunk(number);
            for byte in chunk.iter_mut().step_by(4096) {
                *byte = 0;
            }
            held.push(chunk);
            self.state.lock().used += 1;
        }
        // Given back in the other order, so that the same ones are lent next.
        while let Some(chunk) = held.pop() {
            drop(chunk);
        }
    }

    /// The most bytes in use since the last call.
    pub fn take_peak(&self) -> usize {
        let mut state = self.state.lock();
        let peak = state.peak * CHUNK;
        state.peak = state.used;
        peak
    }

    /// Gives back what is not lent, but for so many bytes: the memory, not the right to it.
    pub fn cool(&self, but_for: usize) {
        loop {
            let number = {
                let mut state = self.state.lock();
                let kept = but_for.div_ceil(CHUNK).saturating_sub(state.used);
                let most = state.free.len().saturating_sub(kept);
                let Some(at) = (0..most).find(|at| state.touched[state.free[*at]]) else {
                    return;
                };
                let number = state.free.remove(at);
                state.touched[number] = false;
                number
            };
            let chunk = self.start + number * CHUNK;
            // SAFETY: the range of a chunk that is not in the list of free ones, so that nobody else has it; whoever
            // gets it next finds zeros, and expects nothing.
            unsafe { libc::madvise(chunk as *mut libc::c_void, CHUNK, libc::MADV_DONTNEED) };
            self.state.lock().free.insert(0, number);
            self.freed.notify_all();
        }
    }

    /// Wakes whoever waits, to look whether to stop.
    pub fn kick(&self) {
        self.freed.notify_all();
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and every chunk holds the value.
        unsafe { libc::munmap(self.raw as *mut libc::c_void, self.raw_len) };
    }
}

/// A part of the staging memory.
pub struct Chunk {
    staging: Arc<Staging>,
    number: usize,
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the chunk's number was popped from the free list, so nobody else has this range, which
        // lies in the mapping that `staging` keeps.
        unsafe {
            std::slice::from_raw_parts(
                (self.staging.start + self.number * CHUNK) as *const u8,
                CHUNK,
            )
        }
    }
}

impl DerefMut for Chunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the chunk is borrowed for writing.
        unsafe {
            std::slice::from_raw_parts_mut(
                (self.staging.start + self.number * CHUNK) as *mut u8,
                CHUNK,
            )
        }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let mut state = self.staging.state.lock();
        state.free.push(self.number);
        state.used -= 1;
        drop(state);
        self.staging.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_lent_than_the_limit_and_who_stops_gets_nothing() {
        let staging = Staging::new(5 * CHUNK).unwrap();
        staging.warm(usize::MAX / 4);
        let held: Vec<Chunk> = (0..5).map(|_| staging.take(&|| false).unwrap()).collect();
        let tries = std::cell::Cell::new(0);
        assert!(
            staging
                .take(&|| {
                    tries.set(tries.get() + 1);
                    tries.get() > 2
                })
                .is_none()
        );
        drop(held);
        assert_eq!(staging.take_peak(), 5 * CHUNK);
        assert_eq!(staging.take_peak(), 0);
        let first = staging.take(&|| false).unwrap();
        // Who wants few to be lent waits for this one to come back.
        std::thread::scope(|scope| {
            let other = scope.spawn(|| staging.take_within(1, &|| false).map(|_| ()));
            drop(first);
            assert_eq!(other.join().unwrap(), Some(()));
        });
        assert_eq!(staging.take_peak(), CHUNK);
    }

    #[test]
    fn what_is_cooled_is_not_what_is_lent_next_and_gives_its_memory_back() {
        let staging = Staging::new(6 * CHUNK).unwrap();
        let mut held: Vec<Chunk> = (0..6).map(|_| staging.try_take().unwrap()).collect();
        for chunk in &mut held {
            chunk.fill(7);
        }
        let lent = held.split_off(5);
        drop(held);
        // One is lent and two are kept beside it.
        staging.cool(3 * CHUNK);
        assert!(lent[0].iter().all(|byte| *byte == 7));
        let next: Vec<Chunk> = (0..5).map(|_| staging.try_take().unwrap()).collect();
        let warm = |chunk: &Chunk| chunk[0] == 7;
        assert_eq!(
            next.iter().map(warm).collect::<Vec<_>>(),
            [true, true, false, false, false]
        );
    }
}
