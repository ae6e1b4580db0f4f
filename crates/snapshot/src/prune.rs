//! Giving back the space of old points.
//!
//! The manifest is replaced first; then nobody new finds the points that go. Segments that no kept point
//! names are removed. In the others, pages that only the dropped points referred to become holes. A segment that
//! somebody reads (a lazy restore holds a shared lock) is left as it is and looked at again next time.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::OpenOptions;

use userfault_engine::dirty::DirtyMap;

use crate::codec;
use crate::entry::{Entry, Kind, PAGE};
use crate::error::Error;
use crate::folder::{flock, segment_name};
use crate::manifest::{Extent, Manifest, PointSummary};
use crate::reader::{Files, OpenPoint};
use crate::shared::Shared;

/// Drops all but the newest `keep` points, and looks at every file for what a killed prune has left.
pub fn sweep(shared: &Shared, manifest: &mut Manifest, keep: usize) -> Result<(), Error> {
    let all = manifest.points.iter().flat_map(|point| &point.segments);
    shared.prune_later.lock().extend(all);
    prune(shared, manifest, keep)
}

/// Drops all but the newest `keep` points.
pub fn prune(shared: &Shared, manifest: &mut Manifest, keep: usize) -> Result<(), Error> {
    let later = std::mem::take(&mut *shared.prune_later.lock());
    let mut candidates: BTreeSet<u32> = later.clone();
    let mut given_up = Vec::new();
    if manifest.points.len() > keep.max(1) {
        let mut shorter = manifest.clone();
        let dropped = shorter.points.len() - keep.max(1);
        for point in shorter.points.drain(..dropped) {
            candidates.extend(point.segments.iter().copied());
            given_up.push(point);
        }
        if let Err(error) = shared.folder.replace_manifest(&shorter.to_bytes()) {
            // Nobody can say which of the two a crash would leave: no file goes before that is settled.
            shared.prune_later.lock().extend(candidates);
            if shared.folder.holds(&shorter.to_bytes()) {
                *manifest = shorter;
            }
            return Err(error);
        }
        *manifest = shorter;
        shared
            .folder
            .remove_working_sets(|step| manifest.points.iter().any(|point| point.step == step));
    }
    let (kept, gone): (Vec<u32>, Vec<u32>) = candidates
        .into_iter()
        .partition(|number| manifest.names(*number));
    let all: Vec<u32> = kept.iter().chain(&gone).copied().collect();
    let given_back = give_back(shared, manifest, &given_up, &later, &kept, gone);
    if given_back.is_err() {
        // The next one looks at all of them.
        shared.prune_later.lock().extend(all);
    }
    given_back
}

/// Removes the segments that are `gone`, and makes holes of what only points that were given up needed of
/// those that are `kept`; of the `later` ones, of all that nobody needs.
fn give_back(
    shared: &Shared,
    manifest: &Manifest,
    given_up: &[PointSummary],
    later: &BTreeSet<u32>,
    kept: &[u32],
    gone: Vec<u32>,
) -> Result<(), Error> {
    // What still older points needed has become holes with them. If a point cannot be read, everything is
    // looked at.
    let needed = pages_of(shared, manifest.identity, given_up, kept).ok();
    for number in gone {
        if !with_lock(shared, number, |_, _| {
            shared.folder.remove(&segment_name(number))
        })? {
            shared.prune_later.lock().insert(number);
        }
    }
    if kept.is_empty() {
        return Ok(());
    }
    let live = pages_of(shared, manifest.identity, &manifest.points, kept)?;
    for (number, live) in live {
        let needed = needed
            .as_ref()
            .filter(|_| !later.contains(&number))
            .and_then(|needed| needed.get(&number));
        let punched = with_lock(shared, number, |file, pages| {
            let pages = pages.min(live.pages());
            let mut at = 0;
            for run in live
                .runs(0..pages)
                .into_iter()
                .chain(std::iter::once(pages..pages))
            {
                let unused = at..run.start;
                at = run.end;
                let holes = match needed {
                    Some(needed) => needed.runs(unused),
                    None => std::iter::once(unused).collect(),
                };
                for hole in holes.into_iter().filter(|hole| !hole.is_empty()) {
                    let (offset, len) = ((hole.start * PAGE) as u64, (hole.len() * PAGE) as u64);
                    shared.folder.punch(file, number, offset, len)?;
                }
            }
            Ok(())
        })?;
        if !punched {
            shared.prune_later.lock().insert(number);
        }
    }
    Ok(())
}

/// Runs `act` while nobody reads a segment; false if somebody does.
fn with_lock(
    shared: &Shared,
    number: u32,
    act: impl FnOnce(&std::fs::File, usize) -> Result<(), Error>,
) -> Result<bool, Error> {
    let path = shared.folder.segment(number);
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(Error::io(&path, "opening", error)),
    };
    if !flock(&file, true).map_err(|error| Error::io(&path, "locking", error))? {
        return Ok(false);
    }
    let len = file
        .metadata()
        .map_err(|error| Error::io(&path, "reading", error))?
        .len();
    act(&file, (len as usize).div_ceil(PAGE))?;
    Ok(true)
}

/// The pages of some segments that points refer to.
fn pages_of(
    shared: &Shared,
    identity: u64,
    points: &[PointSummary],
    segments: &[u32],
) -> Result<BTreeMap<u32, DirtyMap>, Error> {
    let mut live = BTreeMap::new();
    for &number in segments {
        let path = shared.folder.segment(number);
        let len = std::fs::metadata(&path)
            .map_err(|error| Error::io(&path, "reading", error))?
            .len();
        let mut pages = DirtyMap::new((len as usize).div_ceil(PAGE));
        pages.insert(0..1.min(pages.pages()));
        live.insert(number, pages);
    }
    let mut seen = HashSet::new();
    let mut calls = 0u64;
    for summary in points {
        let point = OpenPoint::of(shared.folder.path(), identity, summary.clone())?;
        walk(&point, &mut seen, &mut |number, page, len| {
            calls += 1;
            if calls.is_multiple_of(1024) {
                shared.make_way();
            }
            if let Some(pages) = live.get_mut(&number) {
                let end = (page as usize + len.div_ceil(PAGE)).min(pages.pages());
                pages.insert((page as usize).min(end)..end);
            }
        })?;
    }
    Ok(live)
}

/// Calls `used(segment, page, bytes)` for everything that a point refers to. Leaves in `seen` were looked
/// at for another point.
pub fn walk(
    point: &OpenPoint,
    seen: &mut HashSet<(u32, u32)>,
    used: &mut dyn FnMut(u32, u32, usize),
) -> Result<(), Error> {
    let own = point.summary().segment;
    let mut document = |extent: Extent| used(own, extent.page, extent.length as usize);
    document(point.summary().record);
    for data in point.data() {
        document(data.directory);
    }
    for data in 0..point.data().len() {
        let reader = point.reader(data)?;
        for (number, &leaf) in reader.leaf_entries().iter().enumerate() {
            if leaf.kind() == Kind::Zero || !seen.insert((leaf.segment(), leaf.page())) {
                continue;
            }
            used(leaf.segment(), leaf.page(), PAGE);
            let first = number * crate::entry::LEAF;
            for (at, &entry) in reader.leaf(number)?.iter().enumerate() {
                if entry.kind() != Kind::Zero {
                    let block = reader.record().block as usize;
                    let len = stored_len(point.files(), entry, block, reader.len_of(first + at))?;
                    used(entry.segment(), entry.page(), len);
                }
            }
        }
    }
    Ok(())
}

/// Bytes that a stored block takes in its segment.
pub fn stored_len(files: &Files, entry: Entry, block: usize, len: usize) -> Result<usize, Error> {
    if entry.kind() == Kind::Raw {
        return Ok(len);
    }
    let path = files.path_of(entry.segment());
    let mut head = [0; codec::HEADER];
    use std::os::unix::fs::FileExt;
    files
        .segment(entry.segment())?
        .read_exact_at(&mut head, entry.offset())
        .map_err(|error| Error::io(&path, "reading", error))?;
    let (len, _) = codec::header(&head, block)
        .ok_or_else(|| Error::corrupt(&path, "the header of a block is damaged"))?;
    Ok(codec::HEADER + len)
}
