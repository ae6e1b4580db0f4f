//! Behind the cuts: what the next point would hold, and the thread that saves and prunes, in order.
//!
//! Batches of copied blocks come from the cut, from writers of guarded memory, and from the drain. Each
//! block is hashed, compared with the index, and written to the segment of the next point if it differs.
//! The thread has the saver for the length of a save or a pruning, and the drain for the length of a round; whoever
//! wants a save has rounds end early.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use userfault_engine::drain::Draining;
use userfault_engine::lock::Mutex;

use crate::codec::Compress;
use crate::copier::{Batch, sum};
use crate::drain::{DRAIN_STEP, Drain};
use crate::entry::{Entry, Kind, PAGE, hash, is_zero};
use crate::error::Error;
use crate::folder::segment_name;
use crate::index::DataIndex;
use crate::job::Job;
use crate::manifest::Manifest;
use crate::prune;
use crate::segment::SegmentWriter;
use crate::shared::Shared;
use crate::source::Way;
use crate::staging::CHUNK;

/// What the saver is asked to do.
pub enum Command {
    /// Finish this save.
    Save(Arc<Job>),
    /// Keep so many points.
    Prune(usize),
}

/// What the next point would hold, and where.
pub struct Saver {
    pub shared: Arc<Shared>,
    pub index: Vec<DataIndex>,
    pub manifest: Manifest,
    pub segment: Option<SegmentWriter>,
    next_segment: u32,
    /// The number of the cut whose blocks are in the index, or are being put there.
    pub cut: u64,
    /// Bytes of staging that the last point needed.
    needed: usize,
    /// What the token bucket of `max_rate` has been given.
    paid_until: Instant,
    pub drain: Drain,
}

impl Saver {
    pub fn new(
        shared: Arc<Shared>,
        index: Vec<DataIndex>,
        manifest: Manifest,
        next_segment: u32,
    ) -> Saver {
        let drain = Drain::new(&shared);
        Saver {
            shared,
            index,
            manifest,
            segment: None,
            next_segment,
            cut: 0,
            needed: 0,
            paid_until: Instant::now(),
            drain,
        }
    }

    fn save(&mut self, job: &Arc<Job>) {
        self.drain.resting = false;
        self.cut = job.cut.load(Ordering::Relaxed);
        let result = self.store(job).and_then(|()| self.publish(job));
        self.shared.end_guarded(job);
        job.point.used(self.shared.staging.take_peak());
        match result {
            Ok(()) => {
                self.tell_points();
                self.shared.end(job, Ok(()));
                if let Some(keep) = self.shared.options.max_to_keep
                    && let Err(error) = prune::prune(&self.shared, &mut self.manifest, keep)
                {
                    self.shared.state.lock().failed.get_or_insert(error);
                }
                // The next cut needs about as much.
                let needed = job.point.extra_bytes();
                let before = std::mem::replace(&mut self.needed, needed);
                self.shared.prepare_staging(needed, before);
            }
            Err(error) => {
                self.give_up_segment();
                self.shared.take_back(job);
                self.shared.end(job, Err(error));
            }
        }
        self.tell_points();
    }

    fn prune(&mut self, keep: usize) {
        if let Err(error) = prune::sweep(&self.shared, &mut self.manifest, keep) {
            self.shared.state.lock().failed.get_or_insert(error);
        }
        self.tell_points();
    }

    /// Everybody may know which points there are.
    fn tell_points(&self) {
        let mut state = self.shared.state.lock();
        state.points.clone_from(&self.manifest.points);
    }

    /// Nothing is saved any more. What was drained since the last point belongs to no point.
    fn end(&mut self) {
        self.drain.resting = true;
        if let Some(segment) = self.segment.take() {
            let number = segment.number();
            drop(segment);
            let _ = self.shared.folder.remove(&segment_name(number));
        }
        self.shared.let_go();
        let mut state = self.shared.state.lock();
        state.ended = true;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Blocks are as if nobody had copied them.
    pub fn lost(&mut self, data: usize, blocks: Range<usize>) {
        self.shared.put_back(data, blocks);
    }

    /// Removes the segment of the next point; what was in it has to be copied again.
    pub fn give_up_segment(&mut self) {
        let Some(segment) = self.segment.take() else {
            return;
        };
        let number = segment.number();
        drop(segment);
        let shared = self.shared.clone();
        for (data, index) in self.index.iter_mut().enumerate() {
            index.forget(number, |block| shared.put_back(data, block..block + 1));
        }
        // If it cannot be removed now, the next save, or the next run, does it.
        if shared.folder.remove(&segment_name(number)).is_err() {
            shared.state.lock().leftovers.push(number);
        }
    }

    /// Takes everything of a cut.
    fn store(&mut self, job: &Job) -> Result<(), Error> {
        while let Some(batch) = job.next() {
            self.process(&batch, Some(job))?;
        }
        let shared = self.shared.clone();
        self.settle(job)?;
        let cuts: Vec<(usize, u64)> = job
            .guarded
            .lock()
            .iter()
            .map(|(group, cut, _)| (*group, *cut))
            .collect();
        for (group, cut) in cuts {
            let group = &shared.groups[group];
            let Some(guard) = group.memory.guard() else {
                continue;
            };
            self.store_guarded(job, group, guard, cut)?;
        }
        // A block that a writer saved was pending until its batch was here.
        while let Some(batch) = job.pop() {
            self.process(&batch, Some(job))?;
        }
        if job.is_cancelled() {
            return Err(job.reason());
        }
        if job.failures.load(Ordering::Relaxed) != self.shared.failures.load(Ordering::Relaxed) {
            // Its cut did not copy what an earlier one had taken, and that is lost.
            return Err(Error::Memory(
                "an earlier save, or the drain, failed after the cut of this point; save again"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Protects again what was written before the cut. Those pages count as written until then, so each is
    /// compared with what was just saved of it: equal is clean, since a write from here on is noted.
    fn settle(&mut self, job: &Job) -> Result<(), Error> {
        let shared = self.shared.clone();
        for source in &shared.sources {
            if let Way::Silent(ledger) = &source.way {
                self.shared.harvest(ledger)?;
            }
        }
        let taken = job.taken.lock().clone();
        let mut parts = parts(&shared, taken).into_iter().peekable();
        let mut buffer = vec![0; CHUNK];
        while parts.peek().is_some() && !job.is_cancelled() {
            if shared.wanted() {
                // The next cut copies the rest sooner than it would wait for us.
                return Ok(());
            }
            let Some(_cutting) = shared.after_cut(self.cut) else {
                // The index will be that of a later cut: equal to this one proves nothing then.
                return Ok(());
            };
            let mut bytes = 0;
            while bytes < DRAIN_STEP
                && let Some((data, blocks)) = parts.next()
            {
                bytes += shared.sources[data].len_of(blocks.clone());
                self.settle_part(data, blocks, &mut buffer)?;
            }
        }
        Ok(())
    }

    /// Compares blocks that are protected now with what was saved of them.
    fn settle_part(
        &self,
        data: usize,
        blocks: Range<usize>,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        let shared = &self.shared;
        let source = &shared.sources[data];
        let Way::Silent(ledger) = &source.way else {
            return Ok(());
        };
        let runs = ledger.take(source.pages_of(ledger, blocks.clone(), shared.page));
        if runs.is_empty() {
            return Ok(());
        }
        let (address, len, lead) = source.memory_of(blocks.clone());
        buffer[..lead].fill(0);
        let into = &mut buffer[lead..lead + len];
        let read = if source.own.is_some() {
            source.copy_own(address, into);
            Ok(())
        } else {
            source.copy_foreign(&[(address, len)], into)
        };
        if let Err(error) = read {
            for run in runs {
                ledger.put_back(run);
            }
            return Err(error);
        }
        let mut at = 0;
        for block in blocks {
            let len = source.len_of(block..block + 1);
            let content = &buffer[at..at + len];
            at += len;
            let same = match self.index[data].get(block) {
                Some(Entry::ZERO) => is_zero(content),
                Some(entry) => entry.hash == hash(content),
                None => false,
            };
            if !same {
                shared.put_back(data, block..block + 1);
            }
        }
        Ok(())
    }

    pub fn segment(&mut self) -> Result<(), Error> {
        if self.segment.is_none() {
            let number = self.next_segment;
            self.next_segment += 1;
            let created =
                SegmentWriter::create(&self.shared.folder, number, self.manifest.identity);
            match created {
                Ok(segment) => self.segment = Some(segment),
                Err(error) => {
                    let _ = self.shared.folder.remove(&segment_name(number));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Hashes, compares and writes the blocks of a batch.
    pub fn process(&mut self, batch: &Batch, job: Option<&Job>) -> Result<(), Error> {
        if job.is_some_and(Job::is_cancelled) {
            return Ok(());
        }
        self.segment()?;
        let shared = self.shared.clone();
        shared.progress();
        shared.make_way();
        let bytes = batch.buffer.bytes();
        let mut sums = batch.sums.iter();
        let mut pending: Option<(u32, Range<usize>)> = None;
        let mut total = 0;
        for item in &batch.items {
            let source = &shared.sources[item.data];
            let mut at = item.at;
            for block in item.blocks.clone() {
                let len = source.len_of(block..block + 1);
                let content = &bytes[at..at + len];
                let (from, to) = (at, at + len);
                at = to;
                total += len;
                let old = self.index[item.data].get(block);
                let known = sums.next().copied();
                let Some(sum) = known.unwrap_or_else(|| sum(content)) else {
                    if old != Some(Entry::ZERO) {
                        self.set(item.data, block, old, Entry::ZERO);
                    }
                    continue;
                };
                if old.is_some_and(|old| old.kind() != Kind::Zero && old.hash == sum) {
                    // Written, but with the same bytes.
                    continue;
                }
                if let Some(way) = shared.options.compress
                    && let Some(stored) = way.encode(content)
                {
                    self.write_compressed(item.data, block, old, sum, way, &stored)?;
                    continue;
                }
                let segment = self.segment.as_mut().expect("made above");
                let number = segment.number();
                let page = match old {
                    // Not yet visible to anybody: overwritten in place.
                    Some(old) if old.kind() == Kind::Raw && old.segment() == number => old.page(),
                    _ => segment.take(&shared.folder, len)?,
                };
                self.set(
                    item.data,
                    block,
                    old,
                    Entry::new(sum, Kind::Raw, number, page),
                );
                // Blocks that follow each other in the buffer and in the file are one write.
                match &mut pending {
                    Some((first, range))
                        if range.end == from
                            && range.len().is_multiple_of(PAGE)
                            && *first as usize + range.len() / PAGE == page as usize =>
                    {
                        range.end = to;
                    }
                    _ => {
                        if let Some((first, range)) = pending.replace((page, from..to)) {
                            self.write(first, &bytes[range])?;
                        }
                    }
                }
            }
        }
        if let Some((first, range)) = pending {
            self.write(first, &bytes[range])?;
        }
        if let Some(job) = job {
            job.point
                .done_bytes
                .fetch_add(total as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn write(&mut self, page: u32, bytes: &[u8]) -> Result<(), Error> {
        self.pay(bytes.len());
        let shared = self.shared.clone();
        let segment = self.segment.as_mut().expect("made before");
        segment.write(&shared.folder, page, bytes)?;
        shared.progress();
        Ok(())
    }

    fn write_compressed(
        &mut self,
        data: usize,
        block: usize,
        old: Option<Entry>,
        sum: u64,
        way: Compress,
        stored: &[u8],
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        let segment = self.segment.as_mut().expect("made before");
        let page = segment.take(&shared.folder, stored.len())?;
        segment.note_size(page, stored.len());
        let entry = Entry::new(sum, way.kind(), segment.number(), page);
        self.set(data, block, old, entry);
        self.write(page, stored)
    }

    /// Sets an entry; what it replaces in this same segment is not used any more.
    fn set(&mut self, data: usize, block: usize, old: Option<Entry>, new: Entry) {
        let segment = self.segment.as_mut().expect("made before");
        if let Some(old) = old
            && old.kind() != Kind::Zero
            && old.segment() == segment.number()
            && old.page() != new.page()
        {
            let pages = match old.kind() {
                Kind::Raw => self.shared.sources[data]
                    .len_of(block..block + 1)
                    .div_ceil(PAGE) as u32,
                _ => segment.size_at(old.page()),
            };
            segment.drop_pages(old.page()..old.page() + pages);
        }
        self.index[data].set(block, new);
    }

    /// Waits as long as `max_rate` demands.
    fn pay(&mut self, bytes: usize) {
        let Some(rate) = self.shared.options.max_rate else {
            return;
        };
        let now = Instant::now();
        self.paid_until = self.paid_until.max(now) + Duration::from_secs_f64(bytes as f64 / rate);
        // A quarter of a second may be written at once.
        while let Some(wait) = self
            .paid_until
            .checked_duration_since(Instant::now() + Duration::from_millis(250))
        {
            self.shared.progress();
            std::thread::sleep(wait.min(Duration::from_millis(100)));
        }
    }
}

/// Works until the checkpointer is closed and everything asked for is done.
pub fn run(saver: &Mutex<Saver>, shared: &Shared, draining: Option<Draining>) {
    while let Some(command) = shared.next_command() {
        match command {
            Command::Save(job) => {
                job.help_to_cut(shared);
                saver.lock().save(&job);
            }
            Command::Prune(keep) => saver.lock().prune(keep),
        }
        // It found the saver busy, or had given up.
        draining.iter().for_each(Draining::ask);
        shared.command_done();
    }
    drop(draining);
    saver.lock().end();
}

/// Silently tracked blocks in parts of at most [`DRAIN_STEP`] bytes.
fn parts(shared: &Shared, taken: Vec<(usize, Range<usize>)>) -> Vec<(usize, Range<usize>)> {
    let mut parts = Vec::with_capacity(taken.len());
    for (data, mut blocks) in taken {
        let source = &shared.sources[data];
        let step = (DRAIN_STEP / source.block).max(1);
        while !blocks.is_empty() && matches!(source.way, Way::Silent(_)) {
            let part = blocks.start..blocks.end.min(blocks.start + step);
            blocks.start = part.end;
            parts.push((data, part));
        }
    }
    parts
}
