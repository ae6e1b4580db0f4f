//! Reading and writing a region without touching it: `pread`, `pwrite`, `readinto`.
//!
//! These work where a system call on absent memory would fail with EFAULT, and they never map a block
//! that only passes through. An owner never touches the program's memory: bytes go through a buffer of
//! the engine's own, or else A.pwrite(B) and B.pwrite(A) would wait for each other's blocks.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::{Purpose, State};
use crate::body::Body;
use crate::engine::Engine;
use crate::error::Error;
use crate::policy::Queue;
use crate::shortage::NO_ROOM_FOR;
use crate::staging;
use crate::workers::Lead;

/// The largest piece that is copied at once, bytes.
const PIECE: usize = 1 << 20;

/// One piece of a request, within one block.
struct Piece {
    block: u32,
    /// Offset in the region, bytes.
    start: usize,
    len: usize,
}

fn pieces(body: &Body, offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let end = offset as usize + len;
    let block_size = body.block;
    let mut start = offset as usize;
    std::iter::from_fn(move || {
        (start < end).then(|| {
            let block_end = (start / block_size + 1) * block_size;
            let stop = end.min(block_end).min(start + PIECE);
            let piece = Piece {
                block: (start / block_size) as u32,
                start,
                len: stop - start,
            };
            start = stop;
            piece
        })
    })
}

/// Copies bytes of the region into `into`.
pub(crate) fn read(
    engine: &'static Engine,
    body: &Arc<Body>,
    into: &mut [u8],
    offset: u64,
) -> Result<(), Error> {
    let mut buffer = staging::lend(engine, into.len().min(PIECE));
    let mut done = 0;
    for piece in pieces(body, offset, into.len()) {
        let bytes = &mut buffer[..piece.len];
        if body.memory.shared() {
            let before = engine.claim_in_memory(body, piece.block, Purpose::Write)?;
            body.memory.copy_held(piece.start, bytes);
            let_go(engine, body, piece.block, before);
        } else {
            let pin = crate::pin::Hold::new(engine, body, piece.block)?;
            body.memory.copy_private(piece.start, bytes);
            drop(pin);
        }
        into[done..done + piece.len].copy_from_slice(bytes);
        done += piece.len;
    }
    Ok(())
}

/// Writes `data` into the region. Blocks that are overwritten whole are not read first.
pub(crate) fn write(
    engine: &'static Engine,
    body: &Arc<Body>,
    data: &[u8],
    offset: u64,
) -> Result<(), Error> {
    if !body.writable() {
        return Err(Error::ReadOnly);
    }
    let (start, len) = (offset as usize, data.len());
    let piece = PIECE.max(body.block);
    let mut buffer = staging::lend(engine, len.min(piece));
    // Cut where blocks end, so that whole blocks are overwritten whole.
    let cut = |index: usize| (index * piece).clamp(start, start + len);
    let pieces = start / piece..(start + len).div_ceil(piece);
    // A source that lies in the region, just before its target, is moved from its end on: as memmove does.
    let target = body.memory.main() + start;
    let backwards = (data.as_ptr().addr()..data.as_ptr().addr() + len).contains(&target)
        && data.as_ptr().addr() != target;
    for step in 0..pieces.len() {
        let index = if backwards {
            pieces.end - 1 - step
        } else {
            pieces.start + step
        };
        let (from, to) = (cut(index), cut(index + 1));
        // The source may lie in a region, and be absent: it is touched while nothing is owned.
        let bytes = &mut buffer[..to - from];
        bytes.copy_from_slice(&data[from - start..to - start]);
        write_own(engine, body, bytes, from)?;
    }
    Ok(())
}

/// As [`write`], from memory of the engine's own.
fn write_own(
    engine: &'static Engine,
    body: &Arc<Body>,
    bytes: &[u8],
    start: usize,
) -> Result<(), Error> {
    let end = start + bytes.len();
    for block in body.blocks(start as u64, bytes.len() as u64) {
        let block_start = body.start(block);
        let (from, to) = (
            start.max(block_start),
            end.min(block_start + body.block_len(block)),
        );
        // The tail of the last block beyond the region's end counts as overwritten: it stays zero.
        let whole =
            from == block_start && to >= (block_start + body.block_len(block)).min(body.len);
        let before = if whole {
            claim_to_overwrite(engine, body, block)?
        } else {
            engine.claim_in_memory(body, block, Purpose::Write)?
        };
        let pages = from / body.memory.page()..to.div_ceil(body.memory.page());
        // The kernel does not see writes through the view: the bits are set by hand, before anybody can
        // take the block away.
        body.lock().mark_dirty(pages);
        body.memory
            .write_held(from, &bytes[from - start..to - start]);
        let_go(engine, body, block, before);
    }
    Ok(())
}

/// Claims a block that will be overwritten whole; an absent one gets memory, but is not read.
fn claim_to_overwrite(
    engine: &'static Engine,
    body: &Arc<Body>,
    block: u32,
) -> Result<State, Error> {
    let (start, len) = (body.start(block), body.block_len(block));
    let began = Instant::now();
    let mut since = None;
    loop {
        let before = {
            let mut table = body.lock();
            if table.closed {
                return Err(Error::Closed);
            }
            let before = table.state(block);
            if before == State::Poisoned {
                return Err(crate::poison::error(&table, body, block));
            }
            if !table.claim(block, Purpose::Write) {
                body.await_owner(&mut table, block, &mut since)?;
                continue;
            }
            before
        };
        if before != State::Absent {
            return Ok(before);
        }
        let room = match engine.make_room_patiently(body, len as u64) {
            Ok(room) => room,
            Err(error) => {
                absent_again(engine, body, block);
                return Err(error);
            }
        };
        if room && body.memory.claim(start, len).is_ok() {
            return Ok(before);
        }
        if room {
            // The kernel has no memory, although the limit allows it.
            let _ = body.memory.punch(start, len);
            engine.give_back(body, len as u64);
            engine.make_way(body, 0, &mut Lead::none(engine));
        }
        absent_again(engine, body, block);
        if began.elapsed() > NO_ROOM_FOR + body.retry_for {
            return Err(body.lock().pending.take().unwrap_or(Error::Memory {
                asked: len as u64,
                limit: 0,
                what: "writing a block".into(),
            }));
        }
        engine.tell_of_shortage(body, began.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets go of a block that could not be had.
fn absent_again(engine: &Engine, body: &Body, block: u32) {
    let mut table = body.lock();
    let waited = body.release(&mut table, block, State::Absent);
    drop(table);
    if waited {
        engine.wake(body, block);
    }
}

/// Lets go of a block held in state Writing: mapped if it was mapped, else resting.
fn let_go(engine: &Engine, body: &Body, block: u32, before: State) {
    let after = if before == State::Resident {
        State::Resident
    } else {
        State::Resting
    };
    let mut table = body.lock();
    let waited = body.release(&mut table, block, after);
    drop(table);
    if before == State::Absent {
        engine.settle_tables(body);
        engine.seat(body, block, Queue::Resting);
    }
    if waited {
        engine.wake(body, block);
    }
}

/// Reads up to `len` bytes from a descriptor into the region; fewer at its end.
pub(crate) fn read_from(
    engine: &'static Engine,
    body: &Arc<Body>,
    fd: RawFd,
    offset: u64,
    len: u64,
) -> Result<u64, Error> {
    if !body.writable() {
        return Err(Error::ReadOnly);
    }
    let piece = PIECE.max(body.block);
    let mut buffer = staging::lend(engine, (len as usize).min(piece));
    let mut done = 0;
    while done < len {
        // End at a block's end, so that whole blocks are overwritten whole.
        let start = offset + done;
        let to_boundary = piece as u64 - start % piece as u64;
        let want = (len - done).min(to_boundary) as usize;
        let mut filled = 0;
        while filled < want {
            match crate::raw_read::read(fd, &mut buffer[filled..want]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    write_own(engine, body, &buffer[..filled], start as usize)?;
                    return Err(Error::Os {
                        call: "reading the file",
                        errno: error.raw_os_error().unwrap_or(0),
                        advice: format!(
                            "{} bytes before it are in the region",
                            done + filled as u64
                        ),
                    });
                }
            }
        }
        write_own(engine, body, &buffer[..filled], start as usize)?;
        done += filled as u64;
        if filled < want {
            break;
        }
    }
    Ok(done)
}
