//! The cut: the instant that a point stands for.
//!
//! What is guarded is protected, what else was written is asked for and copied into staging. Nothing is
//! protected again here, so that no processor is interrupted while the caller stands still: the pages that
//! were copied stay writable and count as written until the saver has settled the point (see `saver`).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::checkpointer::Checkpointer;
use crate::copier::{Buffer, Parts, Piece};
use crate::error::Error;
use crate::job::{Job, JobAside};
use crate::point::Point;
use crate::saver::Command;
use crate::shared::Shared;
use crate::source::Way;

/// From so many bytes on a second thread helps to copy. Bytes.
const BY_TWO: usize = 1 << 20;

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
            if !shared.groups.is_empty() {
                // A guard has one cut of a consumer at a time.
                while !state.active.is_empty() {
                    shared.changed.wait(&mut state);
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
                (None, Some(last)) => last + 1,
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
            copied
        };
        if let Err(error) = result {
            job.cancel(error);
            shared.take_back(&job);
            shared.end(&job, Err(job.reason()));
        }
        job.end_of_cut();
        hand_over();
        job.point.stalled(began.elapsed());
        Ok(job.point.clone())
    }

    /// The cut: protects what is guarded, asks what else was written, and copies that.
    /// `hand_over` sets the saver to work: at once if staging would not hold it all, or if it can help to copy;
    /// else at the end, for two threads that work on memory slow each other down. Who helps takes small
    /// pieces, so that the cut never waits for a thread that the machine does not run.
    fn copy_aside(&self, job: &Arc<Job>, hand_over: &(dyn Fn() + Sync)) -> Result<(), Error> {
        let shared = &self.shared;
        let mut total = 0;
        for (number, group) in shared.groups.iter().enumerate() {
            let Some(guard) = group.memory.guard() else {
                continue;
            };
            let aside = Arc::new(JobAside {
                shared: shared.clone(),
                job: job.clone(),
                group: number,
            });
            let (cut, pending) = guard.cut(group.consumer, aside)?;
            total += pending.iter().map(ExactSizeIterator::len).sum::<usize>() * guard.block();
            job.guarded.lock().push((number, cut, pending));
        }
        let mut parts = Parts::new();
        for (data, source) in shared.sources.iter().enumerate() {
            match &source.way {
                Way::Guarded(_) => {}
                Way::Copied => parts.push((data, std::iter::once(0..source.blocks()).collect())),
                Way::Silent(ledger) => {
                    let pages = ledger.take_written()?;
                    let mut blocks: Vec<Range<usize>> = Vec::with_capacity(pages.len());
                    let mut edges = source.edges();
                    let dirty = pages
                        .into_iter()
                        .map(|run| source.blocks_of_pages(ledger, run, shared.page));
                    edges.extend(dirty);
                    edges.sort_unstable_by_key(|run| run.start);
                    for run in edges {
                        match blocks.last_mut() {
                            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                            _ => blocks.push(run),
                        }
                    }
                    parts.push((data, blocks));
                }
            }
        }
        let copied: usize = parts
            .iter()
            .flat_map(|(data, runs)| {
                runs.iter()
                    .map(|run| shared.sources[*data].len_of(run.clone()))
            })
            .sum();
        total += copied;
        job.point.total_bytes.store(total as u64, Ordering::Relaxed);
        // What was taken is known before anything can fail.
        *job.taken.lock() = parts
            .iter()
            .flat_map(|(data, runs)| runs.iter().map(|run| (*data, run.clone())))
            .collect();
        for (data, runs) in &parts {
            if shared.sources[*data].own.is_some() && !runs.is_empty() {
                shared.sources[*data].still_there()?;
            }
        }
        let mut next = || {
            let stop = || job.is_cancelled() || shared.failing();
            let chunk = shared.staging.take(&stop);
            if chunk.is_none() {
                // Blocks of this cut are with the save that failed, and nobody makes room.
                job.cancel(Error::Memory(
                    "an earlier save, or the drain, failed during the cut of this point; save again".into(),
                ));
            }
            chunk.map(Buffer::Chunk)
        };
        let all = copied;
        job.share_out(pieces(parts, |data, run| shared.sources[data].len_of(run)));
        if all > shared.options.staging / 2 {
            // It will need the saver's help to get room.
            shared.copying.store(false, Ordering::Release);
            job.help_is_done();
            hand_over();
        } else if all >= BY_TWO {
            hand_over();
        }
        let copied = job.copy_shares(shared, &mut next);
        job.end_help()?;
        copied
    }
}

impl Shared {
    fn method(&self) -> Vec<(String, &'static str)> {
        self.arrays
            .iter()
            .map(|(name, _, data)| (name.clone(), self.sources[*data].why))
            .collect()
    }
}

/// Parts cut into pieces of about [`PIECE`] bytes, in order.
fn pieces(parts: Parts, len: impl Fn(usize, Range<usize>) -> usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (data, runs) in parts {
        let (mut piece, mut bytes) = (Vec::new(), 0);
        for mut run in runs {
            while !run.is_empty() {
                let whole = len(data, run.clone());
                let room = PIECE - bytes;
                let blocks = (run.len() * room)
                    .div_ceil(whole.max(1))
                    .clamp(1, run.len());
                let part = run.start..run.start + blocks;
                run.start = part.end;
                bytes += len(data, part.clone());
                piece.push(part);
                if bytes >= PIECE {
                    pieces.push((data, std::mem::take(&mut piece)));
                    bytes = 0;
                }
            }
        }
        if !piece.is_empty() {
            pieces.push((data, piece));
        }
    }
    pieces
}
