//! Blocks that cannot be had, on kernels without UFFDIO_POISON (before Linux 6.6).
//!
//! A mapping of an empty file is laid over the block: every touch lies beyond the end of the file, so it is
//! SIGBUS, and a system call gets EFAULT, as with poison. (Memory without access would be SIGSEGV, which
//! programs that are prepared for failing storage do not expect.) What differs: the whole block is covered,
//! also pages of it that are mapped when a write-back does not come back; each run of such blocks takes two of
//! the process's map entries (vm.max_map_count); and a thread that touches the block in the moment in which it
//! is healed gets SIGSEGV.
//!
//! ```text
//!   mapped, registered --bar--> empty file --unbar--> no access --> registered --> accessible
//! ```
//!
//! Accessible comes last: memory that can be touched before it is registered reads as zeros.
//!
//! Both steps happen under the table's lock and while no fork is under way, since a child must find its
//! ranges unmapped; a region that is sealed is left alone.

use std::io;

use crate::body::Body;
use crate::engine::Engine;
use crate::fork;
use crate::table::Table;

impl Engine {
    /// Makes every touch of a block SIGBUS.
    pub(crate) fn bar(&self, body: &Body, table: &mut Table, block: u32) -> io::Result<()> {
        if table.sealed || table.barred.contains(&block) {
            return Ok(());
        }
        let (start, len) = (body.start(block), body.block_len(block));
        fork::between_forks(|| body.memory.cover(start, len))?;
        table.barred.insert(block);
        Ok(())
    }

    /// Takes the bar away: the block is absent from the page table, and faults on it are messages.
    pub(crate) fn unbar(&self, body: &Body, table: &mut Table, block: u32) -> io::Result<()> {
        if table.sealed || !table.barred.contains(&block) {
            return Ok(());
        }
        let (start, len) = (body.start(block), body.block_len(block));
        let opened = fork::between_forks(|| {
            body.memory.uncover(start, len)?;
            self.register_range(body, start, len)
                .ok()
                .and_then(|_| body.memory.open_again(start, len))
                .inspect_err(|_| {
                    // It must not be touched as it is; without access it says so by SIGSEGV.
                    let _ = body.memory.cover(start, len);
                })
        });
        if opened.is_ok() {
            table.barred.remove(&block);
        }
        opened
    }
}
