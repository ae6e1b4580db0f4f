//! Fills that a handler of SIGBUS had to leave in the middle, and how a thread of the engine ends them.
//!
//! The handler has taken room for the block and a promise of a place in the pool's queue, the block is in state Filling,
//! and some of its pages are mapped. All of that is the thread's from here on. It does what
//! [`halfway`](crate::halfway) says, and then what the handler would have done.

use std::sync::Arc;

use super::Request;
use crate::block::State;
use crate::body::Body;
use crate::engine::Engine;
use crate::halfway::Halfway;
use crate::staging;
use crate::trace::Kind;
use crate::workers::Lead;

/// A fill to be ended.
pub(crate) struct Left {
    body: Arc<Body>,
    block: u32,
    /// The thread that touched.
    thread: u32,
    /// Bytes of the block that are in memory.
    placed: usize,
}

impl Engine {
    /// The fill that a handler left, if that is what it says.
    pub(super) fn left_halfway(&self, request: &Request) -> Option<Left> {
        let placed = request.placed()?;
        let body = self.at(request.address)?;
        let block = ((request.address - body.memory.main()) / body.block) as u32;
        Some(Left {
            body,
            block,
            thread: request.thread,
            placed,
        })
    }

    /// Ends a fill in a handler's place.
    pub(crate) fn end_for_handler(&'static self, left: &Left, lead: &mut Lead) {
        let (body, block, placed) = (&left.body, left.block, left.placed);
        let missing = body.block_len(block) - placed;
        let ended = if missing == 0 {
            self.end_halfway(body, block, placed, Some(&[]), lead)
        } else {
            // Whoever waits for the block has a deadline, whatever the store does.
            lead.give_up();
            staging::with(self, missing, |rest| {
                let read = body.read_store(body.start(block) + placed, rest, false);
                let rest = matches!(read, Ok(true)).then_some(&*rest);
                self.end_halfway(body, block, placed, rest, lead)
            })
        };
        match ended {
            Halfway::Whole => {
                let spans = {
                    let mut table = body.lock();
                    self.mapped_in_handler(&mut table, body, block, left.thread, false);
                    table.settle_spans()
                };
                self.trace(Kind::Missing, body, block, left.thread);
                self.settle_in_handler(body, spans);
            }
            Halfway::Dropped => {
                self.give_back_in_handler(body, body.block_len(block) as u64);
                let _ = body.release(&mut body.lock(), block, State::Absent);
            }
        }
    }
}
