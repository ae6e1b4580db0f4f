//! What every memory has to obey, what the simple ones are, and why the engine's policy is what it is.

use std::collections::HashSet;

use userfault_sim::memories::{ALL, named};
use userfault_sim::trace::Trace;
use userfault_sim::{Counts, Touch, made, replay};

fn counts(policy: &str, trace: &Trace, capacity: usize, from: usize) -> Counts {
    let named = named(policy).expect("a policy of that name");
    replay(&mut *(named.make)(trace, capacity), &trace.touches, from)
}

/// Touches that differ from seed to seed: some blocks often, runs, and some anywhere.
fn mixture(seed: u64, blocks: usize, count: usize) -> Trace {
    let mut random = made::Random::new(seed + 10);
    let mut touches = Vec::new();
    while touches.len() < count {
        match random.below(3) {
            0 => touches.push(random.below(blocks / 10 + 1)),
            1 => touches.push(random.below(blocks)),
            _ => {
                let from = random.below(blocks);
                touches.extend((from..blocks as u32).take(random.below(40) as usize));
            }
        }
    }
    Trace::made(touches)
}

#[test]
fn no_memory_holds_more_than_it_has_or_forgets_what_was_just_touched() {
    for seed in 0..20 {
        let trace = mixture(seed, 300, 3000);
        for capacity in [4, 17, 60] {
            for policy in ALL.iter().filter(|policy| policy.name != "best-static") {
                let mut memory = (policy.make)(&trace, capacity);
                let mut last = None;
                let mut since_miss: HashSet<u32> = HashSet::new();
                for &block in &trace.touches {
                    let touch = memory.touch(block);
                    assert!(
                        last != Some(block) || touch == Touch::Hit,
                        "{}",
                        policy.name
                    );
                    last = Some(block);
                    // Between two misses nothing comes in: only so many blocks can be found.
                    if touch == Touch::Miss {
                        since_miss.clear();
                    }
                    since_miss.insert(block);
                    assert!(since_miss.len() <= capacity, "{}", policy.name);
                }
            }
        }
    }
}

#[test]
fn what_fits_is_read_once() {
    let trace = mixture(3, 50, 2000);
    for policy in ALL {
        let found = counts(policy.name, &trace, trace.blocks, 0);
        let once = if policy.name == "best-static" {
            0
        } else {
            trace.blocks as u64
        };
        assert_eq!((found.misses, found.minor), (once, 0), "{}", policy.name);
    }
}

#[test]
fn nobody_beats_the_one_who_knows_the_future() {
    for seed in 0..10 {
        let trace = mixture(seed, 200, 3000);
        let least = counts("belady", &trace, 40, 0).misses;
        for policy in ALL.iter().filter(|policy| policy.name != "best-static") {
            assert!(
                counts(policy.name, &trace, 40, 0).misses >= least,
                "{}",
                policy.name
            );
        }
    }
}

#[test]
fn fifo_and_lru_are_those_of_a_plain_list() {
    for seed in 0..5 {
        let trace = mixture(seed, 100, 2000);
        for (name, moves) in [("fifo", false), ("lru", true)] {
            let (mut list, mut misses) = (Vec::new(), 0);
            for &block in &trace.touches {
                match list.iter().position(|each| *each == block) {
                    Some(at) if moves => {
                        list.remove(at);
                        list.push(block);
                    }
                    Some(_) => {}
                    None => {
                        misses += 1;
                        if list.len() == 20 {
                            list.remove(0);
                        }
                        list.push(block);
                    }
                }
            }
            assert_eq!(counts(name, &trace, 20, 0).misses, misses, "{name}");
        }
    }
}

/// Misses of the engine's policy as a part of another one's.
fn against(rival: &str, name: &str) -> f64 {
    let made = made::ALL
        .iter()
        .find(|made| made.name == name)
        .expect("a made trace");
    let trace = made.trace();
    let ours = counts("userfault", &trace, made.capacity, made.warm_up);
    let theirs = counts(rival, &trace, made.capacity, made.warm_up);
    ours.misses as f64 / theirs.misses as f64
}

#[test]
fn on_zipf_it_misses_far_less_than_fifo_and_less_than_those_that_see_every_touch() {
    assert!(against("fifo", "zipf-together") < 0.78);
    assert!(against("fifo", "zipf-scattered") < 0.82);
    assert!(against("clock", "zipf-together") < 0.92);
    assert!(against("lru", "zipf-scattered") < 0.90);
}

#[test]
fn it_is_no_worse_than_fifo_where_there_is_nothing_to_learn_or_what_was_learned_is_stale() {
    assert!(against("fifo", "uniform") < 1.01);
    assert!(against("fifo", "zipf-shift") < 0.96);
    assert!(against("fifo", "sliding") < 0.8);
    assert!(against("fifo", "loop") < 1.01);
    assert!(against("fifo", "quicksort") < 1.03);
    assert!(against("fifo", "quicksort-2") < 1.03);
    assert!(against("fifo", "mergesort") < 1.01);
}

#[test]
fn a_made_trace_that_was_written_is_read_back() {
    let trace = mixture(1, 50, 500);
    let mut text = String::from("userfault-trace 1\nregion 1 4096 50 0 mixture\n");
    for (number, block) in trace.touches.iter().enumerate() {
        text += &format!("{number} 1 1 {block} t\n");
    }
    let read = Trace::read(text.as_bytes()).expect("a trace");
    assert_eq!(read.touches.len(), trace.touches.len());
    for policy in ALL.iter().filter(|policy| policy.name != "best-static") {
        assert_eq!(
            counts(policy.name, &read, 10, 0),
            counts(policy.name, &trace, 10, 0),
            "{}: numbering does not matter",
            policy.name
        );
    }
}
