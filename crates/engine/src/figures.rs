//! Figures of regions and of the process, gathered from where each is kept.

use crate::body::Body;
use crate::engine::Engine;
use crate::memory::Kind;
use crate::stats::{self, Stats};
use crate::{inline, signals};

/// What a region holds and what happened to it; no limit and no percentiles yet.
pub(crate) fn of_body(body: &Body) -> Stats {
    let mut stats = Stats {
        regions: 1,
        ..Stats::default()
    };
    body.counters.add_to(&mut stats);
    let table = body.lock();
    if table.sealed {
        // It has no memory any more.
        stats.regions = 0;
        return stats;
    }
    stats.resident = (table.resident * body.block) as u64;
    stats.resting = (table.resting * body.block) as u64;
    stats.used =
        ((table.resident + table.resting + table.owned) * body.block).min(body.memory.len()) as u64;
    stats.page_tables = table.spans_used as u64 * body.span_tables();
    stats.dirty = (table.home.count() * body.memory.page()) as u64;
    let pinned = table.pins.values().filter(|pins| pins.count > 0).count();
    stats.pinned = (pinned * body.block) as u64;
    if body.memory.kind() == Kind::Hugetlb {
        stats.hugetlb = stats.resident + stats.resting;
    }
    stats
}

/// Figures of the whole process.
pub fn stats() -> Stats {
    let _shield = signals::shield();
    inline::keep_handler();
    let mut total = Stats::default();
    let Some(engine) = Engine::existing() else {
        return total;
    };
    let bodies = engine.bodies();
    for body in &bodies {
        let one = of_body(body);
        body.counters.add_to(&mut total);
        total.regions += one.regions;
        total.resident += one.resident;
        total.resting += one.resting;
        total.hugetlb += one.hugetlb;
        total.page_tables += one.page_tables;
        total.dirty += one.dirty;
        total.pinned += one.pinned;
    }
    engine.past.add_to(&mut total);
    total.without = engine.abilities.missing();
    let figures = engine.pool.figures();
    (total.limit, total.used) = (figures.limit, figures.used);
    total.staging = engine.staging.bytes();
    let histograms: Vec<_> = bodies
        .iter()
        .map(|body| &body.counters.latency)
        .chain([&engine.past.latency])
        .collect();
    stats::percentiles(&histograms, &mut total);
    total
}
