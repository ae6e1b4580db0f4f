//! Traces that are made: loads whose shape is known.
//!
//! Each has a name, a memory in blocks that it is meant for, and how many of its touches only fill the memory.
//! They are the same on every machine.

use crate::trace::Trace;

/// A trace with what belongs to it.
#[derive(Debug)]
pub struct Made {
    /// Its name.
    pub name: &'static str,
    /// What it stands for.
    pub text: &'static str,
    /// The memory that it is meant for, blocks.
    pub capacity: usize,
    /// Touches that are not counted.
    pub warm_up: usize,
    make: fn() -> Vec<u32>,
}

impl Made {
    /// The touches.
    pub fn trace(&self) -> Trace {
        Trace::made((self.make)())
    }
}

/// Blocks of a large memory, and of a small one, whose blocks are large.
const MANY: usize = 16_384;
const FEW: usize = 120;

/// All made traces.
pub const ALL: &[Made] = &[
    Made {
        name: "zipf",
        text: "Zipf 0.99 over eight times the memory",
        capacity: MANY,
        warm_up: 800_000,
        make: || zipf(8 * MANY, 1_600_000),
    },
    Made {
        name: "zipf-together",
        text: "Zipf 0.99 over items of a sixteenth of a block, hot items together",
        capacity: MANY / 4,
        warm_up: 800_000,
        make: || {
            let items = zipf(32 * MANY, 1_600_000);
            items.into_iter().map(|item| item / 16).collect()
        },
    },
    Made {
        name: "zipf-scattered",
        text: "Zipf 0.99 over items of a quarter of a block, hot items scattered",
        capacity: MANY,
        warm_up: 800_000,
        make: || {
            let place = shuffled(32 * MANY);
            let items = zipf(32 * MANY, 1_600_000);
            items
                .into_iter()
                .map(|item| place[item as usize] / 4)
                .collect()
        },
    },
    Made {
        name: "zipf-scan",
        text: "Zipf with a scan of more than the memory now and then",
        capacity: MANY,
        warm_up: 960_000,
        make: || zipf_and_scans(8 * MANY, 1_600_000, 100_000, 20_000),
    },
    Made {
        name: "zipf-shift",
        text: "Zipf whose hot items change eight times",
        capacity: MANY,
        warm_up: 400_000,
        make: || shifting(8 * MANY, 1_600_000, 200_000),
    },
    Made {
        name: "hot-cold",
        text: "nine touches of ten in a hot part of four fifths of the memory",
        capacity: MANY,
        warm_up: 700_000,
        make: || hot_and_cold(8 * MANY, MANY * 4 / 5, 1_500_000),
    },
    Made {
        name: "sliding",
        text: "a window of most of the memory that moves on",
        capacity: MANY,
        warm_up: 300_000,
        make: || sliding(8 * MANY, MANY * 6 / 7, 1_000_000),
    },
    Made {
        name: "uniform",
        text: "uniform over eight times the memory: nothing to learn",
        capacity: MANY,
        warm_up: 400_000,
        make: || {
            let mut random = Random::new(5);
            (0..1_000_000).map(|_| random.below(8 * MANY)).collect()
        },
    },
    Made {
        name: "loop",
        text: "a loop over a fifth more than the memory",
        capacity: MANY,
        warm_up: 200_000,
        make: || (0..600_000).map(|n| (n % (MANY * 6 / 5)) as u32).collect(),
    },
    Made {
        name: "large-zipf",
        text: "Zipf over few large blocks",
        capacity: FEW,
        warm_up: 200_000,
        make: || zipf(2048, 400_000),
    },
    Made {
        name: "large-shift",
        text: "few large blocks, hot ones change every 4,000 touches",
        capacity: FEW,
        warm_up: 40_000,
        make: || shifting(2048, 400_000, 4_000),
    },
    Made {
        name: "large-scan",
        text: "few large blocks, Zipf and scans",
        capacity: FEW,
        warm_up: 240_000,
        make: || zipf_and_scans(2048, 400_000, 2_000, 400),
    },
    Made {
        name: "large-sliding",
        text: "few large blocks, a window that moves on",
        capacity: FEW,
        warm_up: 30_000,
        make: || sliding(2048, FEW * 5 / 6, 200_000),
    },
    Made {
        name: "quicksort",
        text: "a quicksort of four times the memory",
        capacity: FEW,
        warm_up: 0,
        make: || {
            let mut touches = Vec::new();
            quicksort(&mut touches, 0, 512);
            touches
        },
    },
    Made {
        name: "quicksort-2",
        text: "the same by two threads in turns",
        capacity: FEW,
        warm_up: 0,
        make: two_quicksorts,
    },
    Made {
        name: "mergesort",
        text: "a merge sort of four times the memory, into as much again",
        capacity: FEW,
        warm_up: 0,
        make: || {
            let mut touches = Vec::new();
            mergesort(&mut touches, 0, 512);
            touches
        },
    },
];

/// A generator of random numbers (xorshift).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// One that begins with a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number from 0 to before `end`.
    pub fn below(&mut self, end: usize) -> u32 {
        (self.next() % end as u64) as u32
    }

    /// A number from 0 to before 1.
    pub fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// `count` of `blocks` blocks, the k-th with a weight of k to the power of -0.99.
pub fn zipf(blocks: usize, count: usize) -> Vec<u32> {
    let mut random = Random::new(1);
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=blocks)
        .map(|rank| {
            sum += (rank as f64).powf(-0.99);
            sum
        })
        .collect();
    (0..count)
        .map(|_| {
            let at = random.part() * sum;
            sums.partition_point(|end| *end < at).min(blocks - 1) as u32
        })
        .collect()
}

fn shuffled(count: usize) -> Vec<u32> {
    let mut random = Random::new(2);
    let mut numbers: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        numbers.swap(last, random.below(last + 1) as usize);
    }
    numbers
}

fn zipf_and_scans(blocks: usize, count: usize, every: usize, long: usize) -> Vec<u32> {
    let (from, room) = (blocks * 3 / 10, blocks * 6 / 10);
    let mut touches = Vec::new();
    for (number, block) in zipf(blocks, count).into_iter().enumerate() {
        touches.push(block);
        if number % every < long {
            let scanned = number / every * long + number % every;
            touches.push((from + scanned % room) as u32);
        }
    }
    touches
}

fn shifting(blocks: usize, count: usize, every: usize) -> Vec<u32> {
    let by = blocks * 5 / 33;
    let touches = zipf(blocks, count).into_iter().enumerate();
    touches
        .map(|(number, block)| ((block as usize + number / every * by) % blocks) as u32)
        .collect()
}

fn hot_and_cold(blocks: usize, hot: usize, count: usize) -> Vec<u32> {
    let mut random = Random::new(3);
    (0..count)
        .map(|_| {
            if random.part() < 0.9 {
                random.below(hot)
            } else {
                hot as u32 + random.below(blocks - hot)
            }
        })
        .collect()
}

fn sliding(blocks: usize, window: usize, count: usize) -> Vec<u32> {
    let mut random = Random::new(4);
    (0..count)
        .map(|number| ((number / 20 + random.below(window) as usize) % blocks) as u32)
        .collect()
}

/// Partitions from both ends, then goes into either half.
fn quicksort(touches: &mut Vec<u32>, from: u32, to: u32) {
    for step in 0..(to - from).div_ceil(2) {
        touches.extend([from + step, to - 1 - step]);
    }
    if to - from > 1 {
        let middle = from.midpoint(to);
        quicksort(touches, from, middle);
        quicksort(touches, middle, to);
    }
}

fn two_quicksorts() -> Vec<u32> {
    let (mut touches, mut left, mut right) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..256 {
        touches.extend([step, 511 - step]);
    }
    quicksort(&mut left, 0, 256);
    quicksort(&mut right, 256, 512);
    touches.extend(left.iter().zip(&right).flat_map(|(l, r)| [*l, *r]));
    touches
}

fn mergesort(touches: &mut Vec<u32>, from: u32, to: u32) {
    if to - from < 2 {
        return;
    }
    let middle = from.midpoint(to);
    mergesort(touches, from, middle);
    mergesort(touches, middle, to);
    let out = 1024 + from;
    for step in 0..middle - from {
        touches.extend([
            from + step,
            middle + step,
            out + 2 * step,
            out + 2 * step + 1,
        ]);
    }
}
