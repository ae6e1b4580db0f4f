//! Storing guarded memory behind a cut: one thread copies and hashes blocks, the saver writes them.
//!
//! Copying is bound by memory and writing by the system calls, so that two threads are nearly twice as fast
//! as one. A few buffers go round between them, which stay in the caches.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use userfault_engine::tracked::{Guard, Saved};

use crate::copier::{Batch, Buffer, Copier};
use crate::error::Error;
use crate::job::Job;
use crate::saver::Saver;
use crate::shared::{Group, Shared};
use crate::staging::CHUNK;

/// Batches between the two.
const AHEAD: usize = 2;

/// How long the saver waits for the next one before it looks for those of writers.
const PATIENCE: Duration = Duration::from_millis(1);

impl Saver {
    /// Stores what is pending of one cut of guarded memory.
    pub fn store_guarded(
        &mut self,
        job: &Job,
        group: &Group,
        guard: &Guard,
        cut: u64,
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        let (full, batches) = sync_channel(AHEAD);
        let (empty, buffers) = channel();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let copying = {
                let _blocked = userfault_engine::BlockedSignals::all();
                std::thread::Builder::new()
                    .name("userfault-copy".into())
                    .spawn_scoped(scope, || {
                        copy_pending(&shared, job, group, guard, cut, full, buffers, &stop);
                    })
            };
            let stored = match copying {
                Ok(_) => self.store_batches(job, &batches, &empty),
                Err(error) => Err(Error::Memory(format!(
                    "no thread could be started: {error}"
                ))),
            };
            stop.store(true, Ordering::Release);
            // Whoever waits to hand over a batch hears that nobody takes it.
            drop(batches);
            stored
        })
    }

    fn store_batches(
        &mut self,
        job: &Job,
        batches: &Receiver<Batch>,
        empty: &Sender<Vec<u8>>,
    ) -> Result<(), Error> {
        loop {
            while let Some(batch) = job.pop() {
                self.process(&batch, Some(job))?;
            }
            match batches.recv_timeout(PATIENCE) {
                Ok(batch) => {
                    self.process(&batch, Some(job))?;
                    if let Buffer::Own(buffer) = batch.buffer {
                        // If nobody needs it any more it is freed.
                        let _ = empty.send(buffer);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }
}

/// Copies pending blocks one after the other until there are none, nobody takes them, or the job is given up.
#[allow(
    clippy::too_many_arguments,
    reason = "what a thread is given, by the one caller"
)]
fn copy_pending(
    shared: &Shared,
    job: &Job,
    group: &Group,
    guard: &Guard,
    cut: u64,
    full: SyncSender<Batch>,
    buffers: Receiver<Vec<u8>>,
    stop: &AtomicBool,
) {
    let mut from = 0;
    while !job.is_cancelled() && !stop.load(Ordering::Acquire) {
        let mut copied = Vec::new();
        let saved = guard.save_next(cut, from, |offset, len, _| {
            let mut next = || {
                let buffer = buffers.try_recv().unwrap_or_else(|_| vec![0; CHUNK]);
                Some(Buffer::Own(buffer))
            };
            let mut take = |batch| copied.push(batch);
            let mut copier = Copier::new(&shared.sources, &mut next, &mut take);
            copier.hashing(true);
            for &data in &group.arrays {
                let blocks = shared.sources[data].blocks_at(group.memory.start() + offset, len);
                if !blocks.is_empty() {
                    // Our own memory: reading it does not fail.
                    let _ = copier.copy(data, blocks);
                }
            }
            let _ = copier.send();
        });
        for batch in copied {
            if full.send(batch).is_err() {
                return;
            }
        }
        match saved {
            Saved::Block(block) => from = block + 1,
            Saved::Busy => job.wait_for_batch(),
            Saved::All => return,
        }
    }
}
