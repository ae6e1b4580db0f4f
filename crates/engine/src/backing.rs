//! Where the bytes of a block go: into a region of this process, or into the memory of another one.
//!
//! The loop, the table, deadlines, retries and poison are the same for both; this is what differs. Nothing
//! here decides: `fill` decides when, the backing knows how.

use std::fmt::Debug;
use std::io;

use crate::body::Body;
use crate::engine::Engine;
use crate::fill::{Filling, Tried};
use crate::workers::Lead;

/// What a region's blocks are put into.
pub(crate) trait Backing: Debug + Send + Sync {
    /// Brings in an absent block, which is in state Filling and belongs to `filling`: reads it, puts it in
    /// place, and releases it unless that failed.
    fn fill(&self, engine: &'static Engine, filling: &Filling, lead: &mut Lead) -> Tried;

    /// Wakes whoever sleeps on a block.
    fn wake(&self, engine: &Engine, body: &Body, block: u32);

    /// Makes every touch of what is absent of a block SIGBUS. The block is owned, in state Poisoning, and no lock
    /// is held.
    fn poison(&self, engine: &Engine, body: &Body, block: u32) -> io::Result<()>;

    /// The block could not even be poisoned, and nobody may read it. Says what happens to it instead.
    fn forbid(&self, body: &Body, block: u32) -> &'static str;
}

/// Memory that this process has mapped itself: `memory` and `kernel` say how.
#[derive(Debug)]
pub(crate) struct Here;

impl Backing for Here {
    fn fill(&self, engine: &'static Engine, filling: &Filling, lead: &mut Lead) -> Tried {
        engine.fill_here(filling, lead)
    }

    fn wake(&self, engine: &Engine, body: &Body, block: u32) {
        engine.wake_here(body, block);
    }

    fn poison(&self, engine: &Engine, body: &Body, block: u32) -> io::Result<()> {
        engine.poison(body, &mut body.lock(), block)
    }

    fn forbid(&self, body: &Body, block: u32) -> &'static str {
        body.memory.forbid(body.start(block), body.block_len(block));
        "the block is made inaccessible"
    }
}
