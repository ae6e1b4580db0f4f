//! A store that spoils another one's calls by plan.
//!
//! A call passes the plan's rules in their order: a delay is added up, the first rule of another kind
//! decides. No lock is held while a call is delayed or hung.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::Store;
use crate::plan::{Action, Call, Rule};

/// So many calls are remembered; older ones are forgotten.
const REMEMBERED: usize = 65_536;

/// One call that reached a [`FaultyStore`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallRecord {
    /// Its kind.
    pub call: Call,
    /// Where it began, in bytes.
    pub offset: u64,
    /// How many bytes it was for.
    pub len: u64,
    /// 0 if it succeeded, else its errno.
    pub errno: i32,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    calls: VecDeque<CallRecord>,
    hung: usize,
    releases: u64,
}

/// Wraps a store and lets its calls fail, take long, come short and hang by plan.
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    state: Mutex<State>,
    changed: Condvar,
}

impl FaultyStore {
    /// Wraps `inner`; `plan` is looked at in its order.
    pub fn new(inner: Arc<dyn Store>, plan: Vec<Rule>) -> Self {
        Self {
            inner,
            state: Mutex::new(State {
                rules: plan,
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    /// Replaces the plan. Calls that hang go on hanging.
    pub fn set_plan(&self, plan: Vec<Rule>) {
        self.state().rules = plan;
    }

    /// Lets every call go that hangs now, and takes the rules that hang out of the plan. Returns how many went.
    pub fn release(&self) -> usize {
        let mut state = self.state();
        state.rules.retain(|rule| rule.action != Action::Hang);
        state.releases += 1;
        self.changed.notify_all();
        state.hung
    }

    /// How many calls hang now.
    pub fn hung(&self) -> usize {
        self.state().hung
    }

    /// The calls that came back so far, oldest first (the last 65,536).
    pub fn calls(&self) -> Vec<CallRecord> {
        self.state().calls.iter().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the plan says to a call: how long to wait, and then what.
    fn verdict(&self, call: Call, offset: u64, len: u64) -> (Duration, Option<Action>) {
        let mut delay = Duration::ZERO;
        for rule in &mut self.state().rules {
            if rule.catches(call, offset, len) {
                match rule.action {
                    Action::Delay(more) => delay += more,
                    action => return (delay, Some(action)),
                }
            }
        }
        (delay, None)
    }

    fn hang(&self) {
        let mut state = self.state();
        let releases = state.releases;
        state.hung += 1;
        while state.releases == releases {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.hung -= 1;
    }

    /// Runs a call through the plan; `part` does its first so many bytes.
    fn run(
        &self,
        call: Call,
        offset: u64,
        len: u64,
        part: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (delay, action) = self.verdict(call, offset, len);
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        let result = match action {
            Some(Action::Fail { errno }) => Err(io::Error::from_raw_os_error(errno)),
            Some(Action::Shorten { bytes, errno }) => {
                let done = bytes.unwrap_or(len / 2).min(len);
                part(done).and(Err(io::Error::from_raw_os_error(errno)))
            }
            Some(Action::Hang) => {
                self.hang();
                part(len)
            }
            Some(Action::Delay(_)) | None => part(len),
        };
        let errno = result
            .as_ref()
            .map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
        let mut state = self.state();
        if state.calls.len() == REMEMBERED {
            state.calls.pop_front();
        }
        state.calls.push_back(CallRecord {
            call,
            offset,
            len,
            errno,
        });
        result
    }
}

impl Store for FaultyStore {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        self.run(Call::Read, offset, len, |n| {
            self.inner.read(offset, &mut buf[..n as usize])
        })
    }

    /// Refused while a rule may catch the read, so that the plan sees every read it is meant for.
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let len = buf.len() as u64;
        if self
            .state()
            .rules
            .iter()
            .any(|rule| rule.concerns(Call::Read, offset, len))
        {
            return Ok(false);
        }
        let done = self.inner.read_now(offset, buf)?;
        if done {
            self.run(Call::Read, offset, len, |_| Ok(()))?;
        }
        Ok(done)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.run(Call::Write, offset, data.len() as u64, |n| {
            self.inner.write(offset, &data[..n as usize])
        })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run(Call::Punch, offset, len, |n| self.inner.punch(offset, n))
    }

    fn sync(&self) -> io::Result<()> {
        self.run(Call::Sync, 0, 0, |_| self.inner.sync())
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn preferred_block(&self) -> usize {
        self.inner.preferred_block()
    }

    fn concurrent_reads(&self) -> bool {
        self.inner.concurrent_reads()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn remote(&self) -> bool {
        self.inner.remote()
    }

    /// The inner store's: messages and errors read as they would without the faults.
    fn name(&self) -> String {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::MemoryStore;

    fn faulty(plan: Vec<Rule>) -> (Arc<MemoryStore>, FaultyStore) {
        let memory = Arc::new(MemoryStore::new(b"0123456789".to_vec()));
        (memory.clone(), FaultyStore::new(memory, plan))
    }

    #[test]
    fn a_read_fails_as_often_as_planned_and_then_succeeds() {
        let (_, store) = faulty(vec![
            Rule::every(Call::Read, Action::Fail { errno: libc::EIO }).times(2),
        ]);
        let mut buf = [0; 4];
        for _ in 0..2 {
            assert!(!store.read_now(0, &mut buf).unwrap());
            assert_eq!(
                store.read(0, &mut buf).unwrap_err().raw_os_error(),
                Some(libc::EIO)
            );
        }
        assert!(store.read_now(0, &mut buf).unwrap());
        store.read(0, &mut buf).unwrap();
        assert_eq!(&buf, b"0123");
        assert_eq!(
            store.calls().iter().map(|c| c.errno).collect::<Vec<_>>(),
            [libc::EIO, libc::EIO, 0, 0]
        );
    }

    #[test]
    fn a_shortened_write_stores_its_half_and_fails() {
        let short = Action::Shorten {
            bytes: None,
            errno: libc::ENOSPC,
        };
        let (memory, store) = faulty(vec![Rule::every(Call::Write, short)]);
        assert_eq!(
            store.write(2, b"abcd").unwrap_err().raw_os_error(),
            Some(libc::ENOSPC)
        );
        assert_eq!(memory.to_vec(), b"01ab456789");
    }

    #[test]
    fn a_shortened_read_leaves_the_rest_of_the_buffer_alone() {
        let short = Action::Shorten {
            bytes: Some(1),
            errno: libc::EIO,
        };
        let (_, store) = faulty(vec![Rule::every(Call::Read, short)]);
        let mut buf = *b"....";
        store.read(5, &mut buf).unwrap_err();
        assert_eq!(&buf, b"5...");
    }

    #[test]
    fn a_delay_adds_to_the_rule_after_it() {
        let (_, store) = faulty(vec![
            Rule::every(Call::Sync, Action::Delay(Duration::from_millis(30))),
            Rule::every(Call::Sync, Action::Fail { errno: libc::EIO }),
        ]);
        let start = Instant::now();
        store.sync().unwrap_err();
        assert!(start.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn a_hung_call_comes_back_when_it_is_released_and_has_then_done_its_work() {
        let (memory, store) = faulty(vec![Rule::every(Call::Write, Action::Hang)]);
        thread::scope(|scope| {
            let writer = scope.spawn(|| store.write(0, b"ab"));
            while store.hung() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(memory.to_vec(), b"0123456789");
            assert_eq!(store.release(), 1);
            writer.join().unwrap().unwrap();
        });
        assert_eq!(memory.to_vec(), b"ab23456789");
        store.write(0, b"cd").unwrap();
        assert_eq!(store.hung(), 0);
    }

    #[test]
    fn a_new_plan_replaces_the_old_one() {
        let (_, store) = faulty(vec![Rule::every(
            Call::Punch,
            Action::Fail { errno: libc::EIO },
        )]);
        store.punch(0, 1).unwrap_err();
        store.set_plan(Vec::new());
        store.punch(0, 1).unwrap();
    }
}
