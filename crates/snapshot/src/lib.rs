//! Live snapshots and incremental checkpoints of memory that keeps changing.
//!
//! A program goes on writing its arrays; a *point* is what they held at one instant, the *cut*.
//!
//! ```text
//!   between points          drain: copy what was written into the next point's segment, round after round
//!   save(): the cut         silent memory: ask what was written, copy it aside into staging
//!                           guarded memory: protect; the first write to a block saves it first
//!                           anything else: copy it aside
//!   in the background       hash, compare, compress, write; index; sync; the manifest names the point
//! ```
//!
//! One thread of a [`Checkpointer`] does everything behind the cut, in the order of the cuts. Whenever it has nothing
//! else to do the drain of the engine copies for it. Each has the [`saver`] for itself meanwhile, so the index in
//! memory always describes what the next point would hold. A second thread watches that a save makes progress.
//!
//! | file | concept |
//! |---|---|
//! | `checkpointer`, `following`, `point` | what a program calls; how its arrays are followed; what save() returns |
//! | `cut`, `shares`, `copier`, `job` | the instant, its work for two threads, copying blocks aside, a save on its way |
//! | `processors` | whether there is a processor for the second of them |
//! | `saver`, `behind`, `publish` | behind the cuts: storing, its helper for guarded memory, finishing a point |
//! | `drain` | copying ahead of the next cut: a target of the engine's drain |
//! | `shared` | what cuts, saver and watcher share |
//! | `source` | an array's memory: which blocks have changed, and copying them |
//! | `staging`, `stream` | memory for what was copied aside; copying there past the caches |
//! | `index` | where each block of the next point is |
//! | `entry`, `codec`, `segment`, `manifest`, `folder` | the format on disk |
//! | `reader` | a point as a store; reads check everything |
//! | `prune`, `verify` | giving back space; finding a wrong byte |
//!
//! The format is described in `docs/reference/checkpoint-format.md`.
//!
//! # Locks
//! `Checkpointer::saving` (one cut at a time) or the saver (held for a save, a pruning or a round of the drain, I/O
//! and all), then `Shared::cutting` (held by a cut, and with the saver while a chunk is taken and read; see
//! `shared`), then the engine's. A cut does not take the saver. The checkpointer's state, a job's batches and staging are leaves, and none is held during I/O.
//!
//! # Promises
//! * A point holds what the memory held at its cut, for every write of the thread that called save().
//! * A point is visible when all of it is durable, and never before.
//! * An error, a full disk or a store that hangs fails the point; the program and the older points go on.
//! * No length, offset or count in a file is trusted.

mod behind;
mod checkpointer;
mod codec;
mod copier;
mod cut;
mod drain;
mod entry;
mod error;
mod folder;
mod following;
mod index;
mod job;
mod manifest;
mod point;
mod processors;
mod prune;
mod publish;
mod reader;
mod saver;
mod segment;
mod shared;
mod shares;
mod source;
mod staging;
mod stream;
mod verify;

pub use checkpointer::{Array, Checkpointer, Options};
pub use codec::Compress;
pub use error::Error;
pub use folder::{Fault, Op};
pub use manifest::{ArrayRecord, PointSummary};
pub use point::Point;
pub use reader::{ArrayReader, Directory, OpenPoint};
pub use verify::{Damage, Verified, verify};
