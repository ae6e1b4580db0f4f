//! Resolvers of served memory: what a missing, a minor and a write-protect fault mean there.
//!
//! Unsafe: puts zeros, and what the page cache holds, into the memory of another process. What makes it right is
//! said in `delivery`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use userfault_uffd::abi::{UFFDIO_CONTINUE_MODE_WP, UFFDIO_COPY_MODE_WP};

use super::delivery::{self, Members, PAUSES, Put, after_events};
use super::process::{Piece, Process};
use super::protection;
use crate::block::{Answer, Fault, Purpose, answer};
use crate::engine::Engine;
use crate::fill::Filling;
use crate::memory::{HUGE, small_page};
use crate::staging;
use crate::stats::add;
use crate::workers::{Lead, Touch};

/// What is to be done for a touch once the lock is let go.
enum Next {
    Nothing,
    Fill(Arc<Piece>, u32),
    Put(Put),
}

impl Engine {
    /// Answers a fault of a served process.
    pub(crate) fn answer_served(&'static self, touch: &Touch, lead: &mut Lead) {
        let Some(process) = self.peers.get(touch.process) else {
            return;
        };
        let mut pause = PAUSES.0;
        loop {
            let next = look_up(&process, &process.family.members.read(), touch);
            match next {
                Next::Nothing => return,
                Next::Fill(piece, block) => {
                    self.look_ahead(&piece.body, block, touch.thread);
                    let filling = Filling::new(piece.body.clone(), block, touch.thread, touch.read);
                    return self.fill(filling, lead);
                }
                Next::Put(Put::Done) => return,
                Next::Put(Put::Gone) => return process.retire(self),
                Next::Put(Put::Pending | Put::Unwoken) => {
                    after_events(self, &process, &mut pause, lead);
                }
                Next::Put(Put::Failed(errno)) => {
                    // Only a machine out of memory comes here. The touch sleeps, and is tried again.
                    if errno != libc::ENOMEM {
                        crate::say::line(&format!(
                            "userfault: {}: a touch of {:#x} cannot be answered: {}",
                            process.family.terms.name,
                            touch.address,
                            io::Error::from_raw_os_error(errno)
                        ));
                        return;
                    }
                    after_events(self, &process, &mut pause, lead);
                }
            }
        }
    }
}

/// What a touch means, and what can be done about it at once.
fn look_up(process: &Process, members: &Members<'_>, touch: &Touch) -> Next {
    let Some(member) = members.get(&process.id) else {
        return Next::Nothing;
    };
    let Some(segment) = member.layout.find(touch.address) else {
        // Memory that is registered and that nobody told of: it grew, or is left over from a move.
        return match touch.fault {
            Fault::WriteProtect => {
                Next::Put(protection::lift_one(process, touch.address, small_page()))
            }
            _ => Next::Put(settled(process, touch, small_page())),
        };
    };
    let piece = &segment.piece;
    let body = &piece.body;
    let page = piece.page();
    let offset = segment.offset + (touch.address - segment.at);
    let block = (offset / body.block) as u32;
    let counters = &body.counters;
    counters.faulted(touch.fault);
    if touch.fault == Fault::WriteProtect {
        return Next::Put(protection::first_write(
            process,
            segment,
            block,
            touch.address,
            offset / page,
        ));
    }
    // What the page cache holds has been delivered, by whomever.
    if touch.fault == Fault::Minor {
        piece.owed.lock().remove(offset / page..offset / page + 1);
    }
    if !piece.owed.lock().contains(offset / page) {
        return Next::Put(settled(process, touch, page));
    }
    let mut table = body.lock();
    if table.closed {
        return Next::Nothing;
    }
    match answer(table.state(block), Fault::Missing, || true) {
        Answer::Fill => {
            table.claim(block, Purpose::Fill);
            Next::Fill(piece.clone(), block)
        }
        Answer::Wait => {
            table.wait(block);
            add(&counters.waits, 1);
            Next::Nothing
        }
        Answer::Poison => {
            drop(table);
            match delivery::poison_once(process, member, body, &piece.owed, block) {
                Put::Done => {
                    process.wake_page(touch.address, page);
                    Next::Nothing
                }
                // Not to be poisoned on this kernel: it sleeps on.
                Put::Failed(_) => Next::Nothing,
                put => Next::Put(put),
            }
        }
        _ => {
            drop(table);
            process.wake_page(touch.address, page);
            Next::Nothing
        }
    }
}

/// Answers a touch of a page that is not owed: it is zeros, or what the page cache holds.
fn settled(process: &Process, touch: &Touch, page: usize) -> Put {
    let put = if touch.fault == Fault::Minor {
        let mode = if process.family.terms.track {
            UFFDIO_CONTINUE_MODE_WP
        } else {
            0
        };
        let start = touch.address / page * page;
        // SAFETY: the page cache of the other process's memory holds what that process put there, or what
        // was delivered.
        Put::of(unsafe { process.uffd.continue_(start, page, mode) })
    } else {
        zeros(process, touch.address, page)
    };
    match put {
        Put::Unwoken => {
            // It is there, or the place is gone: asking again tells.
            process.wake_page(touch.address, page);
            Put::Done
        }
        Put::Done => {
            process.rested.store(true, Ordering::Relaxed);
            Put::Done
        }
        put => put,
    }
}

/// Puts a page of zeros in place.
fn zeros(process: &Process, address: usize, page: usize) -> Put {
    let track = process.family.terms.track;
    let start = address / page * page;
    if page == small_page() && !track {
        // SAFETY: a page that is not owed and missing is zeros.
        let put = Put::of(unsafe { process.uffd.zeropage(start, page, 0) });
        if put != Put::Failed(libc::EINVAL) {
            return put;
        }
        // Huge pages that nobody told of.
        return copy_zeros(process, address / HUGE * HUGE, HUGE, 0);
    }
    copy_zeros(
        process,
        start,
        page,
        if track { UFFDIO_COPY_MODE_WP } else { 0 },
    )
}

fn copy_zeros(process: &Process, start: usize, page: usize, mode: u64) -> Put {
    let engine = Engine::existing().expect("it serves");
    staging::with(engine, page, |buffer| {
        buffer.fill(0);
        // SAFETY: as for `zeros`; the buffer is this thread's own.
        Put::of(unsafe { process.uffd.copy(start, buffer.as_ptr().addr(), page, mode) })
    })
}
