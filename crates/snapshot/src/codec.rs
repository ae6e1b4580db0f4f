//! Compressed blocks.
//!
//! ```text
//!   0    u32  bytes of the payload
//!   4    u32  0
//!   8    u64  XXH3-64 of the payload
//!   16   payload, then zeros to the end of the last page
//! ```
//!
//! A block that does not get smaller by a page at least is stored as it is.

use crate::entry::{Kind, PAGE, hash};

/// Bytes before the payload.
pub const HEADER: usize = 16;

/// How blocks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compress {
    /// LZ4: fast.
    Lz4,
    /// Zstandard, level 1: smaller.
    Zstd,
}

impl Compress {
    /// How such a block is stored.
    pub fn kind(self) -> Kind {
        match self {
            Compress::Lz4 => Kind::Lz4,
            Compress::Zstd => Kind::Zstd,
        }
    }

    /// The stored form of a block, whole pages, or `None` if that would save no page.
    pub fn encode(self, block: &[u8]) -> Option<Vec<u8>> {
        let payload = match self {
            Compress::Lz4 => lz4_flex::block::compress(block),
            Compress::Zstd => zstd::bulk::compress(block, 1).ok()?,
        };
        let len = (HEADER + payload.len()).next_multiple_of(PAGE);
        if len >= block.len().next_multiple_of(PAGE) {
            return None;
        }
        let mut stored = Vec::with_capacity(len);
        stored.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        stored.extend_from_slice(&[0; 4]);
        stored.extend_from_slice(&hash(&payload).to_le_bytes());
        stored.extend_from_slice(&payload);
        stored.resize(len, 0);
        Some(stored)
    }
}

/// The length of the payload that a header promises, and its hash; `None` if no writer leaves such a header
/// before a block of `block` bytes.
pub fn header(bytes: &[u8; HEADER], block: usize) -> Option<(usize, u64)> {
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let len = number(0) as usize;
    let fits = number(4) == 0 && len > 0 && HEADER + len < block;
    fits.then(|| {
        (
            len,
            u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes")),
        )
    })
}

/// Fills `block` from a payload; false if it does not hold exactly that much.
pub fn decode(kind: Kind, payload: &[u8], block: &mut [u8]) -> bool {
    match kind {
        Kind::Lz4 => {
            lz4_flex::block::decompress_into(payload, block).is_ok_and(|len| len == block.len())
        }
        Kind::Zstd => {
            zstd::bulk::decompress_to_buffer(payload, block).is_ok_and(|len| len == block.len())
        }
        Kind::Zero | Kind::Raw => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_and_a_damaged_one_never_passes_for_another() {
        let block: Vec<u8> = (0..65_536u32).map(|n| (n / 100) as u8).collect();
        for way in [Compress::Lz4, Compress::Zstd] {
            let stored = way.encode(&block).expect("compressible");
            let (len, sum) = header(stored[..HEADER].try_into().unwrap(), block.len()).unwrap();
            let payload = &stored[HEADER..HEADER + len];
            assert_eq!(hash(payload), sum);
            let mut back = vec![0; block.len()];
            assert!(decode(way.kind(), payload, &mut back));
            assert_eq!(back, block);
            for cut in 0..len.min(200) {
                // Whatever it says, it writes nowhere else and does not panic.
                let _ = decode(way.kind(), &payload[..cut], &mut back);
                let mut spoilt = payload.to_vec();
                spoilt[cut] ^= 0x55;
                let _ = decode(way.kind(), &spoilt, &mut back);
            }
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_left_as_it_is() {
        let mut state = 1u64;
        let block: Vec<u8> = (0..65_536)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        assert!(Compress::Lz4.encode(&block).is_none());
        assert!(Compress::Zstd.encode(&block).is_none());
    }
}
