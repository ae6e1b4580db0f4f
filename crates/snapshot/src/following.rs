//! How an array is followed, and what an earlier run has already stored of it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use userfault_engine::tracked::{Ledger, huge_share, own_memory, read_foreign, trackable};

use crate::checkpointer::{Array, Options};
use crate::entry::PAGE;
use crate::error::Error;
use crate::index::{DataIndex, same_layout};
use crate::manifest::Manifest;
use crate::reader::OpenPoint;
use crate::shared::Group;
use crate::source::{Source, Way};

/// Bytes of a block that is stored as it is: what one page of memory holds.
const PLAIN_BLOCK: usize = PAGE;

/// Bytes of a block that is compressed: smaller ones do not get much smaller.
const COMPRESSED_BLOCK: usize = 64 << 10;

/// Foreign arrays below this are copied: tracking them would cost a mapping each. Bytes.
pub const COPIED_BELOW: usize = 1 << 20;

/// A foreign array on transparent huge pages is copied at the cut if that takes no longer than this; tracking
/// it would split its pages for good. Beyond it a cut would be felt more than the split.
const COPY_STALL: Duration = Duration::from_millis(3);

/// How an array is followed.
pub fn source(
    array: &Array,
    options: &Options,
    page: usize,
    number: usize,
    groups: &mut Vec<Group>,
) -> Result<Source, Error> {
    let block = match options.compress {
        Some(_) => COMPRESSED_BLOCK,
        None => PLAIN_BLOCK,
    };
    let own = own_memory(array.start, array.nbytes);
    let mut source = Source {
        start: array.start,
        nbytes: array.nbytes,
        lead: array.start % block,
        block,
        way: Way::Copied,
        own: own.clone(),
        name: array.name.clone(),
        why: "copied",
    };
    if array.always_copy {
        return Ok(source);
    }
    let whole = array.start.next_multiple_of(page)..(array.start + array.nbytes) / page * page;
    if let Some(own) = own {
        if own.guard().is_some() {
            let at = groups
                .iter()
                .position(|group| Arc::ptr_eq(&group.memory, &own));
            let at = at.unwrap_or_else(|| {
                groups.push(Group {
                    consumer: own.guard().map_or(0, |guard| guard.subscribe()),
                    memory: own,
                    arrays: Vec::new(),
                });
                groups.len() - 1
            });
            groups[at].arrays.push(number);
            source.way = Way::Guarded(at);
            source.why = "guarded";
        } else if whole.start < whole.end {
            source.way = Way::Silent(Ledger::open(whole.start, whole.len())?);
            source.why = "tracked";
        }
        return Ok(source);
    }
    if array.nbytes < COPIED_BELOW || whole.start >= whole.end {
        return Ok(source);
    }
    let refused = |why: String| {
        Error::Invalid(format!(
            "array {:?} cannot be tracked: {why}. Name it in always_copy to have it copied at every cut",
            array.name
        ))
    };
    trackable(whole.clone()).map_err(|why| refused(why.to_string()))?;
    let splits = huge_share(whole.clone()) * 2 > whole.len();
    if splits && array.nbytes <= options.staging / 2 && copied_within(array, COPY_STALL)? {
        source.why = "copied (its huge pages stay whole)";
        return Ok(source);
    }
    let ledger = Ledger::open(whole.start, whole.len()).map_err(|why| refused(why.to_string()))?;
    source.way = Way::Silent(ledger);
    source.why = if splits {
        "tracked (its huge pages are split)"
    } else {
        "tracked"
    };
    Ok(source)
}

/// True if copying all of an array at a cut takes no longer than `limit`, by the speed at which a part of it is
/// copied now.
fn copied_within(array: &Array, limit: Duration) -> Result<bool, Error> {
    const PART: usize = 4 << 20;
    let part = array.nbytes.min(PART);
    let mut buffer = vec![0u8; part];
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let began = Instant::now();
        read_foreign(&[(array.start, part)], &mut buffer)
            .map_err(|error| Error::Memory(format!("array {:?}: {error}", array.name)))?;
        best = best.min(began.elapsed());
    }
    Ok(best.mul_f64(array.nbytes as f64 / part as f64) <= limit)
}

/// The index of each array as the last point has it, where the arrays are laid out as they were.
pub fn carried_on(
    path: &Path,
    manifest: &Manifest,
    named: &[(String, String, usize)],
    sources: &[Source],
) -> Vec<DataIndex> {
    let mut index: Vec<DataIndex> = sources
        .iter()
        .map(|source| DataIndex::new(source.blocks()))
        .collect();
    let Some(last) = manifest.points.last() else {
        return index;
    };
    // A point that cannot be read is verify's business; everything is saved anew.
    let Ok(point) = OpenPoint::of(path, manifest.identity, last.clone()) else {
        return index;
    };
    for array in point.arrays() {
        let record = &point.data()[array.data];
        let Some((_, _, data)) = named.iter().find(|(name, _, data)| {
            let source = &sources[*data];
            *name == array.name && same_layout(record, source.nbytes, source.lead, source.block)
        }) else {
            continue;
        };
        let Ok(reader) = point.reader(array.data) else {
            continue;
        };
        let mut entries = Vec::with_capacity(record.blocks());
        let read = (0..record.leaves()).try_for_each(|leaf| {
            entries.extend_from_slice(reader.leaf(leaf)?);
            Ok::<(), Error>(())
        });
        if read.is_ok() {
            index[*data] = DataIndex::from_point(entries, reader.leaf_entries().to_vec());
        }
    }
    index
}
