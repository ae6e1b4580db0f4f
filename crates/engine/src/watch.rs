//! The debug option: blocks that are not dirty must leave memory as they came.
//!
//! With USERFAULT_DEBUG=hash in the environment every block is hashed when it is mapped, when it has been
//! protected for a write-back, and again when it is released: by eviction, or when its region is closed. If
//! nobody was seen to write it in between and the bytes differ, a write was missed: the process says where and
//! aborts, rather than lose it. `make soak` runs with it. Private memory, which nobody can write, is left out.

use std::hash::{DefaultHasher, Hasher};

use crate::block::State;
use crate::body::Body;
use crate::engine::Engine;

/// True if the environment asks for it.
pub(crate) fn asked_for() -> bool {
    std::env::var("USERFAULT_DEBUG").is_ok_and(|value| value.split(',').any(|word| word == "hash"))
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

impl Engine {
    /// Notes what an owned, unmapped block holds before it is mapped.
    pub(crate) fn note_content(&self, body: &Body, block: u32, bytes: &[u8]) {
        if self.hashing && body.memory.shared() {
            let hash = hash(bytes);
            body.lock().hashes.insert(block, hash);
        }
    }

    /// Notes what a block holds that is held in Cleaning, after it was protected: whatever is written from
    /// here on leaves evidence, and so takes the note away. Not if a device may write to it, which leaves none.
    pub(crate) fn note_cleaned(&self, body: &Body, block: u32) {
        if !self.hashing || !body.memory.shared() || !body.writable() {
            return;
        }
        {
            let mut table = body.lock();
            // What was noted before still holds: a new note would hide what went wrong since.
            if table.write_pinned(block) || table.hashes.contains_key(&block) {
                return;
            }
            // Taken away by a write that comes before the note is made.
            table.hashes.insert(block, 0);
        }
        let mut bytes = vec![0; body.block_len(block)];
        body.memory.copy_held(body.start(block), &mut bytes);
        if let Some(noted) = body.lock().hashes.get_mut(&block) {
            *noted = hash(&bytes);
        }
    }

    /// Compares what an unmapped block holds, that nobody else can take, with what was noted of it.
    pub(crate) fn check_content(&self, body: &Body, block: u32) {
        if !self.hashing || !body.memory.shared() {
            return;
        }
        let noted = {
            let mut table = body.lock();
            debug_assert!(
                table.state(block) == State::Evicting
                    || (table.closed && table.state(block) == State::Resting)
            );
            table.hashes.remove(&block)
        };
        let Some(noted) = noted else { return };
        let found = hash(
            body.memory
                .resting_bytes(body.start(block), body.block_len(block)),
        );
        if found != noted {
            crate::say::line(&format!(
                "userfault: {}: block at offset {} changed without being seen: hash {noted:#x} when mapped or cleaned, \
                 {found:#x} at release",
                body.name,
                body.start(block),
            ));
            std::process::abort();
        }
    }
}
