//! Finishing a point: its index and record are written, then the manifest names it.

use std::collections::{BTreeMap, BTreeSet};

use crate::copier::{Batch, Buffer, Item};
use crate::entry::Kind;
use crate::error::Error;
use crate::job::Job;
use crate::manifest::{ArrayRecord, DataRecord, PointRecord, PointSummary};
use crate::saver::Saver;
use crate::segment::SegmentWriter;

/// A point that needs more segments than this has the emptiest of them copied into its own.
const MOST_SEGMENTS: usize = 64;

impl Saver {
    /// Writes the index and lets the manifest name the point.
    pub fn publish(&mut self, job: &Job) -> Result<(), Error> {
        if let Some(last) = self.manifest.points.last()
            && last.step >= job.point.step()
        {
            // A save that was given up came to its end after all, and a later one was given its number.
            return Err(Error::Invalid(format!(
                "a point of step {} was finished meanwhile",
                last.step
            )));
        }
        self.segment()?;
        self.consolidate()?;
        let shared = self.shared.clone();
        let segment = self.segment.as_mut().expect("made above");
        let mut data = Vec::new();
        let mut leaves = Vec::new();
        let mut segments = BTreeSet::from([segment.number()]);
        for (index, source) in self.index.iter().zip(&shared.sources) {
            let (directory, new) = index.write(&shared.folder, segment)?;
            index.add_segments(&new, &mut segments);
            leaves.push(new);
            data.push(DataRecord {
                nbytes: source.nbytes as u64,
                lead: source.lead as u64,
                block: source.block as u64,
                directory,
            });
            shared.progress();
        }
        let arrays = shared
            .arrays
            .iter()
            .map(|(name, description, data)| ArrayRecord {
                name: name.clone(),
                description: description.clone(),
                data: *data,
            })
            .collect();
        let record = PointRecord {
            step: job.point.step(),
            meta: job.meta.clone(),
            arrays,
            data,
        };
        let record = segment.append(&shared.folder, &record.to_bytes())?;
        segment.finish(&shared.folder)?;
        shared.progress();
        let mut manifest = self.manifest.clone();
        manifest.points.push(PointSummary {
            step: job.point.step(),
            segment: segment.number(),
            record,
            time: job.time,
            segments: segments.into_iter().collect(),
        });
        if job.is_cancelled() {
            return Err(job.reason());
        }
        if let Err(error) = shared.folder.replace_manifest(&manifest.to_bytes()) {
            // It may have its name all the same. What a manifest names must stay.
            let named = shared.folder.names(segment.number());
            let undone = !named
                || shared
                    .folder
                    .replace_manifest(&self.manifest.to_bytes())
                    .is_ok();
            if undone {
                return Err(error);
            }
        }
        self.manifest = manifest;
        self.segment = None;
        for (index, leaves) in self.index.iter_mut().zip(leaves) {
            index.published(leaves);
        }
        Ok(())
    }

    /// Keeps the number of files that a point needs small: copies what is left in the emptiest ones.
    fn consolidate(&mut self) -> Result<(), Error> {
        let last = self.manifest.points.last();
        if last.is_some_and(|last| last.segments.len() < MOST_SEGMENTS) {
            // What it needs is what the last one needed, at most, and its own.
            return Ok(());
        }
        let number = self.segment.as_ref().map_or(0, SegmentWriter::number);
        let mut blocks = BTreeMap::from([(number, 0)]);
        for index in &self.index {
            for entry in index.entries() {
                if entry.kind() != Kind::Zero {
                    *blocks.entry(entry.segment()).or_default() += 1;
                }
            }
            for segment in index.leaf_segments() {
                blocks.entry(segment).or_default();
            }
        }
        if blocks.len() <= MOST_SEGMENTS {
            return Ok(());
        }
        let mut by_use: Vec<(usize, u32)> = blocks.into_iter().map(|(a, b)| (b, a)).collect();
        by_use.sort_unstable();
        let leaving: BTreeSet<u32> = by_use
            .into_iter()
            .map(|(_, segment)| segment)
            .filter(|segment| *segment != number)
            .take(MOST_SEGMENTS / 2)
            .collect();
        let shared = self.shared.clone();
        let mut unreadable = None;
        let files = crate::reader::Files::new(shared.folder.path(), self.manifest.identity);
        for index in &mut self.index {
            index.rewrite_leaves(&leaving);
        }
        for data in 0..self.index.len() {
            let source = &shared.sources[data];
            for block in 0..source.blocks() {
                let Some(old) = self.index[data].get(block) else {
                    continue;
                };
                if old.kind() == Kind::Zero || !leaving.contains(&old.segment()) {
                    continue;
                }
                let mut bytes = vec![0; source.len_of(block..block + 1)];
                let read = files.read_block(old, source.block, &mut bytes);
                self.index[data].forget_block(block);
                if let Err(error) = read {
                    // Memory still has it: this point fails, and the next one saves it anew.
                    self.lost(data, block..block + 1);
                    unreadable.get_or_insert(error);
                    continue;
                }
                let batch = Batch {
                    items: vec![Item {
                        data,
                        blocks: block..block + 1,
                        at: 0,
                    }],
                    buffer: Buffer::Own(bytes),
                    sums: Vec::new(),
                };
                if let Err(error) = self.process(&batch, None) {
                    self.lost(data, block..block + 1);
                    return Err(error);
                }
            }
        }
        unreadable.map_or(Ok(()), Err)
    }
}
