//! The base of `userfault.Region`: the memory and what is done with it. The Python class adds arrays, files
//! and pickling.
//!
//! Unsafe: the buffer protocol hands out the region's address, and counts who has it.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use userfault_engine::readahead::Advice;
use userfault_engine::{Access, FaultWay, OnError, Pages, RegionOptions};

use crate::errors;
use crate::pin::Pin;
use crate::prefetch_ticket::PrefetchTicket;
use crate::stats::Stats;
use crate::store::{Store, bytes_of};

/// offset, length, errno, message, seconds since 1970
type BlockError = (u64, u64, i32, String, f64);

/// The base of userfault.Region; made by userfault.open().
#[pyclass(subclass, frozen, weakref, module = "userfault._native")]
pub struct Region {
    region: Arc<userfault_engine::Region>,
    store: Py<Store>,
    /// Buffers that point into the memory.
    exports: AtomicUsize,
    /// While a close is under way nobody gets a new buffer.
    closing: AtomicBool,
    /// Set while this region is the store's writer.
    writer: Option<Arc<AtomicBool>>,
    /// The file is this region's alone: its lock ends when the region is closed.
    owns_lock: bool,
    readable_name: String,
}

impl Region {
    fn writable(&self) -> bool {
        self.region.access() != Access::ReadOnly
    }

    /// A range of the region; no length means to the end.
    fn range(&self, offset: i64, length: Option<i64>) -> PyResult<(u64, u64)> {
        let end = self.region.len() as i64;
        let length = length.unwrap_or(end.saturating_sub(offset));
        if !(0..=end).contains(&offset) || !(0..=end - offset).contains(&length) {
            return Err(PyValueError::new_err(format!(
                "{length} bytes at offset {offset} lie outside of the region of {end} bytes"
            )));
        }
        Ok((offset as u64, length as u64))
    }

    /// Runs what may wait with the interpreter detached.
    fn wait_for<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&userfault_engine::Region) -> Result<T, userfault_engine::Error> + Send,
    ) -> PyResult<T> {
        let region = &self.region;
        py.detach(|| work(region))
            .map_err(|error| errors::engine_error(py, &error))
    }

    /// Gives the store to the next writer.
    fn let_go(&self, py: Python<'_>) {
        if let Some(writer) = &self.writer {
            writer.store(false, Ordering::Release);
        }
        if self.owns_lock
            && let Some(file) = &self.store.bind(py).get().file
        {
            file.unlock();
        }
    }

    fn close_now(&self, py: Python<'_>) -> PyResult<()> {
        if self.region.is_closed() {
            return Ok(());
        }
        if self.closing.swap(true, Ordering::AcqRel) {
            return Err(PyValueError::new_err(
                "another thread is closing the region",
            ));
        }
        let result = self.wait_for(py, userfault_engine::Region::close);
        if result.is_ok() {
            self.let_go(py);
        }
        self.closing.store(false, Ordering::Release);
        result
    }
}

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (
        store, *, name, writable, private, offset, length, block, pages, fault, memory_limit, on_error, retry_for,
        locking, owns_lock
    ))]
    #[allow(
        clippy::too_many_arguments,
        reason = "one for each option of userfault.open, by keyword"
    )]
    fn new(
        py: Python<'_>,
        store: Bound<'_, Store>,
        name: String,
        writable: bool,
        private: bool,
        offset: u64,
        length: u64,
        block: Option<usize>,
        pages: &str,
        fault: &str,
        memory_limit: Option<u64>,
        on_error: &str,
        retry_for: f64,
        locking: bool,
        owns_lock: bool,
    ) -> PyResult<Self> {
        let options = RegionOptions {
            name: name.clone(),
            access: match (writable, private) {
                (_, true) => Access::Private,
                (true, false) => Access::ReadWrite,
                (false, false) => Access::ReadOnly,
            },
            offset,
            len: length,
            block,
            pages: match pages {
                "auto" => Pages::Auto,
                "4KiB" => Pages::Small,
                "2MiB" => Pages::Huge,
                _ => return Err(PyValueError::new_err(format!("pages is {pages:?}"))),
            },
            fault: match fault {
                "threads" => FaultWay::Threads,
                "inline" => FaultWay::Inline,
                _ => return Err(PyValueError::new_err(format!("fault is {fault:?}"))),
            },
            memory_limit,
            on_error: match on_error {
                "auto" => OnError::Auto,
                "retry" => OnError::Retry,
                "poison" => OnError::Poison,
                _ => return Err(PyValueError::new_err(format!("on_error is {on_error:?}"))),
            },
            retry_for: Duration::try_from_secs_f64(retry_for)
                .map_err(|e| PyValueError::new_err(format!("retry_for is {retry_for}: {e}")))?,
        };
        let writer = (writable && !private && locking).then(|| store.get().writer.clone());
        if let Some(writer) = &writer
            && writer.swap(true, Ordering::AcqRel)
        {
            return Err(errors::in_use_error(py, &name));
        }
        let inner = store.get().inner.clone();
        let region = py
            .detach(|| userfault_engine::open(inner, options))
            .map_err(|error| {
                if let Some(writer) = &writer {
                    writer.store(false, Ordering::Release);
                }
                errors::engine_error(py, &error)
            })?;
        Ok(Self {
            region,
            store: store.unbind(),
            exports: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            writer,
            owns_lock,
            readable_name: name,
        })
    }

    /// Where the bytes live when they are not in memory.
    #[getter]
    fn store(&self, py: Python<'_>) -> Py<Store> {
        self.store.clone_ref(py)
    }

    /// What messages call the region: the file's path, or the store's name.
    #[getter]
    fn name(&self) -> &str {
        &self.readable_name
    }

    /// The address of the first byte, for ctypes and other foreign code.
    #[getter]
    fn address(&self) -> usize {
        self.region.base() as usize
    }

    /// Size of a block in bytes: what is read, evicted and counted at a time.
    #[getter]
    fn block(&self) -> usize {
        self.region.block()
    }

    /// What the memory is made of: "4KiB", "4KiB private", "2MiB hugetlb" or "2MiB tmpfs".
    #[getter]
    fn pages(&self) -> &'static str {
        self.region.pages()
    }

    /// True if the memory may be written.
    #[getter(writable)]
    fn is_writable(&self) -> bool {
        self.writable()
    }

    /// True once the region is closed, and in a forked child.
    #[getter]
    fn closed(&self) -> bool {
        self.region.is_closed()
    }

    /// Who answers a fault: "threads" of the engine, or "inline" the thread that touches.
    #[getter]
    fn fault(&self) -> &'static str {
        match self.region.fault() {
            FaultWay::Threads => "threads",
            FaultWay::Inline => "inline",
        }
    }

    /// True if a system call on absent memory waits as a touch does; False if it fails with EFAULT.
    ///
    /// It is False with fault="inline", and where the machine does not allow it.
    /// Then use pin(), pread(), pwrite() and readinto(); `userfault doctor` says why, and what mends it.
    #[getter]
    fn kernel_faults(&self) -> bool {
        self.region.kernel_faults()
    }

    /// Writes dirty pages of length bytes at offset back; returns when all of it is durable.
    ///
    /// Raises StoreError, also for an error that the background write-back met since the last flush: the data
    /// is still in memory and is written again by the next flush. With errno ETIMEDOUT the store has not come
    /// back from a call in the time of retry_for: the call goes on, and its data stays dirty until it ends.
    #[pyo3(signature = (offset=0, length=None))]
    fn flush(&self, py: Python<'_>, offset: i64, length: Option<i64>) -> PyResult<()> {
        let (offset, length) = self.range(offset, length)?;
        self.wait_for(py, |region| region.flush(offset, length))
    }

    /// Flushes and gives the memory up. Closing again does nothing.
    ///
    /// Raises BufferError while arrays or memoryviews of the region live, and StoreError if something cannot be
    /// written: then the region is open as before, and the data still there.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let exports = self.exports.load(Ordering::Acquire);
        if exports > 0 && !self.region.is_closed() {
            return Err(PyBufferError::new_err(format!(
                "{} cannot be closed: {exports} arrays or memoryviews of it are still in use; delete them first",
                self.readable_name
            )));
        }
        self.close_now(py)
    }

    /// Says how length bytes at offset will be touched: "normal", "sequential" or "random".
    ///
    /// With "normal" walks are noticed, forward, backward and strided, and the blocks ahead of them brought in;
    /// "sequential" begins with the longest window at once; "random" brings in nothing. The last word on a block
    /// holds. Raises ValueError for anything else, and outside of the region.
    #[pyo3(signature = (advice, offset=0, length=None))]
    fn advise(
        &self,
        py: Python<'_>,
        advice: &str,
        offset: i64,
        length: Option<i64>,
    ) -> PyResult<()> {
        let advice = match advice {
            "normal" => Advice::Normal,
            "sequential" => Advice::Sequential,
            "random" => Advice::Random,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "advice is {advice:?}: it must be one of normal, sequential, random"
                )));
            }
        };
        let (offset, length) = self.range(offset, length)?;
        self.wait_for(py, |region| region.advise(offset, length, advice))
    }

    /// Moves every change of a private region to its scratch store.
    fn _write_out(&self, py: Python<'_>) -> PyResult<()> {
        self.wait_for(py, userfault_engine::Region::write_out)
    }

    /// As close(), but under living arrays: touching one of them afterwards is SIGSEGV.
    fn _close_under_arrays(&self, py: Python<'_>) -> PyResult<()> {
        self.close_now(py)
    }

    /// Gives the memory up without writing anything back. For what must not block: it cannot fail.
    fn _abandon(&self, py: Python<'_>) {
        let region = &self.region;
        py.detach(|| region.abandon());
        self.let_go(py);
    }

    /// Brings ranges in before they are touched: pairs of offset and length, in bytes.
    ///
    /// Returns at once, or with wait=True when all of it is there. What the memory limit cannot hold is left
    /// out. Raises PoisonedError if wait=True and a block cannot be had.
    #[pyo3(signature = (ranges, *, wait=false))]
    fn _prefetch(
        &self,
        py: Python<'_>,
        ranges: Vec<(i64, i64)>,
        wait: bool,
    ) -> PyResult<PrefetchTicket> {
        let ranges = ranges
            .into_iter()
            .map(|(offset, length)| self.range(offset, Some(length)))
            .collect::<PyResult<Vec<_>>>()?;
        let ticket = PrefetchTicket::new(self.wait_for(py, |region| region.prefetch(&ranges))?);
        if wait {
            ticket.wait(py)?;
        }
        Ok(ticket)
    }

    /// Brings length bytes at offset in, and keeps them there until the pin is released.
    ///
    /// A context manager. write=True is for memory that a device will write (O_DIRECT, io_uring, RDMA).
    /// Raises MemoryError if the memory limit cannot hold it beside what is pinned already, PoisonedError if
    /// the bytes cannot be had.
    #[pyo3(signature = (offset=0, length=None, *, write=false))]
    fn pin(slf: &Bound<'_, Self>, offset: i64, length: Option<i64>, write: bool) -> PyResult<Pin> {
        let this = slf.get();
        let (offset, length) = this.range(offset, length)?;
        let pin = this.wait_for(slf.py(), |region| region.pin(offset, length, write))?;
        Ok(Pin::new(pin, write, slf.clone().unbind()))
    }

    /// Writes back and releases the blocks of length bytes at offset; pinned blocks stay.
    ///
    /// Raises StoreError if a block cannot be written; it stays in memory.
    #[pyo3(signature = (offset=0, length=None))]
    fn evict(&self, py: Python<'_>, offset: i64, length: Option<i64>) -> PyResult<()> {
        let (offset, length) = self.range(offset, length)?;
        self.wait_for(py, |region| region.evict(offset, length))
    }

    /// Figures of this region, read without disturbing it.
    fn stats(&self, py: Python<'_>) -> Stats {
        let region = &self.region;
        py.detach(|| region.stats()).into()
    }

    /// One byte for each block of length bytes at offset: 0 absent, 1 resident, 2 resting, 3 poisoned.
    #[pyo3(signature = (offset=0, length=None))]
    fn resident<'py>(
        &self,
        py: Python<'py>,
        offset: i64,
        length: Option<i64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (offset, length) = self.range(offset, length)?;
        let states = self.wait_for(py, |region| region.resident(offset, length))?;
        Ok(PyBytes::new(py, &states))
    }

    /// The blocks that were given up: offset, length, errno, message, seconds since 1970.
    fn _block_errors(&self) -> Vec<BlockError> {
        self.region
            .errors()
            .into_iter()
            .map(|e| {
                let time = e
                    .time
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default()
                    .as_secs_f64();
                (
                    e.offset,
                    e.len,
                    if e.errno == 0 { libc::EIO } else { e.errno },
                    e.message,
                    time,
                )
            })
            .collect()
    }

    /// Tries the poisoned blocks of length bytes at offset again; returns how many bytes were healed.
    ///
    /// Raises StoreError or PoisonedError for the first block that still cannot be had.
    fn heal(&self, py: Python<'_>, offset: i64, length: i64) -> PyResult<u64> {
        let (offset, length) = self.range(offset, Some(length))?;
        self.wait_for(py, |region| region.heal(offset, length))
    }

    /// Returns n bytes at offset without touching the memory: an error is an exception, not SIGBUS.
    ///
    /// Raises StoreError or PoisonedError if the bytes cannot be had.
    fn pread<'py>(&self, py: Python<'py>, n: i64, offset: i64) -> PyResult<Bound<'py, PyBytes>> {
        let (offset, n) = self.range(offset, Some(n))?;
        let mut data = Vec::new();
        data.try_reserve_exact(n as usize)
            .map_err(|_| PyMemoryError::new_err(format!("no room for {n} bytes")))?;
        data.resize(n as usize, 0);
        self.wait_for(py, |region| region.pread(&mut data, offset))?;
        Ok(PyBytes::new(py, &data))
    }

    /// Writes bytes at offset without touching the memory; returns how many.
    fn _pwrite(&self, py: Python<'_>, data: PyBuffer<u8>, offset: i64) -> PyResult<usize> {
        let bytes = bytes_of(&data)?;
        let (offset, _) = self.range(offset, Some(bytes.len() as i64))?;
        self.wait_for(py, |region| region.pwrite(bytes, offset))?;
        Ok(bytes.len())
    }

    /// Reads up to n bytes of a descriptor to offset; returns how many there were.
    fn _read_from(&self, py: Python<'_>, fd: i32, offset: i64, n: i64) -> PyResult<u64> {
        let (offset, n) = self.range(offset, Some(n))?;
        self.wait_for(py, |region| region.read_from_fd(fd, offset, n))
    }

    /// Length in bytes.
    fn __len__(&self) -> usize {
        self.region.len()
    }

    fn __bool__(&self) -> bool {
        true
    }

    /// # Safety
    /// `view` is Python's own, as the buffer protocol has it.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        if this.closing.load(Ordering::Acquire) || this.region.is_closed() {
            // SAFETY: a buffer that is refused has no owner.
            unsafe { (*view).obj = std::ptr::null_mut() };
            return Err(errors::closed());
        }
        // SAFETY: `view` is Python's; the memory stays mapped as long as the region's object lives, and the
        // view holds a reference to it.
        let rc = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                this.region.base().cast(),
                this.region.len() as ffi::Py_ssize_t,
                c_int::from(!this.writable()),
                flags,
            )
        };
        if rc != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        this.exports.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// # Safety
    /// `view` was filled in by `__getbuffer__`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Region {
    /// A region that nobody holds any more is flushed and closed; what cannot be written is lost, and said.
    fn drop(&mut self) {
        Python::attach(|py| {
            if let Err(error) = self.close_now(py) {
                error.write_unraisable(py, None);
                self._abandon(py);
            }
        });
    }
}

/// Sets the memory limit of the process in bytes, None for "auto"; returns the old one.
#[pyfunction]
pub fn set_memory_limit(py: Python<'_>, limit: Option<u64>) -> PyResult<u64> {
    py.detach(|| userfault_engine::set_memory_limit(limit))
        .map_err(|error| errors::engine_error(py, &error))
}
