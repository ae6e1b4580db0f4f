//! The drain as one loop for targets that know nothing of each other.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use userfault_engine::drain::{Next, Target, begin};

/// How long a test waits for what has to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Long enough for what must not happen to be seen.
const A_WHILE: Duration = Duration::from_millis(100);

/// Tells of each of its rounds, and waits in it until it may go on.
struct Told {
    rounds: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<Next>>,
    inside: AtomicBool,
    overlaps: AtomicUsize,
}

fn told() -> (Arc<Told>, Receiver<()>, Sender<Next>) {
    let (rounds, began) = channel();
    let (next, go_on) = channel();
    let target = Arc::new(Told {
        rounds: Mutex::new(rounds),
        go_on: Mutex::new(go_on),
        inside: AtomicBool::new(false),
        overlaps: AtomicUsize::new(0),
    });
    (target, began, next)
}

impl Target for Told {
    fn round(&self) -> Next {
        let twice = self.inside.swap(true, Ordering::SeqCst);
        self.overlaps
            .fetch_add(usize::from(twice), Ordering::SeqCst);
        let _ = self.rounds.lock().unwrap().send(());
        let next = self.go_on.lock().unwrap().recv();
        self.inside.store(false, Ordering::SeqCst);
        next.unwrap_or(Next::WhenAsked)
    }
}

#[test]
fn a_target_has_its_next_round_when_it_said() {
    let (target, began, next) = told();
    let _draining = begin(target, Next::In(Duration::ZERO)).unwrap();
    began.recv_timeout(PATIENCE).expect("the first");
    let pause = Duration::from_millis(50);
    let asked = Instant::now();
    next.send(Next::In(pause)).unwrap();
    began.recv_timeout(PATIENCE).expect("the second");
    assert!(asked.elapsed() >= pause);
    next.send(Next::WhenAsked).unwrap();
    assert!(began.recv_timeout(A_WHILE).is_err(), "nobody asked");
}

#[test]
fn whoever_asks_in_the_middle_of_a_round_gets_another_one_after_it() {
    let (target, began, next) = told();
    let draining = begin(target.clone(), Next::WhenAsked).unwrap();
    draining.ask();
    began.recv_timeout(PATIENCE).expect("asked for");
    draining.ask();
    draining.ask();
    assert!(began.recv_timeout(A_WHILE).is_err(), "one at a time");
    next.send(Next::WhenAsked).unwrap();
    began.recv_timeout(PATIENCE).expect("asked for meanwhile");
    next.send(Next::WhenAsked).unwrap();
    assert!(began.recv_timeout(A_WHILE).is_err(), "asked for once");
    assert_eq!(target.overlaps.load(Ordering::SeqCst), 0);
}

#[test]
fn a_target_that_does_not_come_back_keeps_no_other_waiting() {
    let (hung, hangs, _never) = told();
    let _first = begin(hung, Next::In(Duration::ZERO)).unwrap();
    hangs.recv_timeout(PATIENCE).expect("it hangs");
    let (target, began, next) = told();
    let _second = begin(target, Next::In(Duration::ZERO)).unwrap();
    for _ in 0..3 {
        began.recv_timeout(PATIENCE).expect("beside it");
        next.send(Next::In(Duration::ZERO)).unwrap();
    }
}

#[test]
fn a_target_that_has_gone_has_no_more_rounds_and_its_last_one_is_not_waited_for() {
    let (target, began, next) = told();
    let draining = begin(target, Next::In(Duration::ZERO)).unwrap();
    began.recv_timeout(PATIENCE).expect("the first");
    drop(draining);
    next.send(Next::In(Duration::ZERO)).unwrap();
    let mut left = began.recv_timeout(A_WHILE);
    // Its round has let go of it: nobody is there to tell of another one.
    assert!(left.is_err());
    let until = Instant::now() + PATIENCE;
    while left != Err(std::sync::mpsc::RecvTimeoutError::Disconnected) {
        assert!(Instant::now() < until, "it is still held");
        left = began.recv_timeout(A_WHILE);
    }
}
