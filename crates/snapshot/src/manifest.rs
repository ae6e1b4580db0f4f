//! Which points there are, and what each of them holds: two small JSON documents.
//!
//! The manifest lists the points. Its last line is its own checksum, so that a torn or damaged one is
//! refused. A point's record lies at the end of the point's own segment; the manifest has its place and
//! its hash.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::entry::{LARGEST_SEGMENT, LEAF, PAGE, hash};
use crate::error::Error;

/// What a manifest begins with.
pub const FORMAT: &str = "userfault checkpoint";

/// The version of the layout.
pub const VERSION: u32 = 1;

/// The largest manifest, record or directory that is read, bytes: what a wrong length may cost.
pub const LARGEST_DOCUMENT: u64 = 1 << 30;

/// The largest array, bytes.
const LARGEST_ARRAY: u64 = 1 << 46;

/// Bytes somewhere in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// The first page.
    pub page: u32,
    /// Bytes.
    pub length: u64,
    /// XXH3-64 of them.
    pub hash: u64,
}

/// A point, as the manifest knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointSummary {
    /// The number that the program gave it.
    pub step: u64,
    /// Its own segment.
    pub segment: u32,
    /// Where its record is, in that segment.
    pub record: Extent,
    /// Seconds since 1970 at the cut.
    pub time: f64,
    /// Every segment that it needs.
    pub segments: Vec<u32>,
}

/// The list of points, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// Says that segments belong to this directory.
    pub identity: u64,
    /// The points.
    pub points: Vec<PointSummary>,
}

/// An array of a point: a name, what Python needs to know, and the number of its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArrayRecord {
    /// Its name.
    pub name: String,
    /// Its type and shape, as the Python package writes them: a JSON text.
    pub description: String,
    /// Which data: arrays that share their memory share these.
    pub data: usize,
}

/// The bytes of one or more arrays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecord {
    /// Bytes of the array.
    pub nbytes: u64,
    /// Bytes of zeros before it, so that blocks begin where pages of memory began.
    pub lead: u64,
    /// Bytes of a block.
    pub block: u64,
    /// Where its directory is, in the point's segment: an entry for each leaf.
    pub directory: Extent,
}

impl DataRecord {
    /// Bytes with the lead.
    pub fn image(&self) -> u64 {
        self.lead + self.nbytes
    }

    /// Blocks.
    pub fn blocks(&self) -> usize {
        self.image().div_ceil(self.block) as usize
    }

    /// Leaves.
    pub fn leaves(&self) -> usize {
        self.blocks().div_ceil(LEAF)
    }
}

/// What a point holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointRecord {
    /// The point's number, once more.
    pub step: u64,
    /// What the program wanted to be kept with it: a JSON text.
    pub meta: String,
    /// The arrays.
    pub arrays: Vec<ArrayRecord>,
    /// Their bytes.
    pub data: Vec<DataRecord>,
}

impl Manifest {
    /// Of a new directory.
    pub fn new(identity: u64) -> Manifest {
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            identity,
            points: Vec::new(),
        }
    }

    /// True if a point needs this segment.
    pub fn names(&self, segment: u32) -> bool {
        self.points
            .iter()
            .any(|point| point.segments.contains(&segment))
    }

    /// As it stands in the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("plain data");
        bytes.push(b'\n');
        let sum = hash(&bytes);
        bytes.extend_from_slice(format!("xxh3 {sum:016x}\n").as_bytes());
        bytes
    }

    /// From a file.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Manifest, Error> {
        const SUM: usize = "xxh3 0123456789abcdef\n".len();
        let corrupt = |detail: &str| Error::corrupt(path, format!("the manifest {detail}"));
        let Some(at) = bytes.len().checked_sub(SUM) else {
            return Err(corrupt("is too short to be one"));
        };
        let (text, sum) = bytes.split_at(at);
        if sum != format!("xxh3 {:016x}\n", hash(text)).as_bytes() {
            return Err(corrupt("does not have the checksum that it says it has"));
        }
        let manifest: Manifest = serde_json::from_slice(text)
            .map_err(|error| corrupt(&format!("cannot be understood: {error}")))?;
        if manifest.format != FORMAT {
            return Err(corrupt("is of another program"));
        }
        if manifest.version != VERSION {
            return Err(corrupt(&format!(
                "has version {}; this program knows version {VERSION}",
                manifest.version
            )));
        }
        let mut last = None;
        for point in &manifest.points {
            let sound = last.is_none_or(|last| point.step > last)
                && point.segments.contains(&point.segment)
                && point.segments.iter().all(|each| *each <= LARGEST_SEGMENT)
                && point.record.length <= LARGEST_DOCUMENT;
            if !sound {
                return Err(corrupt(&format!(
                    "contradicts itself at step {}",
                    point.step
                )));
            }
            last = Some(point.step);
        }
        Ok(manifest)
    }
}

impl PointRecord {
    /// As it stands in the segment.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data")
    }

    /// From a segment; `path` is for the message.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<PointRecord, Error> {
        let record: PointRecord = serde_json::from_slice(bytes).map_err(|error| {
            Error::corrupt(path, format!("the record cannot be understood: {error}"))
        })?;
        for data in &record.data {
            let sound = data.nbytes > 0
                && data.nbytes <= LARGEST_ARRAY
                && data.block.is_power_of_two()
                && (PAGE as u64..=1 << 26).contains(&data.block)
                && data.lead < data.block
                && data.directory.length == (data.leaves() * crate::entry::ENTRY) as u64;
            if !sound {
                return Err(Error::corrupt(path, "the record contradicts itself"));
            }
        }
        if record
            .arrays
            .iter()
            .any(|array| array.data >= record.data.len())
        {
            return Err(Error::corrupt(
                path,
                "the record speaks of data that it does not have",
            ));
        }
        Ok(record)
    }
}
