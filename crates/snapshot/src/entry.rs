//! Where a block of a point is: 16 bytes.

use xxhash_rust::xxh3::xxh3_64;

/// The unit of places in a segment, bytes. A part of the format, whatever the machine's page is.
pub const PAGE: usize = 4096;

/// Bytes of an entry.
pub const ENTRY: usize = 16;

/// Entries of a leaf: one page.
pub const LEAF: usize = PAGE / ENTRY;

/// The largest segment number.
pub const LARGEST_SEGMENT: u32 = (1 << 30) - 1;

/// How a block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All zeros: not stored.
    Zero,
    /// As it is.
    Raw,
    /// Compressed with LZ4.
    Lz4,
    /// Compressed with Zstandard.
    Zstd,
}

/// A block's hash and place. The hash is XXH3-64 of the block's bytes, before compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// XXH3-64 of the bytes; 0 for a block of zeros.
    pub hash: u64,
    place: u64,
}

impl Entry {
    /// The entry of zeros: all bits are 0.
    pub const ZERO: Entry = Entry { hash: 0, place: 0 };

    /// A stored block.
    pub fn new(hash: u64, kind: Kind, segment: u32, page: u32) -> Entry {
        debug_assert!(segment <= LARGEST_SEGMENT);
        let kind = match kind {
            Kind::Zero => return Entry::ZERO,
            Kind::Raw => 1,
            Kind::Lz4 => 2,
            Kind::Zstd => 3,
        };
        Entry {
            hash,
            place: kind << 62 | u64::from(segment) << 32 | u64::from(page),
        }
    }

    /// How it is stored.
    pub fn kind(self) -> Kind {
        match self.place >> 62 {
            0 => Kind::Zero,
            1 => Kind::Raw,
            2 => Kind::Lz4,
            _ => Kind::Zstd,
        }
    }

    /// The segment it is in.
    pub fn segment(self) -> u32 {
        (self.place >> 32) as u32 & LARGEST_SEGMENT
    }

    /// The page of the segment at which it begins.
    pub fn page(self) -> u32 {
        self.place as u32
    }

    /// Its first byte in the segment.
    pub fn offset(self) -> u64 {
        u64::from(self.page()) * PAGE as u64
    }

    /// False for bits that no writer leaves: an unstored block with a place or a hash.
    pub fn plausible(self) -> bool {
        self.kind() != Kind::Zero || self == Entry::ZERO
    }

    /// As it stands in a file.
    pub fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.hash.to_le_bytes());
        bytes[8..].copy_from_slice(&self.place.to_le_bytes());
        bytes
    }

    /// From a file.
    pub fn from_bytes(bytes: &[u8; ENTRY]) -> Entry {
        let (hash, place) = bytes.split_at(8);
        Entry {
            hash: u64::from_le_bytes(hash.try_into().expect("8 bytes")),
            place: u64::from_le_bytes(place.try_into().expect("8 bytes")),
        }
    }
}

/// Entries one behind the other, as they stand in a file.
pub fn to_bytes(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = vec![0; entries.len() * ENTRY];
    write_bytes(entries, &mut bytes);
    bytes
}

/// As [`to_bytes`], into the beginning of `into`.
pub fn write_bytes(entries: &[Entry], into: &mut [u8]) {
    for (into, entry) in into.chunks_exact_mut(ENTRY).zip(entries) {
        into.copy_from_slice(&entry.to_bytes());
    }
}

/// Entries out of a file; a rest that is no entry is left out.
pub fn from_bytes(bytes: &[u8]) -> Vec<Entry> {
    bytes
        .chunks_exact(ENTRY)
        .map(|chunk| Entry::from_bytes(chunk.try_into().expect("exact chunks")))
        .collect()
}

/// The hash of a stored thing.
pub fn hash(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// True if all bytes are 0.
pub fn is_zero(bytes: &[u8]) -> bool {
    // By words of 64 bytes: the compiler makes vector code of it, and memory that is not zero ends it at once.
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && bytes[bytes.len() / 64 * 64..].iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_survives_its_bytes() {
        for kind in [Kind::Raw, Kind::Lz4, Kind::Zstd] {
            for (segment, page) in [(0, 0), (LARGEST_SEGMENT, u32::MAX), (7, 9)] {
                let entry = Entry::new(u64::MAX - 3, kind, segment, page);
                let again = Entry::from_bytes(&entry.to_bytes());
                assert_eq!(again, entry);
                assert_eq!(
                    (again.kind(), again.segment(), again.page()),
                    (kind, segment, page)
                );
                assert!(again.plausible());
            }
        }
        assert_eq!(Entry::new(5, Kind::Zero, 1, 1), Entry::ZERO);
    }

    #[test]
    fn zeros_are_told_from_anything_else_at_every_length() {
        for len in 0..300 {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
