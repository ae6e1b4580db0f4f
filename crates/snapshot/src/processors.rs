//! Whether a second thread would have a processor to itself.
//!
//! A thread that helps the caller of a cut is worth it on a processor that nobody uses. On the caller's own it takes
//! whole slices of the scheduler, milliseconds each, where the cut would have been over in one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::available_parallelism;

/// The processors that this process may use.
pub struct Processors {
    count: usize,
    /// /proc/loadavg: opening it would take longer than reading it.
    load: Option<File>,
}

impl Processors {
    pub fn new() -> Processors {
        Processors {
            count: available_parallelism().map_or(1, std::num::NonZero::get),
            load: File::open("/proc/loadavg").ok(),
        }
    }

    /// True if fewer threads of the machine want to run now than there are processors, this one among them. Takes
    /// some microseconds.
    pub fn idle(&self) -> bool {
        let mut text = [0; 64];
        self.load
            .as_ref()
            .and_then(|load| load.read_at(&mut text, 0).ok())
            .and_then(|len| running(str::from_utf8(&text[..len]).ok()?))
            .is_none_or(|running| running < self.count)
    }
}

/// The threads that run or want to, of a line of /proc/loadavg: "0.20 0.18 0.12 1/80 11206".
fn running(text: &str) -> Option<usize> {
    let (running, _) = text.split_whitespace().nth(3)?.split_once('/')?;
    running.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_says_how_many_threads_run() {
        assert_eq!(running("0.20 0.18 0.12 3/80 11206\n"), Some(3));
        assert_eq!(running("nonsense"), None);
        let here = std::fs::read_to_string("/proc/loadavg").unwrap();
        assert!(running(&here).unwrap() >= 1);
    }

    #[test]
    fn a_processor_is_not_idle_when_every_one_is_wanted() {
        // This thread runs, and there is no more than one.
        let mut processors = Processors::new();
        processors.count = 1;
        assert!(!processors.idle());
        processors.count = usize::MAX;
        assert!(processors.idle());
        processors.count = 1;
        processors.load = None;
        assert!(processors.idle(), "where nobody says so it is tried");
    }
}
