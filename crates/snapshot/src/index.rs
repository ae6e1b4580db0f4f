//! What the next point would hold: an entry for each block of each array.
//!
//! It takes 16 bytes of memory for each block. An entry may be unknown: nobody has stored the block yet, or
//! what was stored is lost. A point is published only when everything is known.

use std::collections::BTreeSet;

use userfault_engine::dirty::DirtyMap;

use crate::entry::{Entry, Kind, LEAF, PAGE, hash, is_zero, to_bytes, write_bytes};
use crate::error::Error;
use crate::folder::Folder;
use crate::manifest::{DataRecord, Extent};
use crate::segment::SegmentWriter;

/// The index of one array.
pub struct DataIndex {
    entries: Vec<Entry>,
    known: DirtyMap,
    /// Where the leaves of the last point are.
    leaves: Vec<Entry>,
    /// Leaves that are not as in the last point.
    changed: DirtyMap,
}

/// The leaves of a point that is being written.
pub struct NewLeaves(Vec<Entry>);

impl DataIndex {
    /// Nothing is known of any block.
    pub fn new(blocks: usize) -> DataIndex {
        let leaves = blocks.div_ceil(LEAF);
        let mut changed = DirtyMap::new(leaves);
        changed.insert(0..leaves);
        DataIndex {
            entries: vec![Entry::ZERO; blocks],
            known: DirtyMap::new(blocks),
            leaves: vec![Entry::ZERO; leaves],
            changed,
        }
    }

    /// As the last point has it: its entries, and where its leaves are.
    pub fn from_point(entries: Vec<Entry>, leaves: Vec<Entry>) -> DataIndex {
        let mut index = DataIndex::new(entries.len());
        index.known.insert(0..entries.len());
        index.changed.remove(0..leaves.len());
        DataIndex {
            entries,
            leaves,
            ..index
        }
    }

    /// The entry of a block, if it is known.
    pub fn get(&self, block: usize) -> Option<Entry> {
        self.known.contains(block).then(|| self.entries[block])
    }

    /// All entries; the unknown ones are whatever they were.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sets the entry of a block.
    pub fn set(&mut self, block: usize, entry: Entry) {
        self.entries[block] = entry;
        self.known.insert(block..block + 1);
        self.changed.insert(block / LEAF..block / LEAF + 1);
    }

    /// Forgets every block that is stored in a segment that is given up; `lost` hears of each.
    pub fn forget(&mut self, segment: u32, mut lost: impl FnMut(usize)) {
        for (block, entry) in self.entries.iter().enumerate() {
            if entry.kind() != Kind::Zero && entry.segment() == segment {
                self.known.remove(block..block + 1);
                lost(block);
            }
        }
    }

    /// Forgets one block.
    pub fn forget_block(&mut self, block: usize) {
        self.known.remove(block..block + 1);
    }

    /// Writes the leaves that changed, and the directory of all of them.
    pub fn write(
        &self,
        folder: &Folder,
        segment: &mut SegmentWriter,
    ) -> Result<(Extent, NewLeaves), Error> {
        if self.known.count() != self.entries.len() {
            return Err(Error::Memory(format!(
                "{} blocks have not been copied: the point was not finished",
                self.entries.len() - self.known.count()
            )));
        }
        let mut leaves = self.leaves.clone();
        let mut pages = Vec::new();
        let mut stored = Vec::new();
        for leaf in self.changed.runs(0..leaves.len()).into_iter().flatten() {
            let end = self.entries.len().min((leaf + 1) * LEAF);
            let at = pages.len();
            pages.resize(at + PAGE, 0);
            write_bytes(&self.entries[leaf * LEAF..end], &mut pages[at..]);
            if is_zero(&pages[at..]) {
                pages.truncate(at);
                leaves[leaf] = Entry::ZERO;
            } else {
                stored.push((leaf, hash(&pages[at..])));
            }
        }
        if !pages.is_empty() {
            let first = segment.take(folder, pages.len())?;
            segment.write(folder, first, &pages)?;
            for (at, (leaf, sum)) in stored.into_iter().enumerate() {
                leaves[leaf] = Entry::new(sum, Kind::Raw, segment.number(), first + at as u32);
            }
        }
        let directory = segment.append(folder, &to_bytes(&leaves))?;
        Ok((directory, NewLeaves(leaves)))
    }

    /// Segments of the leaves that would not be written again.
    pub fn leaf_segments(&self) -> impl Iterator<Item = u32> {
        self.leaves
            .iter()
            .enumerate()
            .filter(|(number, leaf)| leaf.kind() != Kind::Zero && !self.changed.contains(*number))
            .map(|(_, leaf)| leaf.segment())
    }

    /// Has the leaves in some segments written again.
    pub fn rewrite_leaves(&mut self, segments: &BTreeSet<u32>) {
        for (number, leaf) in self.leaves.iter().enumerate() {
            if leaf.kind() != Kind::Zero && segments.contains(&leaf.segment()) {
                self.changed.insert(number..number + 1);
            }
        }
    }

    /// The point is published: its leaves are the ones to compare with.
    pub fn published(&mut self, leaves: NewLeaves) {
        self.leaves = leaves.0;
        self.changed.remove(0..self.leaves.len());
    }

    /// Adds the segments that this array needs.
    pub fn add_segments(&self, leaves: &NewLeaves, into: &mut BTreeSet<u32>) {
        let mut last = None;
        for entry in self.entries.iter().chain(&leaves.0) {
            if entry.kind() != Kind::Zero && last != Some(entry.segment()) {
                last = Some(entry.segment());
                into.insert(entry.segment());
            }
        }
    }
}

/// True if the index of an earlier run may be carried on: the blocks lie as they did.
pub fn same_layout(record: &DataRecord, nbytes: usize, lead: usize, block: usize) -> bool {
    (record.nbytes, record.lead, record.block) == (nbytes as u64, lead as u64, block as u64)
}
