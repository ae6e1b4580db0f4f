//! Copying past the caches: what a cut copies is not read again before the cut is over.
//!
//! Unsafe: vector stores, and copies out of memory that threads may be writing.
//!
//! A store into the caches first fetches the line that it overwrites, so that a copy costs three passes over memory
//! where two would do. Stores of whole lines past the caches do not; stores of parts of lines gain less, and
//! fetching the source ahead gains nothing. Scattered pages of 4 KiB, of 512 MiB, took per page, in ns, by one
//! thread and by two (an Intel Xeon with AVX-512, medians of 25 and 9 rounds that took turns):
//!
//! | | 1 %, one | 1 %, two | 10 %, one | 10 %, two |
//! |---|---|---|---|---|
//! | `memcpy` | 512 | 243 | 678 | 351 |
//! | `rep movsb` | 492 | 224 | 654 | 340 |
//! | 16 bytes a store, past the caches | 577 | 279 | 584 | 303 |
//! | 64 bytes a store, past the caches | 453 | 226 | 479 | 237 |
//! | reading alone | 372 | 182 | 375 | 182 |

/// Copies `into.len()` bytes from `from`. Whoever hands the copy to another thread calls [`done`] first.
///
/// # Safety
/// The bytes at `from` are mapped and do not overlap `into`. Threads may write to them meanwhile, and then come out
/// old or new.
pub unsafe fn copy(from: *const u8, into: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        let to = into.as_mut_ptr();
        let whole = into.len() / STEP * STEP;
        if whole > 0 && to.addr().is_multiple_of(64) {
            if std::arch::is_x86_feature_detected!("avx512f") {
                // SAFETY: as promised, in bounds; the processor has these instructions, and `to` is aligned.
                unsafe { lines(from, to, whole) };
            } else {
                // SAFETY: as promised, in bounds; `to` is aligned.
                unsafe { parts(from, to, whole) };
            }
            // SAFETY: as promised; what is left of both.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(whole), to.add(whole), into.len() - whole);
            }
            return;
        }
    }
    // SAFETY: as promised.
    unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
}

/// Has the copies made by this thread seen by whoever is told of them.
pub fn done() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: orders stores, and SSE2 is a part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Bytes of one turn of the loops.
#[cfg(target_arch = "x86_64")]
const STEP: usize = 256;

/// By whole lines.
///
/// # Safety
/// `len` bytes at both, a multiple of [`STEP`]; `to` begins at a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn lines(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_stream_si512};
    for at in (0..len).step_by(STEP) {
        // SAFETY: in bounds, as the caller promises.
        unsafe {
            let (from, to) = (from.add(at).cast::<__m512i>(), to.add(at).cast::<__m512i>());
            let words = [0, 1, 2, 3].map(|line| _mm512_loadu_si512(from.add(line)));
            for (line, word) in words.into_iter().enumerate() {
                _mm512_stream_si512(to.add(line), word);
            }
        }
    }
}

/// By quarters of a line, which the processor puts together.
///
/// # Safety
/// As for [`lines`].
#[cfg(target_arch = "x86_64")]
unsafe fn parts(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for at in (0..len).step_by(64) {
        // SAFETY: in bounds, as the caller promises.
        unsafe {
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            let words = [0, 1, 2, 3].map(|part| _mm_loadu_si128(from.add(part)));
            for (part, word) in words.into_iter().enumerate() {
                _mm_stream_si128(to.add(part), word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_and_none_beside_it() {
        let from: Vec<u8> = (0..9000u32).map(|at| (at * 31 % 251) as u8).collect();
        for start in [0, 1, 16, 64, 4096 - 64] {
            for len in [0, 1, 63, 64, 255, 256, 257, 1000, 4096] {
                for offset in [0, 7, 64] {
                    let mut into = vec![0xEE; 9000];
                    let first = into.as_ptr().align_offset(64) + start.min(1) + start;
                    // SAFETY: both ranges lie in the two vectors.
                    unsafe { copy(from.as_ptr().add(offset), &mut into[first..first + len]) };
                    done();
                    assert_eq!(into[first..first + len], from[offset..offset + len]);
                    assert!(into[..first].iter().all(|byte| *byte == 0xEE));
                    assert!(into[first + len..].iter().all(|byte| *byte == 0xEE));
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn processors_without_the_wide_stores_copy_the_same() {
        let from: Vec<u8> = (0..4096u32).map(|at| (at * 7 % 253) as u8).collect();
        let mut into = vec![0u8; 4096 + 64];
        let first = into.as_ptr().align_offset(64);
        // SAFETY: 4096 bytes of each; `first` is aligned to a line.
        unsafe { parts(from.as_ptr(), into.as_mut_ptr().add(first), 4096) };
        done();
        assert_eq!(into[first..first + 4096], from);
    }
}
