//! Thirteen wrong rules, one beside the right one each: defects that LLNL's umap 2.1.0 was seen to have.
//!
//! They are there so that the tests can be tested. Only a build with the feature `defects`, which no release
//! has, can put one back: the one that the variable USERFAULT_DEFECT names. Without the feature
//! [`put_back`] is a constant, and the wrong rules are compiled out. `tests/umap_defects.rs` has a test for
//! each, and a run that shows that exactly this one fails when its defect is there.
//!
//! The same build can also be told to do what only a machine out of memory does (`halfway_copies.rs`), or one with
//! a disk that hangs (`flights.rs`).

/// What umap does wrong. In the order of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// The offset is ignored: every region begins at the start of its store.
    OffsetIgnored,
    /// What a region took stays when it goes: descriptor, addresses, and with them its memory.
    LeakAtClose,
    /// The tail of the last page is read from the store and written to it.
    TailIsStored,
    /// A flush holds blocks while it waits for others.
    FlushHoldsAndWaits,
    /// A region that closes takes its neighbours' blocks out of the queues, too.
    CloseTakesNeighbours,
    /// A pinned block is left out of a flush.
    PinnedIsNotWritten,
    /// A prefetch that does not begin at a block is left out.
    UnalignedPrefetchIsNothing,
    /// A forked child inherits memory that nobody serves.
    ChildReadsZeros,
    /// An error of a store ends the process.
    ReadErrorIsTheEnd,
    /// One block is called enough to run.
    OneBlockIsEnough,
    /// Blocks are counted from address 0, and not from where the region begins.
    BlocksOfAddressZero,
    /// Arguments are not looked at.
    ArgumentsUnchecked,
    /// A userfaultfd for each region.
    UserfaultfdForEach,
}

#[cfg(feature = "defects")]
mod switch {
    use std::collections::HashMap;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use crate::lock::Mutex;
    use userfault_uffd::{OpenOptions, Uffd};

    use super::Defect;

    impl Defect {
        /// All of them, in order.
        pub const ALL: [Defect; 13] = [
            Defect::OffsetIgnored,
            Defect::LeakAtClose,
            Defect::TailIsStored,
            Defect::FlushHoldsAndWaits,
            Defect::CloseTakesNeighbours,
            Defect::PinnedIsNotWritten,
            Defect::UnalignedPrefetchIsNothing,
            Defect::ChildReadsZeros,
            Defect::ReadErrorIsTheEnd,
            Defect::OneBlockIsEnough,
            Defect::BlocksOfAddressZero,
            Defect::ArgumentsUnchecked,
            Defect::UserfaultfdForEach,
        ];
    }

    /// True if the wrong rule holds in this process.
    pub fn put_back(defect: Defect) -> bool {
        static CHOSEN: OnceLock<Option<Defect>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var("USERFAULT_DEFECT").ok()?;
            let found = Defect::ALL
                .into_iter()
                .find(|one| format!("{one:?}") == name);
            assert!(found.is_some(), "there is no defect {name}");
            found
        });
        *chosen == Some(defect)
    }

    /// With USERFAULT_COPY_BREAKS_OFF=times,bytes: the kernel has memory for so many bytes of a copy only, so
    /// many times.
    pub(crate) fn copy_breaks_off_after(len: usize) -> Option<usize> {
        static LEFT: OnceLock<(AtomicUsize, usize)> = OnceLock::new();
        let (times, bytes) = LEFT.get_or_init(|| {
            let text = std::env::var("USERFAULT_COPY_BREAKS_OFF").unwrap_or("0,0".into());
            let (times, bytes) = text.split_once(',').expect("two numbers");
            (
                AtomicUsize::new(times.parse().expect("a number")),
                bytes.parse().expect("a number"),
            )
        });
        let less = |left: usize| left.checked_sub(1);
        (*bytes < len
            && times
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                .is_ok())
        .then_some(*bytes)
    }

    /// Time for others to write what the copy put in place, before the engine hears that it broke off.
    pub(crate) fn before_it_is_told() {
        std::thread::sleep(Duration::from_millis(100));
    }

    fn milliseconds(variable: &str, cell: &'static OnceLock<Option<Duration>>) -> Option<Duration> {
        *cell.get_or_init(|| {
            let text = std::env::var(variable).ok()?;
            Some(Duration::from_millis(text.parse().expect("milliseconds")))
        })
    }

    /// With USERFAULT_SUBMISSION_HANGS=milliseconds: so long it takes to give reads to the kernel.
    pub(crate) fn submission_hangs() {
        static FOR: OnceLock<Option<Duration>> = OnceLock::new();
        if let Some(long) = milliseconds("USERFAULT_SUBMISSION_HANGS", &FOR) {
            std::thread::sleep(long);
        }
    }

    /// With USERFAULT_ARRIVAL_IS_LATE=milliseconds: so much later reads in flight arrive.
    pub(crate) fn arrival_is_late() -> Option<Duration> {
        static BY: OnceLock<Option<Duration>> = OnceLock::new();
        milliseconds("USERFAULT_ARRIVAL_IS_LATE", &BY)
    }

    static ONE_FOR_EACH: Mutex<Option<HashMap<u32, Uffd>>> = Mutex::new(None);

    /// A descriptor that a region has for itself.
    pub(crate) fn open_one_for(region: u32) {
        let one = Uffd::open(&OpenOptions::default()).expect("a userfaultfd for each region");
        let mut all = ONE_FOR_EACH.lock();
        all.get_or_insert_default().insert(region, one);
    }

    /// Gives back what [`open_one_for`] took.
    pub(crate) fn close_the_one_of(region: u32) {
        ONE_FOR_EACH.lock().get_or_insert_default().remove(&region);
    }
}

#[cfg(not(feature = "defects"))]
mod switch {
    use super::Defect;

    /// False: this build has none of them.
    #[inline(always)]
    pub(crate) const fn put_back(_: Defect) -> bool {
        false
    }

    pub(crate) fn open_one_for(_region: u32) {}

    #[inline(always)]
    pub(crate) const fn copy_breaks_off_after(_len: usize) -> Option<usize> {
        None
    }

    #[inline(always)]
    pub(crate) const fn before_it_is_told() {}

    #[inline(always)]
    pub(crate) const fn submission_hangs() {}

    #[inline(always)]
    pub(crate) const fn arrival_is_late() -> Option<std::time::Duration> {
        None
    }

    pub(crate) fn close_the_one_of(_region: u32) {}
}

#[cfg(feature = "defects")]
pub use switch::put_back;
#[cfg(not(feature = "defects"))]
pub(crate) use switch::put_back;
pub(crate) use switch::{
    arrival_is_late, before_it_is_told, close_the_one_of, copy_breaks_off_after, open_one_for,
    submission_hangs,
};
