//! The `VmFlags` line of /proc/PID/smaps: how the kernel thinks of each mapping.
//!
//! `um`, `uw` and `ui` are the registered modes MISSING, WP and MINOR. For tests and for `doctor`: the file
//! walks every page table, so it is slow.

use std::io;
use std::ops::Range;

/// One mapping that lies in the range asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmFlags {
    /// Its addresses.
    pub range: Range<usize>,
    /// Its permissions, such as `rw-p`.
    pub permissions: String,
    /// Its two-letter flags.
    pub flags: Vec<String>,
}

impl VmFlags {
    /// True if the mapping carries the two-letter `flag`.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }
}

/// The mappings of the calling process that overlap `range`.
pub fn own(range: Range<usize>) -> io::Result<Vec<VmFlags>> {
    parse(&std::fs::read_to_string("/proc/self/smaps")?, range)
}

/// The mappings of process `pid` that overlap `range`.
pub fn of(pid: u32, range: Range<usize>) -> io::Result<Vec<VmFlags>> {
    parse(
        &std::fs::read_to_string(format!("/proc/{pid}/smaps"))?,
        range,
    )
}

fn parse(text: &str, wanted: Range<usize>) -> io::Result<Vec<VmFlags>> {
    let mut found = Vec::new();
    let mut current: Option<(Range<usize>, String)> = None;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let (range, permissions) = current.take().ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "VmFlags before a mapping")
            })?;
            if range.start < wanted.end && wanted.start < range.end {
                let flags = flags.split_whitespace().map(str::to_owned).collect();
                found.push(VmFlags {
                    range,
                    permissions,
                    flags,
                });
            }
        } else if let Some(header) = header(line) {
            current = Some(header);
        }
    }
    Ok(found)
}

/// `7f00-7f10 rw-p ...` starts a mapping; every other line has a colon after its first word.
fn header(line: &str) -> Option<(Range<usize>, String)> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    Some((start..end, words.next()?.to_owned()))
}
