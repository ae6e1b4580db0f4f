//! The cut: the instant that a point stands for.
//!
//! What was written of silently tracked memory is asked for and copied into staging. It is not protected again
//! here, so that no processor is interrupted while the caller stands still: the pages that were copied stay
//! writable and count as written until the saver has settled the point (see `saver`). What is guarded is
//! protected last, since first writes to it are held until the cut is over.

use std::cell::{Cell, LazyCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use userfault_engine::elsewhere::Elsewhere;
use userfault_engine::tracked::{Held, Ledger};

use crate::checkpointer::Checkpointer;
use crate::copier::{Batch, Buffer, Copier, Piece};
use crate::error::Error;
use crate::job::{Job, JobAside};
use crate::point::Point;
use crate::saver::Command;
use crate::shared::Shared;
use crate::shares::Task;
use crate::source::{Source, Way};
use crate::staging::CHUNK;

/// From so many bytes on a second thread helps to copy. Bytes.
const BY_TWO: usize = 1 << 20;

/// What one question to the kernel is about, bytes: a multiple of every block.
const QUESTION: usize = 32 << 20;

/// From so many questions on a second thread helps to ask.
const MANY_QUESTIONS: usize = 8;

/// Chunks on their way to a saver that sets the pace.
const HOT_CHUNKS: usize = 4;

/// What one of the two takes at a time: the cut waits for the other at most as long as this takes. Bytes.
const PIECE: usize = 256 << 10;

impl Checkpointer {
    pub(crate) fn cut(&self, step: Option<u64>, meta: String) -> Result<Arc<Point>, Error> {
        let shared = &self.shared;
        let began = Instant::now();
        let job = {
            let mut state = shared.state.lock();
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            if state.closing {
                // Since it was asked first: from here on the saver knows of this cut.
                return Err(Error::Closed);
            }
            if !shared.groups.is_empty() {
                // A guard has one cut of a consumer at a time.
                while !state.active.is_empty() {
                    shared.changed.wait(&mut state);
                }
                if state.closing {
                    return Err(Error::Closed);
                }
                if let Some(error) = state.failed.take() {
                    return Err(error);
                }
            }
            let step = match (step, state.last_step()) {
                (Some(step), Some(last)) if step <= last => {
                    return Err(Error::Invalid(format!(
                        "step {step} does not come after step {last}, the last one saved"
                    )));
                }
                (Some(step), _) => step,
                (None, Some(last)) => last.checked_add(1).ok_or_else(|| {
                    Error::Invalid(format!("no step comes after {last}, the last one saved"))
                })?,
                (None, None) => 0,
            };
            let point = Arc::new(Point::new(step, shared.method()));
            let job = Arc::new(Job::new(point, meta));
            if state.active.is_empty() {
                shared.progress();
            }
            state.active.push(job.clone());
            job
        };
        let handed_over = AtomicBool::new(false);
        let hand_over = || {
            if !handed_over.swap(true, Ordering::Relaxed) {
                let mut state = shared.state.lock();
                state.queue.push_back(Command::Save(job.clone()));
                drop(state);
                // Not on the caller's processor: there it would go first, for milliseconds.
                let _elsewhere = Elsewhere::keep(shared.saver.load(Ordering::Relaxed));
                shared.changed.notify_all();
            }
        };
        let result = {
            let _cutting = shared.cutting.lock();
            let failures = shared.failures.load(Ordering::Relaxed);
            job.failures.store(failures, Ordering::Relaxed);
            job.cut.store(
                shared.cuts.fetch_add(1, Ordering::Relaxed) + 1,
                Ordering::Relaxed,
            );
            shared.copying.store(true, Ordering::Release);
            let copied = self.copy_aside(&job, &hand_over);
            shared.copying.store(false, Ordering::Release);
            copied.and_then(|()| self.protect(&job))
        };
        let held = match result {
            Ok(held) => held,
            Err(error) => {
                job.cancel(error);
                shared.take_back(&job);
                shared.end(&job, Err(job.reason()));
                Vec::new()
            }
        };
        job.end_of_cut();
        // Before the saver is woken: the processor of a writer that was held is idle, and is to be the writer's.
        drop(held);
        hand_over();
        job.point.stalled(began.elapsed());
        Ok(job.point.clone())
    }

    /// The silent part of the cut: asks what was written, and copies that.
    /// `hand_over` sets the saver to work: at once if staging would not hold it all, or if it can help to copy;
    /// else at the end, for two threads that work on memory slow each other down, and a thread that has no
    /// processor of its own takes that of the caller. Who helps takes small pieces, so that the cut never waits
    /// long for a thread that the machine does not run.
    fn copy_aside(&self, job: &Arc<Job>, hand_over: &(dyn Fn() + Sync)) -> Result<(), Error> {
        let shared = &self.shared;
        let (mut questions, mut copies) = (VecDeque::new(), Vec::new());
        for (data, source) in shared.sources.iter().enumerate() {
            match &source.way {
                Way::Guarded(_) => {}
                Way::Copied => copies.push((data, 0..source.blocks())),
                Way::Silent(ledger) => {
                    questions.extend(steps(ledger).map(|pages| Task::Ask(data, pages)));
                    copies.extend(source.edges().into_iter().map(|blocks| (data, blocks)));
                }
            }
            if source.own.is_some() && !matches!(source.way, Way::Guarded(_)) {
                source.still_there()?;
            }
        }
        let copied: usize = copies
            .iter()
            .map(|(data, blocks)| shared.sources[*data].len_of(blocks.clone()))
            .sum();
        job.point
            .total_bytes
            .store(copied as u64, Ordering::Relaxed);
        job.taken.lock().extend(copies.iter().cloned());
        let many = questions.len() >= MANY_QUESTIONS;
        // Asked only by a cut that has work for two: it is a file to be read.
        let spare = LazyCell::new(|| shared.processors.idle());
        let mut tasks = questions;
        for (data, blocks) in copies {
            let pieces = pieces(&shared.sources[data], data, vec![blocks]);
            tasks.extend(pieces.into_iter().map(Task::Copy));
        }
        job.shares.share_out(tasks, copied);
        if many && *spare {
            hand_over();
        }
        let mut lent = 0;
        // As long as the rest does not fit into staging, the saver sets the pace.
        let paced = Cell::new(false);
        let mut next = || {
            let stop = || job.is_cancelled() || shared.failing();
            let (bytes, staging) = (job.shares.bytes(), shared.staging.len());
            let left = bytes.saturating_sub(lent * CHUNK);
            lent += 1;
            paced.set(left > staging);
            // Few chunks that go round stay in the caches.
            let most = if paced.get() { HOT_CHUNKS } else { usize::MAX };
            let chunk = shared.staging.take_within(most, &stop);
            if chunk.is_none() {
                // Blocks of this cut are with the save that failed, and nobody makes room.
                job.cancel(Error::Memory(
                    "an earlier save, or the drain, failed during the cut of this point; save again".into(),
                ));
            }
            chunk.map(Buffer::Chunk)
        };
        let mut over = false;
        let mut look = |bytes: usize| {
            if shared.over(bytes) && !over {
                // It will need the saver to get room.
                over = true;
                shared.copying.store(false, Ordering::Release);
                job.shares.no_help();
            }
            if over || (bytes >= BY_TWO && *spare) {
                hand_over();
            }
        };
        let copied = job.do_shares(shared, &mut next, &mut look, &|| paced.get(), false);
        let helped = job.shares.wait_for_help();
        copied.and(helped)
    }

    /// Protects what is guarded. First writes to it are held as long as the answer lives: it is the last part of
    /// the cut, and short.
    fn protect(&self, job: &Arc<Job>) -> Result<Vec<Held<'_>>, Error> {
        let shared = &self.shared;
        let mut held = Vec::new();
        for (number, group) in shared.groups.iter().enumerate() {
            let Some(guard) = group.memory.guard() else {
                continue;
            };
            let aside = Arc::new(JobAside {
                shared: shared.clone(),
                job: job.clone(),
                group: number,
            });
            let begun = guard.cut(group.consumer, aside)?;
            held.push(begun.held);
            let blocks: usize = begun.pending.iter().map(ExactSizeIterator::len).sum();
            job.point
                .total_bytes
                .fetch_add((blocks * guard.block()) as u64, Ordering::Relaxed);
            job.guarded.lock().push((number, begun.id, begun.pending));
        }
        Ok(held)
    }
}

impl Job {
    /// Does tasks of the cut until there are none, and gives what was copied to the saver. Ends early if there
    /// is no buffer. `look` hears before each task how many bytes the cut copies, as far as that is known. While
    /// the cut is `paced` it waits for the saver, and whoever copies takes work from that.
    fn do_shares(
        &self,
        shared: &Shared,
        next: &mut dyn FnMut() -> Option<Buffer>,
        look: &mut dyn FnMut(usize),
        paced: &dyn Fn() -> bool,
        saver: bool,
    ) -> Result<(), Error> {
        let mut full = |batch: Batch| self.push(batch);
        let mut copier = Copier::new(&shared.sources, next, &mut full);
        loop {
            look(self.shares.bytes());
            match self.shares.next(saver) {
                None => return copier.send(),
                Some(Task::Ask(data, pages)) => {
                    let answer = self.ask(shared, data, pages);
                    if answer.is_err() {
                        self.shares.give_up(true);
                    }
                    let (pieces, bytes) = answer?;
                    self.shares.answered(pieces, bytes);
                }
                Some(Task::Copy((data, runs))) => {
                    copier.past_caches(!paced());
                    copier.hashing(paced());
                    let copied = runs
                        .into_iter()
                        .try_fold(true, |going, run| Ok(going && copier.copy(data, run)?))
                        .and_then(|going| {
                            // What is put off is copied before the next task: nobody waits for long.
                            if going {
                                copier.catch_up()?;
                            }
                            Ok(going)
                        });
                    if !matches!(copied, Ok(true)) {
                        // Given up by somebody who has said why, or failed: nobody needs the rest.
                        self.shares.give_up(false);
                        return copied.map(|_| ());
                    }
                }
            }
        }
    }

    /// Asks which pages of a range were written: their blocks in pieces, and bytes.
    fn ask(
        &self,
        shared: &Shared,
        data: usize,
        pages: Range<usize>,
    ) -> Result<(Vec<Piece>, usize), Error> {
        let source = &shared.sources[data];
        let Way::Silent(ledger) = &source.way else {
            return Ok((Vec::new(), 0));
        };
        let mut blocks: Vec<Range<usize>> = Vec::new();
        for run in ledger.take_written(pages)? {
            let run = source.blocks_of_pages(ledger, run, shared.page);
            match blocks.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => blocks.push(run),
            }
        }
        // What was taken is known before anything can fail.
        let taken = blocks.iter().map(|run| (data, run.clone()));
        self.taken.lock().extend(taken);
        let bytes = blocks.iter().map(|run| source.len_of(run.clone())).sum();
        self.point
            .total_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
        Ok((pieces(source, data, blocks), bytes))
    }

    /// Does tasks of a cut that is going on, on the saver's thread.
    pub fn help_to_cut(&self, shared: &Shared) {
        if !self.shares.begin_help() {
            return;
        }
        // The saver itself is who makes room in staging, so it does not wait for any.
        let mut next = || {
            let chunk = shared.staging.try_take();
            Some(chunk.map_or_else(|| Buffer::Own(vec![0; CHUNK]), Buffer::Chunk))
        };
        let result = self.do_shares(shared, &mut next, &mut |_| {}, &|| false, true);
        self.shares.end_help(result);
    }
}

impl Shared {
    /// True if a cut of so many bytes needs the saver to make room in staging. The last chunk of each of the two
    /// who copy may be nearly empty.
    fn over(&self, bytes: usize) -> bool {
        bytes + 2 * CHUNK > self.staging.len()
    }

    fn method(&self) -> Vec<(String, &'static str)> {
        self.arrays
            .iter()
            .map(|(name, _, data)| (name.clone(), self.sources[*data].why))
            .collect()
    }
}

/// The pages of a ledger in parts that one question is about. They end where blocks end.
fn steps(ledger: &Ledger) -> impl Iterator<Item = Range<usize>> {
    let (start, end) = (ledger.start(), ledger.start() + ledger.len());
    let page = ledger.page();
    (start / QUESTION..end.div_ceil(QUESTION)).map(move |number| {
        let from = (number * QUESTION).max(start);
        let to = ((number + 1) * QUESTION).min(end);
        (from - start) / page..(to - start) / page
    })
}

/// Blocks of an array in pieces of about [`PIECE`] bytes, in order.
fn pieces(source: &Source, data: usize, runs: Vec<Range<usize>>) -> Vec<Piece> {
    let most = (PIECE / source.block).max(1);
    let mut pieces = Vec::new();
    let (mut piece, mut blocks) = (Vec::new(), 0);
    for mut run in runs {
        while !run.is_empty() {
            let part = run.start..run.end.min(run.start + most - blocks);
            run.start = part.end;
            blocks += part.len();
            piece.push(part);
            if blocks == most {
                pieces.push((data, std::mem::take(&mut piece)));
                blocks = 0;
            }
        }
    }
    if !piece.is_empty() {
        pieces.push((data, piece));
    }
    pieces
}
