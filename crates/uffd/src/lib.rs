//! The kernel interface: ABI structs, ioctls, messages, PAGEMAP_SCAN. No threads, no policy.
//!
//! Everything that Linux 6.18 offers to a user of userfaultfd, said in the kernel's own words:
//!
//! | file | concept |
//! |---|---|
//! | `abi` | numbers, struct layouts, and one table of both |
//! | `outcome` | what one call did: the bytes done and the errno |
//! | `open` | the three ways to get a userfaultfd, and what to do when none works |
//! | `negotiate` | UFFDIO_API: ask for features, require some, prefer others |
//! | `register` | REGISTER and UNREGISTER |
//! | `resolve` | COPY, ZEROPAGE, CONTINUE, POISON, MOVE, WRITEPROTECT, WAKE |
//! | `message` | batched reads of faults and events |
//! | `fill` | the one place that knows when a failed fill may go on |
//! | `scan` | PAGEMAP_SCAN |
//! | `pagemap` | page table entries as the kernel shows them |
//! | `vmflags` | the `VmFlags` line of smaps |
//!
//! Results are exact. A call that fails reports its errno *and* the bytes done before it failed, and
//! nothing is retried here; the only exception is [`fill`], which says so. Nothing on the path of a
//! fault allocates: messages, page regions and page table entries go into buffers of the caller.

pub mod abi;
pub mod fill;
mod ioctl;
pub mod message;
pub mod negotiate;
pub mod open;
pub mod outcome;
pub mod pagemap;
mod register;
mod resolve;
pub mod scan;
pub mod vmflags;

pub use fill::{Fill, Filled};
pub use message::{Message, MessageBuffer, Messages};
pub use negotiate::{Features, NegotiateError};
pub use open::{KernelFaults, OpenError, OpenOptions, Uffd, Way};
pub use outcome::Outcome;
pub use pagemap::Pagemap;
pub use scan::{Scan, Scanned};
