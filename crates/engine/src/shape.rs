//! Which blocks and which pages a region gets.

use userfault_store::Store;

use crate::body::COPY_LIMIT;
use crate::engine::Engine;
use crate::error::Error;
use crate::memory::{HUGE, Kind, Memory, hugetlb_free, small_page};
use crate::{Access, Pages, RegionOptions};

/// The largest block, bytes.
pub const LARGEST_BLOCK: usize = 64 << 20;

/// The block of "auto" on small pages, bytes: a fault costs a few microseconds beside the copy of so much.
pub const AUTO_SMALL: usize = 64 << 10;

/// Regions from this size on get huge pages with "auto", if the limit holds as many blocks of 2 MiB as
/// this size does. Bytes.
pub const AUTO_HUGE_FROM: u64 = 64 << 20;

/// How a region is cut up.
pub(crate) struct Shape {
    /// Bytes of a block.
    pub(crate) block: usize,
    /// On huge pages, if they can be had.
    pub(crate) huge: bool,
}

/// The shape that was asked for, or a good one. Fails if no region can have it.
pub(crate) fn shape(
    options: &RegionOptions,
    store: &dyn Store,
    limit: u64,
) -> Result<Shape, Error> {
    let page = small_page();
    if let Some(block) = options.block
        && !(block.is_power_of_two() && (page..=LARGEST_BLOCK).contains(&block))
    {
        return Err(Error::Invalid(format!(
            "block is {block} bytes; it must be a power of two from {page} to {LARGEST_BLOCK}"
        )));
    }
    let preferred = store
        .preferred_block()
        .next_power_of_two()
        .clamp(page, LARGEST_BLOCK);
    let roomy = options.len >= AUTO_HUGE_FROM && limit >= AUTO_HUGE_FROM;
    match (options.pages, options.block) {
        (Pages::Huge, Some(block)) if block < HUGE => Err(Error::Invalid(format!(
            "pages=\"2MiB\" with a block of {block} bytes: a page is never larger than its block; ask for a block \
             of at least {HUGE} bytes or for pages=\"4KiB\""
        ))),
        (Pages::Huge, block) => Ok(Shape {
            block: block.unwrap_or(HUGE.max(preferred)),
            huge: true,
        }),
        (Pages::Small, block) => Ok(Shape {
            block: block.unwrap_or(AUTO_SMALL.max(preferred)),
            huge: false,
        }),
        (Pages::Auto, Some(block)) => Ok(Shape {
            block,
            huge: block >= HUGE && options.len >= HUGE as u64,
        }),
        (Pages::Auto, None) if roomy => Ok(Shape {
            block: HUGE.max(preferred),
            huge: true,
        }),
        (Pages::Auto, None) => {
            let block = AUTO_SMALL.max(preferred);
            Ok(Shape {
                block,
                huge: block >= HUGE && options.len >= HUGE as u64,
            })
        }
    }
}

/// Memory of that shape; with "auto" on small pages if there are no huge ones.
pub(crate) fn memory(
    engine: &Engine,
    options: &RegionOptions,
    shape: &Shape,
    limit: u64,
) -> Result<Memory, Error> {
    let writable = options.access != Access::ReadOnly;
    let length = |page: usize| (options.len as usize).next_multiple_of(page);
    if shape.huge {
        let wanted = (options.len.min(limit)).div_ceil(HUGE as u64);
        let hugetlb = engine.abilities.hugetlb && hugetlb_free() >= wanted;
        let first = if hugetlb {
            Memory::new(Kind::Hugetlb, length(HUGE), writable)
        } else {
            Memory::new(Kind::HugeTmpfs, length(HUGE), writable)
        };
        match first {
            Ok(memory) => return Ok(memory),
            Err(error) if options.pages == Pages::Huge => return Err(error),
            Err(_) => {}
        }
    }
    let kind = if writable || shape.block > COPY_LIMIT {
        Kind::Small
    } else {
        Kind::Private
    };
    Memory::new(kind, length(small_page()), writable)
}
