//! What a [`crate::FaultyStore`] does to which call.

use std::time::Duration;

/// A kind of call, as a plan names it. Both ways of reading count as `Read`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`crate::Store::read`]
    Read,
    /// [`crate::Store::write`]
    Write,
    /// [`crate::Store::punch`]
    Punch,
    /// [`crate::Store::sync`]
    Sync,
}

/// What happens to a call that a rule catches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The call fails with this errno and does nothing.
    Fail {
        /// An errno such as `EIO`.
        errno: i32,
    },
    /// The call takes this much longer; later rules may still catch it.
    Delay(Duration),
    /// Only the first `bytes` are read or written (half of them if `None`); then the call fails.
    Shorten {
        /// How many bytes are done before the error.
        bytes: Option<u64>,
        /// An errno such as `EIO` or `ENOSPC`.
        errno: i32,
    },
    /// The call does not return until [`crate::FaultyStore::release`]; then it goes on as if nothing had been.
    Hang,
}

/// One line of a plan: which calls are caught, and what happens to them.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The kind of call.
    pub call: Call,
    /// What happens to it.
    pub action: Action,
    /// Bytes of the store, start and end: only calls that touch one of them. `None`: any. A sync touches all.
    pub range: Option<(u64, u64)>,
    /// So many calls that would match are let through first.
    pub skip: u64,
    /// So many calls are caught, then the rule is spent. `None`: all.
    pub count: Option<u64>,
}

impl Rule {
    /// A rule for every call of a kind, anywhere.
    pub fn every(call: Call, action: Action) -> Self {
        Self {
            call,
            action,
            range: None,
            skip: 0,
            count: None,
        }
    }

    /// The same rule for the bytes from `start` to before `end`.
    pub fn within(mut self, start: u64, end: u64) -> Self {
        self.range = Some((start, end));
        self
    }

    /// The same rule after `skip` calls have passed.
    pub fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// The same rule for `count` calls.
    pub fn times(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }

    fn touches(&self, call: Call, offset: u64, len: u64) -> bool {
        self.call == call
            && (call == Call::Sync
                || self
                    .range
                    .is_none_or(|(start, end)| offset < end && offset.saturating_add(len) > start))
    }

    /// True if the rule could still catch such a call, now or after its `skip`.
    pub(crate) fn concerns(&self, call: Call, offset: u64, len: u64) -> bool {
        self.count != Some(0) && self.touches(call, offset, len)
    }

    /// True if the rule catches this call; the rule's counters move on.
    pub(crate) fn catches(&mut self, call: Call, offset: u64, len: u64) -> bool {
        if !self.concerns(call, offset, len) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.count = self.count.map(|n| n - 1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_lets_some_calls_pass_catches_some_and_is_spent() {
        let mut rule = Rule::every(Call::Read, Action::Hang)
            .within(100, 200)
            .after(1)
            .times(2);
        let mut caught = Vec::new();
        for offset in [0, 150, 150, 199, 200, 150] {
            caught.push(rule.catches(Call::Read, offset, 1));
        }
        assert_eq!(caught, [false, false, true, true, false, false]);
    }

    #[test]
    fn a_rule_catches_calls_that_overlap_its_range_and_are_of_its_kind() {
        let mut rule = Rule::every(Call::Write, Action::Hang).within(100, 200);
        assert!(rule.catches(Call::Write, 50, 51));
        assert!(!rule.catches(Call::Write, 50, 50));
        assert!(!rule.catches(Call::Read, 50, 51));
        assert!(!rule.catches(Call::Sync, 0, 0));
        assert!(
            Rule::every(Call::Sync, Action::Hang)
                .within(5, 6)
                .catches(Call::Sync, 0, 0)
        );
    }
}
