//! Convoys: neighbouring small blocks that a walk will touch, brought in at one go.
//!
//! A block of 4 KiB by itself is a read, a UFFDIO_COPY and a claim; a convoy has one of each for all of its blocks, as
//! long as the store answers without waiting. Whatever does not go smoothly is left to the way of single blocks (see
//! `fill`), which knows how to wait, to retry, and to tell.
//!
//! ```text
//!   room for all (nothing is owned yet) -> claim -> read now -> one UFFDIO_COPY -> each settles by itself
//!                                                      |              | broke off: what is whole stays, the block
//!                                                      |              | in which it broke ends as any such fill, the
//!                                                      |              | others are tried one by one
//!                                                      v would wait, or failed
//!                                              released, as if nothing had been
//! ```
//!
//! A sum over 256 MiB through 128 MiB in blocks of 4 KiB makes 2,100 calls of the kernel to read and to copy this way
//! and 130,000 without.

use std::ops::Range;
use std::sync::Arc;

use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::fill::{Filling, Tried};
use crate::memory::Kind;
use crate::staging;
use crate::table::Table;
use crate::trace;
use crate::workers::Lead;

/// Bytes of a convoy at most, and the part of the limit: one in so many.
const LONGEST: (u64, u64) = (256 << 10, 64);

impl Engine {
    /// How many blocks of a region come in one convoy at most. Less than two: there are none.
    pub(crate) fn convoy(&self, body: &Body) -> u32 {
        if body.memory.kind() == Kind::Elsewhere || !body.by_copy() {
            return 0;
        }
        let limit = self.pool_of(body).figures().limit;
        (LONGEST.0.min(limit / LONGEST.1) / body.block as u64) as u32
    }

    /// Brings in what is absent of some neighbours, at one go. False if something of it has to be done one by one.
    pub(crate) fn bring_in_convoy(
        &'static self,
        body: &Arc<Body>,
        blocks: Range<u32>,
        lead: &mut Lead,
    ) -> bool {
        let mut next = blocks.start;
        while next < blocks.end {
            let absent = self.absent(body, &body.lock(), next..blocks.end);
            next = absent.end + 1;
            if !absent.is_empty() && !self.bring_in_absent(body, absent, lead) {
                return false;
            }
        }
        true
    }

    /// The first blocks of a range that are absent and alike.
    fn absent(&self, body: &Body, table: &Table, mut blocks: Range<u32>) -> Range<u32> {
        let presumed = self.presumes_written(body, blocks.start);
        let fits = |block: &u32| {
            table.state(*block) == State::Absent && self.presumes_written(body, *block) == presumed
        };
        blocks.end = blocks
            .clone()
            .find(|block| !fits(block))
            .unwrap_or(blocks.end);
        blocks
    }

    fn bring_in_absent(
        &'static self,
        body: &Arc<Body>,
        blocks: Range<u32>,
        lead: &mut Lead,
    ) -> bool {
        let asked = body.len_of(&blocks);
        // Whoever makes room may wait for a store: nobody's block must wait with it.
        if !self.make_room(body, asked as u64, 0, lead) {
            return false;
        }
        let fillings = self.claim_convoy(body, blocks.clone());
        let blocks = blocks.start..blocks.start + fillings.len() as u32;
        let len = body.len_of(&blocks);
        self.give_back(body, (asked - len) as u64);
        if fillings.is_empty() {
            return false;
        }
        let done = staging::with(self, len, |bytes| {
            let read = body.read_store(body.start(blocks.start), bytes, true);
            if !matches!(read, Ok(true)) {
                return false;
            }
            self.put_convoy_in_place(body, fillings, bytes, lead);
            true
        });
        let mut table = body.lock();
        let mut waited = Vec::new();
        if !done {
            waited.extend(blocks.filter(|block| body.release(&mut table, *block, State::Absent)));
        }
        self.fill_ended(body, &mut table);
        drop(table);
        if !done {
            self.give_back(body, len as u64);
        }
        for block in waited {
            self.wake(body, block);
        }
        done
    }

    /// Claims neighbours from the first on. All of them count as one fill.
    fn claim_convoy(&self, body: &Arc<Body>, blocks: Range<u32>) -> Vec<Filling> {
        let mut table = body.lock();
        table.fills.began();
        let door = self.door(body, &table);
        let mut claimed = blocks.start..blocks.start;
        if !table.closed && !door.is_narrow() && !table.fills.is_crowded(door) {
            let absent = self.absent(body, &table, blocks);
            claimed.end = absent
                .clone()
                .find(|block| !table.claim(*block, Purpose::Fill))
                .unwrap_or(absent.end);
        }
        if claimed.is_empty() {
            table.fills.ended();
        }
        drop(table);
        claimed
            .map(|block| {
                self.trace(trace::Kind::Ahead, body, block, 0);
                Filling::ahead(body.clone(), block)
            })
            .collect()
    }

    fn put_convoy_in_place(
        &'static self,
        body: &Body,
        fillings: Vec<Filling>,
        mut bytes: &[u8],
        lead: &mut Lead,
    ) {
        let mut placed = 0;
        let first = fillings[0].block;
        let all = fillings
            .iter()
            .try_for_each(|filling| self.uncovered(body, filling.block))
            .and_then(|()| self.map_copy(body, first, bytes, &mut placed));
        let mut broken = all.err();
        for filling in fillings {
            let block;
            (block, bytes) = bytes.split_at(body.block_len(filling.block));
            self.note_content(body, filling.block, block);
            let tried = if placed >= block.len() {
                placed -= block.len();
                Tried::mapped()
            } else if let Some(error) = broken.take() {
                self.broke_off(&filling, block, std::mem::take(&mut placed), error, lead)
            } else {
                self.put_in_place(&filling, block, lead)
            };
            self.settle(&filling, &tried);
            self.follow(filling, tried, lead);
        }
    }
}
