//! Which pages differ from their home: one bitmap for each consumer.
//!
//! The store's write-back is one consumer, each checkpoint and each migration is another. Every
//! harvest of evidence is ORed into all maps before anything else is done with it, and a consumer
//! clears only its own bits, so that a flush never hides a page from the next checkpoint.

pub use userfault_store::PageSet as DirtyMap;
