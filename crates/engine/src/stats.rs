//! What happened, in numbers that can be read at any time without disturbing.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::Fault;

/// Buckets of the latency histogram: four to each doubling, from 256 ns up.
const BUCKETS: usize = 128;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// The counters of one region.
        #[derive(Debug)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: AtomicU64,)+
            pub(crate) latency: Histogram,
        }

        impl Counters {
            pub(crate) fn new() -> Counters {
                Counters { $($name: AtomicU64::new(0),)+ latency: Histogram::new() }
            }

            pub(crate) fn add_to(&self, total: &mut Stats) {
                $(total.$name += self.$name.load(Ordering::Relaxed);)+
            }

            /// Keeps the counts of a region that goes.
            pub(crate) fn absorb(&self, other: &Counters) {
                $(self.$name.fetch_add(other.$name.load(Ordering::Relaxed), Ordering::Relaxed);)+
                self.latency.absorb(&other.latency);
            }
        }

        /// Figures of one region or of the whole process.
        #[derive(Debug, Clone, Default)]
        pub struct Stats {
            /// The memory limit that holds, bytes.
            pub limit: u64,
            /// Bytes in use, counted against the limit.
            pub used: u64,
            /// Bytes mapped.
            pub resident: u64,
            /// Bytes in memory, but unmapped.
            pub resting: u64,
            /// Bytes of buffers between stores and memory.
            pub staging: u64,
            /// Bytes of page tables, estimated from the 2 MiB spans in use.
            pub page_tables: u64,
            /// Of the bytes in memory, those on hugetlb pages.
            pub hugetlb: u64,
            /// Pages that differ from their home, as far as is known without asking the kernel, bytes.
            pub dirty: u64,
            /// Pinned bytes.
            pub pinned: u64,
            /// Open regions.
            pub regions: u64,
            /// Names of what the engine does without (see `abilities`).
            pub without: Vec<&'static str>,
            /// Half of all faults took less than this, nanoseconds.
            pub latency_p50_ns: u64,
            /// 99 of 100 faults took less than this, nanoseconds.
            pub latency_p99_ns: u64,
            /// The slowest fault, nanoseconds.
            pub latency_max_ns: u64,
            $($(#[$doc])* pub $name: u64,)+
        }
    };
}

counters! {
    /// Faults on blocks that were not in memory.
    faults_missing,
    /// Faults on blocks that were in memory, but unmapped.
    faults_minor,
    /// Faults on protected pages.
    faults_write_protect,
    /// Resting blocks that came back without a read.
    hits,
    /// Bytes read from the store.
    bytes_read,
    /// Bytes written to the store.
    bytes_written,
    /// Blocks released from memory.
    evictions,
    /// Faults that had to wait for memory or for another owner.
    waits,
    /// Nanoseconds that faults waited for memory.
    wait_ns,
    /// Blocks given up, and write-backs that failed.
    errors,
}

impl Counters {
    /// Counts a fault that a message told of.
    pub(crate) fn faulted(&self, fault: Fault) {
        add(
            match fault {
                Fault::Missing => &self.faults_missing,
                Fault::Minor => &self.faults_minor,
                Fault::WriteProtect => &self.faults_write_protect,
            },
            1,
        );
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Fault latencies, from the reading of the message to the wake.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    max: AtomicU64,
}

impl Histogram {
    fn new() -> Histogram {
        Histogram {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            max: AtomicU64::new(0),
        }
    }

    pub(crate) fn record(&self, ns: u64) {
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        // fetch_max is a locked instruction whether or not it changes anything.
        if ns > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(ns, Ordering::Relaxed);
        }
    }

    fn absorb(&self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter().zip(&other.buckets) {
            mine.fetch_add(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.max
            .fetch_max(other.max.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

fn bucket(ns: u64) -> usize {
    let ns = ns.max(256);
    let doubling = ns.ilog2() as usize;
    let quarter = (ns >> (doubling - 2)) as usize & 3;
    ((doubling - 8) * 4 + quarter).min(BUCKETS - 1)
}

/// The upper edge of a bucket, nanoseconds.
fn edge(bucket: usize) -> u64 {
    let doubling = bucket / 4 + 8;
    ((bucket as u64 % 4) + 5) << (doubling - 2)
}

/// Fills in the percentiles of several histograms taken together.
pub(crate) fn percentiles(histograms: &[&Histogram], stats: &mut Stats) {
    let mut sums = [0u64; BUCKETS];
    for histogram in histograms {
        for (sum, count) in sums.iter_mut().zip(&histogram.buckets) {
            *sum += count.load(Ordering::Relaxed);
        }
        stats.latency_max_ns = stats
            .latency_max_ns
            .max(histogram.max.load(Ordering::Relaxed));
    }
    let total: u64 = sums.iter().sum();
    let quantile = |share: f64| -> u64 {
        let wanted = (total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in sums.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return edge(index).min(stats.latency_max_ns);
            }
        }
        0
    };
    (stats.latency_p50_ns, stats.latency_p99_ns) = (quantile(0.5), quantile(0.99));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_lies_below_the_edge_of_its_bucket_and_above_the_one_before() {
        for ns in [0, 255, 256, 300, 511, 512, 1000, 123_456, 5_000_000_000] {
            let index = bucket(ns);
            assert!(ns <= edge(index), "{ns}");
            assert!(index == 0 || ns >= edge(index - 1), "{ns}");
        }
    }
}
