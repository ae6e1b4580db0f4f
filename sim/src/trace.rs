//! Traces: what `userfault trace` records, and files that others make.
//!
//! A trace is text, one record a line:
//!
//! ```text
//! userfault-trace 1
//! region 3 4096 1048576 536870912 big.npy
//! 1204133 771 3 99 m
//! ```
//!
//! The first line names the format. `region` has the region's number, the bytes of a block, how many blocks it
//! has, the bytes that its limit was, and its name to the end of the line. Every other line is an event: time
//! (nanoseconds since the recording began), thread, region, block, kind. A line that begins with `#` is a
//! remark; `lost N` says that N events were too many to be written.
//!
//! | kind | what happened |
//! |---|---|
//! | `m` | a thread touched a block that was absent |
//! | `r` | a thread touched a block that rested: in memory, but unmapped |
//! | `w` | a thread wrote to a page that was protected |
//! | `a` | the engine brought the block in; nobody had touched it |
//! | `t` | a thread touched the block: in traces that were made, and know every touch |
//!
//! A pager cannot see hits, so a recorded trace has only those touches that were faults under the limit of that
//! day. The smaller the limit, the more of them: `userfault trace --memory-limit` sets one for the recording.

use std::collections::HashMap;
use std::io::{self, BufRead};

/// The touches of a trace in order, by blocks that are numbered from 0 without gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// The blocks touched.
    pub touches: Vec<u32>,
    /// How many different blocks there are.
    pub blocks: usize,
    /// Bytes of a block, 0 if the trace does not say, or not one size for all.
    pub block_bytes: u64,
    /// Bytes of the largest limit under which it was recorded, 0 if it does not say.
    pub limit: u64,
    /// Events that were not written.
    pub lost: u64,
}

impl Trace {
    /// A trace of numbered blocks, made by a program.
    pub fn made(touches: Vec<u32>) -> Trace {
        let blocks = touches.iter().max().map_or(0, |most| *most as usize + 1);
        Trace {
            touches,
            blocks,
            ..Trace::default()
        }
    }

    /// Reads a trace. An error names the line.
    pub fn read(from: impl BufRead) -> io::Result<Trace> {
        let mut trace = Trace::default();
        let mut numbers: HashMap<(u32, u32), u32> = HashMap::new();
        let mut sizes = Vec::new();
        for (index, line) in from.lines().enumerate() {
            let line = line?;
            let bad = |what: &str| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("line {}: {what}: {line}", index + 1),
                )
            };
            if index == 0 {
                if line != "userfault-trace 1" {
                    return Err(bad("not a trace of version 1"));
                }
                continue;
            }
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| -> io::Result<u64> {
                words
                    .get(at)
                    .and_then(|word| word.parse().ok())
                    .ok_or_else(|| bad(&format!("word {} is no number", at + 1)))
            };
            match words[0] {
                "" => {}
                remark if remark.starts_with('#') => {}
                "region" => {
                    sizes.push(number(2)?);
                    trace.limit = trace.limit.max(number(4)?);
                }
                "lost" => trace.lost += number(1)?,
                _ => {
                    number(0)?;
                    let (region, block) = (number(2)? as u32, number(3)? as u32);
                    match words.get(4) {
                        Some(&("m" | "r" | "w" | "t")) => {
                            let next = numbers.len() as u32;
                            trace
                                .touches
                                .push(*numbers.entry((region, block)).or_insert(next));
                        }
                        Some(&"a") => {}
                        _ => return Err(bad("no such kind of event")),
                    }
                }
            }
        }
        trace.blocks = numbers.len();
        sizes.dedup();
        trace.block_bytes = if sizes.len() == 1 { sizes[0] } else { 0 };
        Ok(trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_numbered_as_they_come_and_what_nobody_touched_is_left_out() {
        let text = "userfault-trace 1\nregion 3 4096 100 65536 a name with spaces\n# a remark\n\
                    5 1 3 99 m\n6 1 3 7 a\n7 2 3 98 m\n9 1 3 99 r\nlost 4\n";
        let trace = Trace::read(text.as_bytes()).expect("a trace");
        assert_eq!(trace.touches, [0, 1, 0]);
        assert_eq!((trace.blocks, trace.block_bytes), (2, 4096));
        assert_eq!((trace.limit, trace.lost), (65536, 4));
    }

    #[test]
    fn an_error_names_the_line() {
        for (text, line) in [
            ("something else\n", "line 1"),
            ("userfault-trace 1\n5 1 3 99 x\n", "line 2"),
            ("userfault-trace 1\n\n5 1 3\n", "line 3"),
        ] {
            let error = Trace::read(text.as_bytes()).expect_err("no trace");
            assert!(error.to_string().starts_with(line), "{error}");
        }
    }
}
