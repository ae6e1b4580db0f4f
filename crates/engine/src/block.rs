//! The life of a block, as pure functions of its state and an event. `README.md` draws it.
//!
//! Nothing here touches memory or the kernel, so every rule can be tested, and explored, without either.

/// Where a block is, or what its owner is doing to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Only in its store.
    Absent = 0,
    /// Mapped: touching it costs nothing.
    Resident = 1,
    /// In memory, but unmapped: a minor fault brings it back.
    Resting = 2,
    /// Not to be had; a touch is SIGBUS.
    Poisoned = 3,
    /// Being read, or being mapped again.
    Filling = 4,
    /// Being unmapped, or being released from memory.
    Evicting = 5,
    /// Being written back.
    Cleaning = 6,
    /// Being read or written through the view.
    Writing = 7,
    /// Being poisoned.
    Poisoning = 8,
}

impl State {
    /// All states, in the order of their numbers.
    pub const ALL: [State; 9] = [
        State::Absent,
        State::Resident,
        State::Resting,
        State::Poisoned,
        State::Filling,
        State::Evicting,
        State::Cleaning,
        State::Writing,
        State::Poisoning,
    ];

    /// The state with this number.
    pub fn from_number(number: u8) -> State {
        State::ALL[number as usize]
    }

    /// True while somebody owns the block.
    pub fn exclusive(self) -> bool {
        self as u8 >= State::Filling as u8
    }
}

/// Why somebody wants to own a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Bring an absent block into memory and map it.
    Fill,
    /// Map a resting block again.
    Map,
    /// Put back pages of a resident block that somebody else threw away.
    Refill,
    /// Unmap a resident block, or release a resting one.
    Evict,
    /// Write back a block that is in memory.
    Clean,
    /// Read or write through the view.
    Write,
    /// Try a poisoned block again.
    Heal,
}

/// The exclusive state that `purpose` leads to from `state`, or `None` if it does not apply there.
pub fn claim(state: State, purpose: Purpose) -> Option<State> {
    use State::{Absent, Cleaning, Evicting, Filling, Poisoned, Resident, Resting, Writing};
    match (purpose, state) {
        (Purpose::Fill, Absent) => Some(Filling),
        (Purpose::Map, Resting) => Some(Filling),
        (Purpose::Refill, Resident) => Some(Filling),
        (Purpose::Heal, Poisoned) => Some(Filling),
        (Purpose::Evict, Resident | Resting) => Some(Evicting),
        (Purpose::Clean, Resident | Resting) => Some(Cleaning),
        (Purpose::Write, Absent | Resident | Resting) => Some(Writing),
        _ => None,
    }
}

/// What the kernel reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is mapped and nothing is cached.
    Missing,
    /// The page is cached, but not mapped.
    Minor,
    /// A write to a protected page.
    WriteProtect,
}

/// What a fault asks of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The block has an owner, who wakes the toucher at the end.
    Wait,
    /// Read the block from its store.
    Fill,
    /// The block was only resting: map it.
    Map,
    /// Somebody else unmapped a mapped block: its evidence is gone, so it is dirty; map it.
    MapDirty,
    /// Somebody else threw the page away: read that page again.
    Refill,
    /// The poison was lifted behind our back: put it there again.
    Poison,
    /// The message is stale: the page is there.
    Wake,
    /// Lift the protection; the page is dirty.
    Unprotect,
}

/// Answers a fault. `present` says whether the page is mapped now; it is asked only where it matters.
///
/// A minor fault on an absent block means fill, never map: what is cached there is stale.
///
/// A write-protect fault does not wait for a write-back: whoever cleans a block takes the dirty bits before
/// it protects the pages and copies them, so a bit that is set meanwhile belongs to the next write-back.
pub fn answer(state: State, fault: Fault, present: impl FnOnce() -> bool) -> Answer {
    match state {
        State::Cleaning if fault == Fault::WriteProtect => Answer::Unprotect,
        State::Filling | State::Evicting | State::Cleaning | State::Writing | State::Poisoning => {
            Answer::Wait
        }
        State::Absent => Answer::Fill,
        State::Poisoned => Answer::Poison,
        State::Resting => Answer::Map,
        State::Resident => match fault {
            Fault::WriteProtect => Answer::Unprotect,
            _ if present() => Answer::Wake,
            Fault::Minor => Answer::MapDirty,
            Fault::Missing => Answer::Refill,
        },
    }
}

#[cfg(test)]
impl Purpose {
    pub(crate) const ALL: [Purpose; 7] = [
        Purpose::Fill,
        Purpose::Map,
        Purpose::Refill,
        Purpose::Evict,
        Purpose::Clean,
        Purpose::Write,
        Purpose::Heal,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULTS: [Fault; 3] = [Fault::Missing, Fault::Minor, Fault::WriteProtect];

    #[test]
    fn numbers_round_trip() {
        for state in State::ALL {
            assert_eq!(State::from_number(state as u8), state);
        }
    }

    /// The capitalised words of the drawing.
    fn drawn() -> Vec<&'static str> {
        let readme = include_str!("../README.md");
        let drawing = readme.split("```").nth(1).expect("the drawing");
        let words = drawing.split(|letter: char| !letter.is_ascii_alphabetic());
        let mut names: Vec<_> = words
            .filter(|word| word.starts_with(|letter: char| letter.is_ascii_uppercase()))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    #[test]
    fn the_states_of_the_drawing_are_the_states_of_the_code() {
        let names = State::ALL.map(|state| format!("{state:?}"));
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(drawn(), names);
    }

    #[test]
    fn every_state_can_be_left_and_come_back_to() {
        // By claims, and by what an owner may release to.
        let released = |state| match state {
            State::Filling => vec![State::Resident, State::Absent, State::Poisoning],
            State::Evicting => vec![State::Resting, State::Absent],
            State::Cleaning => vec![State::Resident, State::Resting],
            State::Writing => vec![State::Absent, State::Resident, State::Resting],
            State::Poisoning => vec![State::Poisoned],
            _ => Vec::new(),
        };
        for start in State::ALL {
            let mut seen = vec![start];
            let mut next = 0;
            while let Some(&state) = seen.get(next) {
                next += 1;
                let claimed = Purpose::ALL
                    .iter()
                    .filter_map(|purpose| claim(state, *purpose));
                for after in claimed.chain(released(state)) {
                    if !seen.contains(&after) {
                        seen.push(after);
                    }
                }
            }
            assert_eq!(seen.len(), State::ALL.len(), "from {start:?} only {seen:?}");
        }
    }

    #[test]
    fn an_owned_block_is_never_claimed_and_its_faults_wait_but_for_writes_beside_a_write_back() {
        for state in State::ALL.into_iter().filter(|state| state.exclusive()) {
            for purpose in Purpose::ALL {
                assert_eq!(claim(state, purpose), None);
            }
            for fault in FAULTS {
                for present in [false, true] {
                    let expected = if (state, fault) == (State::Cleaning, Fault::WriteProtect) {
                        Answer::Unprotect
                    } else {
                        Answer::Wait
                    };
                    assert_eq!(answer(state, fault, || present), expected);
                }
            }
        }
    }

    #[test]
    fn every_claim_is_exclusive() {
        for state in State::ALL {
            for purpose in Purpose::ALL {
                if let Some(next) = claim(state, purpose) {
                    assert!(!state.exclusive() && next.exclusive());
                }
            }
        }
    }

    #[test]
    fn an_absent_block_is_filled_whatever_the_kernel_calls_the_fault() {
        for fault in FAULTS {
            assert_eq!(answer(State::Absent, fault, || true), Answer::Fill);
        }
    }

    #[test]
    fn a_resident_page_that_vanished_is_dirty_unless_the_message_is_stale() {
        assert_eq!(
            answer(State::Resident, Fault::Minor, || false),
            Answer::MapDirty
        );
        assert_eq!(answer(State::Resident, Fault::Minor, || true), Answer::Wake);
        assert_eq!(
            answer(State::Resident, Fault::Missing, || true),
            Answer::Wake
        );
        assert_eq!(
            answer(State::Resident, Fault::Missing, || false),
            Answer::Refill
        );
    }
}
