//! The memories that are compared.

use crate::Memory;
use crate::trace::Trace;

mod arc;
mod clock;
mod fifo;
mod known_future;
mod lists;
mod lru;
mod resting;
mod s3fifo;
mod sieve;
mod two_queues;
mod userfault;

pub use userfault::Userfault;

/// What a policy has to know of a touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    /// Faults: a pager can run it.
    Faults,
    /// Every touch, which a pager cannot see: a bound, not a choice.
    Touches,
    /// The whole trace beforehand.
    Future,
}

/// A policy that can be asked for by its name.
#[derive(Debug)]
pub struct Named {
    /// The name.
    pub name: &'static str,
    /// What it has to know.
    pub sees: Sees,
    /// Makes a memory of so many blocks for a trace.
    pub make: fn(&Trace, usize) -> Box<dyn Memory>,
}

/// All policies: those that a pager can run, then those that see more.
pub const ALL: &[Named] = &[
    Named {
        name: "userfault",
        sees: Sees::Faults,
        make: |trace, capacity| Box::new(userfault::Userfault::new(trace.blocks, capacity, true)),
    },
    Named {
        name: "userfault-no-rest",
        sees: Sees::Faults,
        make: |trace, capacity| Box::new(userfault::Userfault::new(trace.blocks, capacity, false)),
    },
    Named {
        name: "fifo",
        sees: Sees::Faults,
        make: |trace, capacity| Box::new(fifo::Fifo::new(trace.blocks, capacity)),
    },
    Named {
        name: "resting-10%",
        sees: Sees::Faults,
        make: |trace, capacity| Box::new(resting::Resting::new(trace.blocks, capacity, 10)),
    },
    Named {
        name: "resting-50%",
        sees: Sees::Faults,
        make: |trace, capacity| Box::new(resting::Resting::new(trace.blocks, capacity, 50)),
    },
    Named {
        name: "lru",
        sees: Sees::Touches,
        make: |trace, capacity| Box::new(lru::Lru::new(trace.blocks, capacity)),
    },
    Named {
        name: "clock",
        sees: Sees::Touches,
        make: |trace, capacity| Box::new(clock::Clock::new(trace.blocks, capacity)),
    },
    Named {
        name: "2q",
        sees: Sees::Touches,
        make: |trace, capacity| Box::new(two_queues::TwoQueues::new(trace.blocks, capacity)),
    },
    Named {
        name: "arc",
        sees: Sees::Touches,
        make: |trace, capacity| Box::new(arc::Arc::new(trace.blocks, capacity)),
    },
    Named {
        name: "sieve",
        sees: Sees::Touches,
        make: |trace, capacity| Box::new(sieve::Sieve::new(trace.blocks, capacity)),
    },
    Named {
        name: "s3-fifo",
        sees: Sees::Touches,
        make: |trace, capacity| Box::new(s3fifo::S3Fifo::new(trace.blocks, capacity)),
    },
    Named {
        name: "best-static",
        sees: Sees::Future,
        make: |trace, capacity| Box::new(known_future::BestStatic::new(trace, capacity)),
    },
    Named {
        name: "belady",
        sees: Sees::Future,
        make: |trace, capacity| Box::new(known_future::Belady::new(trace, capacity)),
    },
];

/// A policy by its name.
pub fn named(name: &str) -> Option<&'static Named> {
    ALL.iter().find(|each| each.name == name)
}
