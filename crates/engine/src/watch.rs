//! The debug option: blocks that are not dirty must leave memory as they came.
//!
//! With USERFAULT_DEBUG=hash in the environment every block is hashed when it is mapped and again when it is
//! released. If nobody was seen to write it in between and the bytes differ, a write was missed: the process
//! says where and aborts, rather than lose it. `make soak` runs with it. Private memory, which nobody can
//! write, is left out.

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

    /// Compares what an owned, unmapped block holds with what it held when it was mapped.
    pub(crate) fn check_content(&self, body: &Body, block: u32) {
        if !self.hashing || !body.memory.shared() {
            return;
        }
        let noted = {
            let mut table = body.lock();
            debug_assert_eq!(table.state(block), State::Evicting);
            table.hashes.remove(&block)
        };
        let Some(noted) = noted else { return };
        let found = hash(
            body.memory
                .resting_bytes(body.start(block), body.block_len(block)),
        );
        if found != noted {
            crate::say::line(&format!(
                "userfault: {}: block at offset {} changed without being seen: hash {noted:#x} when mapped, \
                 {found:#x} at release",
                body.name,
                body.start(block),
            ));
            std::process::abort();
        }
    }
}
