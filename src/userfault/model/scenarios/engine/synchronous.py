"""The protocol on older kernels: the first write to a page is a message, and the table holds the evidence.

As `crates/engine/src/protect.rs` has it (before Linux 6.7), and `kernel.rs` where UFFDIO_CONTINUE cannot map
write-protected (before 6.4). Everything else is the protocol of `protocol.py`.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.scenarios.engine.block import Answer, Fault, answer
from userfault.model.scenarios.engine.protocol import MAIN, Engine
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


class Synchronous(Engine):
    """Without WP_ASYNC, PAGEMAP_SCAN and CONTINUE_MODE_WP."""

    features = 0

    def answer(self, t: SystemCalls, message: abi.Pagefault) -> Op[None]:
        """A first write, or what the other protocol knows."""
        page = (message.address - MAIN) // self.page
        block = page // self.pages
        what = Answer.WAIT
        if message.flags & abi.UFFD_PAGEFAULT_FLAG_WP:
            what = answer(self.books.states[block], Fault.WRITE_PROTECT, lambda: True)
        if what is not Answer.UNPROTECT:
            yield from super().answer(t, message)
            return
        lift = t.writeprotect(self.fd, self.address(page), self.page, 0)
        self.record((page,))
        if "lifts_outside_the_lock" in self.wrong:
            yield from lift
        else:
            # Under the table's lock: one step. Nobody in these situations holds one of the kernel's locks.
            for label in lift:
                assert isinstance(label, str) or label.ready()

    def _harvest_zapped(self, t: SystemCalls, block: int) -> Op[set[int]]:
        yield from ()
        return set()

    def _harvest_mapped(self, t: SystemCalls, block: int) -> Op[set[int]]:
        if "protects_before_taking" in self.wrong:
            yield from self._protect(t, block)
            yield from t.step("take the bits")
        return set()

    def _taken(self, t: SystemCalls, block: int) -> Op[None]:
        if "protects_before_taking" not in self.wrong:
            yield from self._protect(t, block)

    def _protect(self, t: SystemCalls, block: int) -> Op[None]:
        mode = abi.UFFDIO_WRITEPROTECT_MODE_WP
        yield from t.writeprotect(self.fd, self._start(block), self._size, mode)

    def _continue(self, t: SystemCalls, block: int) -> Op[None]:
        """Map, protect, then compare with what was there: a write may have come between."""
        before = {}
        for page in self._pages(block):
            before[page] = yield from t.pread(self.memfd, 1, page * self.page)
            mode = abi.UFFDIO_CONTINUE_MODE_DONTWAKE
            yield from t.continue_(self.fd, self.address(page), self.page, mode)
        yield from self._protect(t, block)
        if "mapped_is_clean" in self.wrong:
            return
        for page, was in before.items():
            if (yield from t.pread(self.memfd, 1, page * self.page)) != was:
                self.record((page,))
