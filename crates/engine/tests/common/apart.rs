//! Runs a test in a process of its own, which cannot outlive its time.
//!
//! A thread that sleeps on a page nobody brings can only be killed. So a test that may block on a fault, or
//! that may die by a signal, runs once more in a child: the same test binary, asked for this test alone, in
//! a process group that is killed at the end.
//!
//! Unsafe: signals to a process group, and resource limits of this process.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use userfault_engine::abilities::WITHOUT;

const CHILD: &str = "USERFAULT_TEST_APART";
/// Set in a child that has huge pages of its own.
pub const HUGE_PAGES: &str = "USERFAULT_TEST_HUGE_PAGES";

/// Pages of 2 MiB that a child is given: more than its regions need, since others may take some.
pub const HUGE_PAGES_EACH: u64 = 128;

/// How a child ended.
#[derive(Debug)]
pub struct Ended {
    /// The signal that ended it, or 0.
    pub signal: i32,
    /// Its exit status, if it ended by itself.
    pub code: Option<i32>,
    /// True if it had not ended when its time was over, and was killed.
    pub late: bool,
    /// What it wrote to stdout and stderr.
    pub output: String,
}

/// True in the child that runs the test `name`.
pub fn is_child(name: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|child| child == name)
}

/// True in a child that has huge pages of its own.
pub fn has_huge_pages() -> bool {
    std::env::var_os(HUGE_PAGES).is_some()
}

/// As [`again`], while the machine has more hugetlb pages.
pub fn again_with_huge_pages(name: &str, limit: Duration) -> Option<Ended> {
    super::huge_pages::with(HUGE_PAGES_EACH, || again(name, limit, &[(HUGE_PAGES, "1")]))
}

/// Fails unless a child ended well.
pub fn check(name: &str, ended: &Ended) {
    let (signal, output) = (ended.signal, &ended.output);
    assert_eq!(ended.code, Some(0), "{name}: signal {signal}\n{output}");
}

/// Runs the test `name` again, in a child that must end in time. Use the macros instead.
pub fn again(name: &str, limit: Duration, environment: &[(&str, &str)]) -> Ended {
    let ended = attempt(name, limit, environment);
    let output = &ended.output;
    assert!(
        !ended.late,
        "{name} had not ended after {limit:?}\n{output}"
    );
    ended
}

/// By how much every limit is longer: `make kernels` sets it, since an emulated machine is slow.
fn time_scale() -> f64 {
    std::env::var("USERFAULT_TIME_SCALE").map_or(1.0, |text| text.parse().unwrap())
}

/// Rounds of a race, of which a slow machine does fewer: it is in each of them for longer.
pub fn rounds(most: usize) -> usize {
    (most as f64 / time_scale().max(1.0)).ceil() as usize
}

/// A limit in seconds of a test's own, as long as this machine needs it to be.
pub fn seconds(limit: u64) -> Duration {
    Duration::from_secs(limit).mul_f64(time_scale())
}

/// As [`again`], but to be late is an answer too.
pub fn attempt(name: &str, limit: Duration, environment: &[(&str, &str)]) -> Ended {
    let limit = limit.mul_f64(time_scale());
    let output = tempfile();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .env("RUST_BACKTRACE", "0")
        .env(WITHOUT, without(environment))
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output.try_clone().unwrap())
        .process_group(0)
        .spawn()
        .unwrap();
    let group = -(child.id() as i32);
    let began = Instant::now();
    let late = loop {
        // Not reaped yet, so that nobody else can get its number before its group is killed.
        if ended(child.id()) {
            break false;
        }
        if began.elapsed() > limit {
            break true;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    // SAFETY: kill takes numbers; the group is the child's, whom nobody has reaped.
    unsafe { libc::kill(group, libc::SIGKILL) };
    let status = child.wait().unwrap();
    let text = contents(output);
    Ended {
        signal: status.signal().unwrap_or(0),
        code: status.code(),
        late,
        output: text,
    }
}

/// What a child does without: pages of the machine's pool, unless it was made larger for it. Whoever takes
/// those that another test asked for starves that test, or is starved when it gives them back.
fn without(environment: &[(&str, &str)]) -> String {
    let without = std::env::var(WITHOUT).unwrap_or_default();
    if environment.iter().any(|(name, _)| *name == HUGE_PAGES) {
        return without;
    }
    format!("{without},hugetlb")
}

/// Starts the test `name` in a child that its starter kills, and whose output nobody reads.
pub fn start(name: &str, environment: &[(&str, &str)]) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .env(WITHOUT, without(environment))
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

fn ended(pid: u32) -> bool {
    // SAFETY: a zeroed siginfo is valid, and waitid fills it in; WNOWAIT leaves the child unreaped.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_PID, pid, &raw mut info, flags) == 0 && info.si_pid() != 0
    }
}

fn tempfile() -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .unwrap()
}

fn contents(mut file: std::fs::File) -> String {
    use std::io::Seek;
    file.rewind().unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The name of the test that a macro below stands in, from the path of a function in it.
pub fn name_of(here: &'static str) -> &'static str {
    let test = here.strip_suffix("::here").unwrap();
    test.split_once("::").unwrap().1
}

/// Runs the block in a child, which must end well within so many seconds; with `hugetlb` once more in a
/// child that finds hugetlb pages.
#[macro_export]
macro_rules! apart {
    ($seconds:expr, hugetlb, $body:block) => {{
        fn here() {}
        let name = $crate::common::apart::name_of(std::any::type_name_of_val(&here));
        if $crate::common::apart::is_child(name) {
            $body
        } else {
            let limit = std::time::Duration::from_secs($seconds);
            let ended = $crate::common::apart::again(name, limit, &[]);
            $crate::common::apart::check(name, &ended);
            if let Some(ended) = $crate::common::apart::again_with_huge_pages(name, limit) {
                $crate::common::apart::check(name, &ended);
            }
        }
    }};
    ($seconds:expr, $body:block) => {{
        fn here() {}
        let name = $crate::common::apart::name_of(std::any::type_name_of_val(&here));
        if $crate::common::apart::is_child(name) {
            $body
        } else {
            let limit = std::time::Duration::from_secs($seconds);
            let ended = $crate::common::apart::again(name, limit, &[]);
            $crate::common::apart::check(name, &ended);
        }
    }};
}

/// Runs the block in a child, which must be ended by this signal within so many seconds; its output.
#[macro_export]
macro_rules! dies {
    ($seconds:expr, $signal:expr, $body:block) => {{
        fn here() {}
        let name = $crate::common::apart::name_of(std::any::type_name_of_val(&here));
        if $crate::common::apart::is_child(name) {
            $body
            println!("it lived");
            return;
        }
        let limit = std::time::Duration::from_secs($seconds);
        let ended = $crate::common::apart::again(name, limit, &[]);
        assert_eq!(ended.signal, $signal, "{name}\n{}", ended.output);
        ended.output
    }};
}
