"""The engine's protocol: fault loop, eviction, write-back, pwrite and checkpoint over a block table.

It does what `crates/engine` does, step for step where steps can be interleaved with the kernel's, with the
model's userfaultfd below. What the real engine does under the lock of its table is one step here. Each rule
of `rules.py` is one `in wrong` beside the line that it changes.

Memory: a shared file, mapped at MAIN and registered for missing faults, minor faults and write-protection
under WP_ASYNC. The view is the same file through pread and pwrite: no mapping is touched, no fault is
raised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from userfault import abi
from userfault.model.access import touch, translate
from userfault.model.content import Content
from userfault.model.errnos import EEXIST
from userfault.model.explorer import World
from userfault.model.kernel import Kernel
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.pagemap import Scan
from userfault.model.process import Process
from userfault.model.scenarios.engine.block import CLAIMS, Answer, Fault, Purpose, State, answer
from userfault.model.scenarios.engine.rules import RULES
from userfault.model.scenarios.setting import messages
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

MAIN: Final = 0x40000000
BUFFER: Final = 0x20000000
STORE, CHECKPOINT = "store", "checkpoint"
OLD: Final = b"o"  # what the store holds at first


@dataclass(slots=True)
class Books:
    """What the engine knows, what its store and its checkpoint hold, and the truth to compare with.

    A page's content stands for its first byte. `written` is what the program last wrote, updated in the same
    step as the write; `misread` collects what a reader got that was not that.
    """

    states: list[State]
    waited: set[int] = field(default_factory=set)  # blocks whose owner must wake somebody
    dirty: dict[str, set[int]] = field(default_factory=lambda: {STORE: set(), CHECKPOINT: set()})
    latest: set[int] = field(default_factory=set)  # pages named by the latest scan (only a wrong rule asks)
    store: dict[int, bytes] = field(default_factory=dict)
    point: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, bytes] = field(default_factory=dict)
    by_program: set[int] = field(default_factory=set)  # pages that the program wrote
    misread: list[str] = field(default_factory=list)
    store_fails: int = 0  # how many writes to the store will still fail


class Engine:
    """One region of `blocks` blocks, each of `pages` pages of `page` bytes (4 KiB, or 2 MiB of hugetlb)."""

    features: int = abi.UFFD_FEATURE_WP_ASYNC

    def __init__(
        self,
        wrong: Iterable[str] = (),
        *,
        blocks: int = 1,
        pages: int = 1,
        page: int = PAGE,
        view_fill: bool = False,
        limit: int | None = None,
    ) -> None:
        self.wrong = frozenset(wrong)
        unknown = self.wrong - RULES.keys()
        if unknown:
            raise ValueError(f"no such rules: {', '.join(sorted(unknown))}")
        self.blocks, self.pages, self.page = blocks, pages, page
        self.view_fill = view_fill
        self.limit = blocks if limit is None else limit
        self.kernel = Kernel()
        self.app: Process = self.kernel.process("app")
        calls, run = self.app.calls, self.app.run
        self.memfd = run(calls.memfd_create(self.length, hugetlb=page == HUGE_PAGE, name="region"))
        run(calls.mmap(MAIN, self.length, shared=True, file=calls.file(self.memfd)))
        if not view_fill:
            run(calls.mmap(BUFFER, pages * page))
            run(calls.fill(BUFFER, pages * page, 0))
        self.fd = run(calls.userfaultfd(self.features))
        modes = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP
        if "claims_under_missing_alone" not in self.wrong:
            modes |= abi.UFFDIO_REGISTER_MODE_MINOR
        run(calls.register(self.fd, MAIN, self.length, modes)).check()
        everywhere = dict.fromkeys(range(blocks * pages), OLD)
        self.books = Books(
            [State.ABSENT] * blocks,
            store=dict(everywhere),
            point=dict(everywhere),
            written=dict(everywhere),
        )

    @property
    def length(self) -> int:
        """Bytes of the region."""
        return self.blocks * self.pages * self.page

    def world(self, daemons: Iterable[str] = ("handler",)) -> World:
        """What the explorer wants; page N is called pN in traces."""
        places = {f"p{n}": MAIN + n * self.page for n in range(self.blocks * self.pages)}
        return World(self.kernel, self.books, frozenset(daemons), places)

    # Setting a scene.

    def begin_resident(self, block: int) -> None:
        """The block was filled and is mapped, clean."""
        calls, run = self.app.calls, self.app.run
        for page in self._pages(block):
            run(self._write_view(calls, page, OLD))
        run(calls.continue_(self.fd, self._start(block), self._size, abi.UFFDIO_CONTINUE_MODE_WP)).check()
        self.books.states[block] = State.RESIDENT

    def begin_resting(self, block: int) -> None:
        """The block is in memory, clean, and not mapped."""
        self.begin_resident(block)
        self.app.run(self.app.calls.madvise(self._start(block), self._size, "DONTNEED"))
        self.books.states[block] = State.RESTING

    def begin_poisoned(self, block: int) -> None:
        """A fill of the block was given up: its memory was claimed, then poisoned."""
        calls, run = self.app.calls, self.app.run
        for page in self._pages(block):
            run(self._write_view(calls, page, bytes(1)))
        run(calls.poison(self.fd, self._start(block), self._size)).check()
        self.books.states[block] = State.POISONED

    # Arithmetic.

    @property
    def _size(self) -> int:
        return self.pages * self.page

    def _start(self, block: int) -> int:
        return MAIN + block * self._size

    def address(self, page: int) -> int:
        """Where the program finds a page."""
        return MAIN + page * self.page

    def _pages(self, block: int) -> range:
        return range(block * self.pages, (block + 1) * self.pages)

    # What the program does.

    def program_stores(self, t: SystemCalls, page: int, value: bytes) -> Op[None]:
        """Write a page, and write down in the same step that it was written."""
        yield from t.store(self.address(page), value)
        self.books.written[page] = value
        self.books.by_program.add(page)

    def program_loads(self, t: SystemCalls, page: int) -> Op[None]:
        """Read a page, and compare."""
        got = yield from t.load(self.address(page))
        if got != self.books.written[page]:
            self.books.misread.append(f"page {page}: {got!r} instead of {self.books.written[page]!r}")

    def program_loads_both(self, t: SystemCalls, first: int, second: int) -> Op[None]:
        """One load that straddles two pages: both must be mapped at the same instant."""
        mm = t.thread.process.mm
        one, two = self.address(first), self.address(second)
        while True:
            yield f"load {one:#x} and {two:#x} at once"
            yield from touch(t.thread, mm, one, write=False)
            yield from touch(t.thread, mm, two, write=False)
            if translate(mm, one, False) and translate(mm, two, False):
                return

    # The table.

    def claim(self, block: int, purpose: Purpose) -> bool:
        """Become the owner of a block, if the purpose applies there."""
        state = CLAIMS.get((purpose, self.books.states[block]))
        if state is None:
            return False
        self.books.states[block] = state
        self.kernel.note(f"block {block}: {state.value}")
        return True

    def _unowned(self, t: SystemCalls, block: int) -> Op[None]:
        """Wait until nobody owns the block; claim it before the next step."""
        yield from t.wait_for(f"block {block}", lambda: not self.books.states[block].exclusive)

    def release(self, t: SystemCalls, block: int, state: State, *, wake: bool = False) -> Op[None]:
        """Stop owning it; wake whoever waited meanwhile."""
        self.books.states[block] = state
        self.kernel.note(f"block {block}: {state.value}")
        waited = block in self.books.waited
        self.books.waited.discard(block)
        if waited or wake:
            yield from t.wake(self.fd, self._start(block), self._size)

    def record(self, pages: Iterable[int]) -> None:
        """Evidence that pages are dirty: into the map of every consumer, before anything else is done."""
        pages = set(pages)
        self.books.latest = set(pages)
        for dirty in self.books.dirty.values():
            dirty |= pages
        if pages:
            self.kernel.note(f"dirty: {sorted(pages)}")

    def take(self, consumer: str, pages: range) -> list[int]:
        """The dirty pages of a consumer; their bits are taken out."""
        dirty = self.books.dirty["store" if "one_dirty_map" in self.wrong else consumer]
        taken = sorted(dirty.intersection(pages))
        if "dirty_by_block" in self.wrong and taken:
            taken = sorted(self.books.latest.intersection(pages)) or taken
            dirty.difference_update(pages)
        if "clears_at_the_end" not in self.wrong:
            dirty.difference_update(taken)
        return taken

    # Evidence.

    def _harvest_zapped(self, t: SystemCalls, block: int) -> Op[set[int]]:
        """After the zap: what is not a write-protect marker is dirty."""
        start, pages = self._start(block), set(self._pages(block))
        if "asks_for_written" in self.wrong:
            written = Scan(
                start,
                start + self._size,
                abi.PM_SCAN_CHECK_WPASYNC,
                category_mask=abi.PAGE_IS_WRITTEN,
                return_mask=abi.PAGE_IS_WRITTEN,
            )
            return self._in_regions((yield from t.pagemap_scan(written)).regions) & pages
        markers = Scan(
            start,
            start + self._size,
            abi.PM_SCAN_CHECK_WPASYNC,
            category_mask=abi.PAGE_IS_SWAPPED | abi.PAGE_IS_WRITTEN,
            category_inverted=abi.PAGE_IS_WRITTEN,
            return_mask=abi.PAGE_IS_SWAPPED,
        )
        return pages - self._in_regions((yield from t.pagemap_scan(markers)).regions)

    def _harvest_mapped(self, t: SystemCalls, block: int) -> Op[set[int]]:
        """Of a mapped block: what was written since it was protected; protects it again."""
        start = self._start(block)
        scan = Scan(
            start,
            start + self._size,
            abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC,
            category_mask=abi.PAGE_IS_WRITTEN,
            return_mask=abi.PAGE_IS_WRITTEN,
        )
        return self._in_regions((yield from t.pagemap_scan(scan)).regions)

    def _taken(self, t: SystemCalls, block: int) -> Op[None]:
        """The bits of a mapped block were taken, its pages are read next. The scan has protected them."""
        yield from ()

    def _in_regions(self, regions: Iterable[abi.PageRegion]) -> set[int]:
        return {
            page
            for region in regions
            for page in range((region.start - MAIN) // self.page, (region.end - MAIN) // self.page)
        }

    # The fault loop.

    def handler(self, t: SystemCalls) -> Op[None]:
        """Reads messages and answers them."""
        while True:
            for message in (yield from messages(t, self.fd)):
                assert isinstance(message, abi.Pagefault)
                yield from self.answer(t, message)

    def answer(self, t: SystemCalls, message: abi.Pagefault) -> Op[None]:
        """Answers one fault, as the table says."""
        page = (message.address - MAIN) // self.page
        block = page // self.pages
        fault = Fault.MINOR if message.flags & abi.UFFD_PAGEFAULT_FLAG_MINOR else Fault.MISSING
        what = answer(self.books.states[block], fault, lambda: self._present(message.address))
        what = self._answered_wrongly(what, self.books.states[block], fault)
        self.kernel.note(f"answer: {what.value}")
        match what:
            case Answer.WAIT:
                self.books.waited.add(block)
            case Answer.WAKE:
                yield from t.wake(self.fd, self._start(block), self._size)
            case Answer.FILL:
                self.claim(block, Purpose.FILL)
                yield from self.fill(t, block)
            case Answer.MAP if self.books.states[block].exclusive:  # rule maps_what_is_owned
                yield from self._continue(t, block)
                yield from t.wake(self.fd, self._start(block), self._size)
            case Answer.MAP:
                self.claim(block, Purpose.MAP)
                yield from self._map(t, block)
            case Answer.MAP_DIRTY:
                self.claim(block, Purpose.REFILL)
                if "remapped_is_clean" not in self.wrong:
                    self.record(self._pages(block))
                yield from self._map(t, block)
            case Answer.REFILL:
                self.claim(block, Purpose.REFILL)
                self.record((page,))
                yield from self._write_view(t, page, bytes(1))
                yield from self._map(t, block)
            case Answer.POISON:
                yield from t.poison(self.fd, self._start(block), self._size)
                yield from t.wake(self.fd, self._start(block), self._size)
            case Answer.UNPROTECT:
                raise AssertionError("WP_ASYNC sends no write-protect messages")

    def _answered_wrongly(self, what: Answer, state: State, fault: Fault) -> Answer:
        if "maps_what_is_owned" in self.wrong and state is State.EVICTING and fault is Fault.MINOR:
            return Answer.MAP
        if "stale_message_is_evidence" in self.wrong and what is Answer.WAKE and fault is Fault.MINOR:
            return Answer.MAP_DIRTY
        return what

    def _present(self, address: int) -> bool:
        return translate(self.app.mm, address, False) is not None

    def fill(self, t: SystemCalls, block: int) -> Op[None]:
        """Bring an absent block in; it is in state Filling and ours."""
        yield from self.make_room(t, block)
        data = [self.books.store[page] for page in self._pages(block)]
        if self.view_fill:
            for page, value in zip(self._pages(block), data, strict=True):
                yield from self._write_view(t, page, bytes(1))  # claim
                yield from self._write_view(t, page, value)
            yield from self._map(t, block)
        else:
            self._to_buffer(data)
            yield from self._copy(t, block)
            yield from self.release(t, block, State.RESIDENT, wake=True)

    def _copy(self, t: SystemCalls, block: int) -> Op[None]:
        """COPY to the end of the block, whatever stops it on the way."""
        at = 0
        while at < self._size:
            start = self._start(block) + at
            done = yield from t.copy(self.fd, start, BUFFER + at, self._size - at, abi.UFFDIO_COPY_MODE_WP)
            at += done.done
            if done.errno and done.done and "partial_is_done" in self.wrong:
                break
            if done.errno == EEXIST:
                # A stale page in a block that was absent: write it through the view, then map it.
                page = (start - MAIN) // self.page
                yield from self._write_view(t, page, self.books.store[page])
                yield from t.continue_(self.fd, start, self.page, abi.UFFDIO_CONTINUE_MODE_WP)
                at += self.page
        if "partial_is_done" in self.wrong:
            self.books.waited.discard(block)

    def _to_buffer(self, data: list[bytes]) -> None:
        """The engine's own memory, which nobody else touches: no step."""
        for number, value in enumerate(data):
            place = translate(self.app.mm, BUFFER + number * self.page, True)
            assert place is not None
            place[0].content = Content(value[0])

    def _map(self, t: SystemCalls, block: int) -> Op[None]:
        yield from self._continue(t, block)
        yield from self.release(t, block, State.RESIDENT, wake=True)

    def _continue(self, t: SystemCalls, block: int) -> Op[None]:
        """Map what is missing of a block, page by page: a page that is there already is skipped."""
        pages = list(self._pages(block))
        if "continues_over_neighbours" in self.wrong:
            pages = list(range(pages[0], self.blocks * self.pages))
        for page in pages:
            yield from t.continue_(
                self.fd,
                self.address(page),
                self.page,
                abi.UFFDIO_CONTINUE_MODE_WP | abi.UFFDIO_CONTINUE_MODE_DONTWAKE,
            )

    def _write_view(self, t: SystemCalls, page: int, value: bytes) -> Op[None]:
        """Fill a page through the view, with one byte value all over."""
        yield from t.step(f"write page {page} through the view")
        file = t.file(self.memfd)
        cached = file.page(page) or file.add(page)
        assert cached is not None
        cached.content = Content(value[0])
        self.kernel.note(f"view: page {page} = {value!r}")

    # Leaving memory.

    def make_room(self, t: SystemCalls, block: int) -> Op[None]:
        """Before a fill: if all places are taken, another block leaves."""
        limit = 1 if "room_for_one_block" in self.wrong else self.limit
        inside = (State.RESIDENT, State.RESTING)
        others = [n for n, state in enumerate(self.books.states) if n != block and state in inside]
        if len(others) >= limit:
            yield from self.evict(t, others[0])
            yield from self.give_back(t, others[0])

    def evict(self, t: SystemCalls, block: int) -> Op[None]:
        """Unmap a mapped block, then look at what it leaves in the page table; it rests afterwards."""
        if self.books.states[block] is not State.RESIDENT or not self.claim(block, Purpose.EVICT):
            return
        yield from t.madvise(self._start(block), self._size, "DONTNEED")
        self.record((yield from self._harvest_zapped(t, block)))
        yield from self.release(t, block, State.RESTING)

    def give_back(self, t: SystemCalls, block: int) -> Op[None]:
        """Write back what is dirty of a resting block, and give its memory back."""
        if self.books.states[block] is not State.RESTING or not self.claim(block, Purpose.EVICT):
            return
        pages = self.take(STORE, self._pages(block))
        if not (yield from self._write_store(t, pages)):
            yield from self.release(t, block, State.RESTING)
            return
        yield from t.punch_hole(self.memfd, block * self._size, self._size)
        yield from self.release(t, block, State.ABSENT)

    def _write_store(self, t: SystemCalls, pages: list[int]) -> Op[bool]:
        """False: the store failed; the pages are dirty again."""
        for page in pages:
            data = yield from t.pread(self.memfd, 1, page * self.page)
            yield from t.step(f"write page {page} to the store")
            if self.books.store_fails:
                self.books.store_fails -= 1
                self.books.dirty[STORE].update(pages)
                self.kernel.note("the store fails")
                return False
            self.books.store[page] = data
            self.kernel.note(f"store: page {page} = {data!r}")
        if "clears_at_the_end" in self.wrong:
            self.books.dirty[STORE].difference_update(pages)
        return True

    # Write-back, checkpoint, pwrite.

    def flush(self, t: SystemCalls, block: int) -> Op[None]:
        """Write back what is dirty of a block in memory; the program goes on touching it."""
        yield from t.step(f"flush block {block}")
        if "scans_without_owning" in self.wrong:
            self.record((yield from self._harvest_mapped(t, block)))
            yield from self._write_store(t, self.take(STORE, self._pages(block)))
            return
        mapped = self.books.states[block] is State.RESIDENT
        if not self.claim(block, Purpose.CLEAN):
            return
        if mapped:
            self.record((yield from self._harvest_mapped(t, block)))
        pages = self.take(STORE, self._pages(block))
        if mapped:
            yield from self._taken(t, block)
        yield from self._write_store(t, pages)
        yield from self.release(t, block, State.RESIDENT if mapped else State.RESTING)

    def cut(self, t: SystemCalls, block: int) -> Op[None]:
        """A checkpoint takes what has changed since the last one; it clears its own bits only."""
        yield from self._unowned(t, block)
        mapped = self.books.states[block] is State.RESIDENT
        held = self.claim(block, Purpose.CLEAN)
        if mapped:
            self.record((yield from self._harvest_mapped(t, block)))
        pages = self.take(CHECKPOINT, self._pages(block))
        if mapped:
            yield from self._taken(t, block)
        for page in pages:
            if held:
                self.books.point[page] = yield from t.pread(self.memfd, 1, page * self.page)
            else:
                yield from t.step(f"read page {page} from the store")
                self.books.point[page] = self.books.store[page]
        if held:
            yield from self.release(t, block, State.RESIDENT if mapped else State.RESTING)

    def pwrite(self, t: SystemCalls, page: int, value: bytes) -> Op[None]:
        """Write a page without touching the mapping; a block of one page is not read first."""
        block = page // self.pages
        if "clears_at_the_end" in self.wrong:
            yield from t.step("pwrite")
            self.record((page,))
            yield from self._through_the_view(t, page, value)
            return
        yield from self._unowned(t, block)
        before = self.books.states[block]
        self.claim(block, Purpose.WRITE)
        self.record((page,))
        yield from self._through_the_view(t, page, value)
        yield from self.release(t, block, State.RESIDENT if before is State.RESIDENT else State.RESTING)

    def _through_the_view(self, t: SystemCalls, page: int, value: bytes) -> Op[None]:
        yield from self._write_view(t, page, value)
        self.books.written[page] = value
        self.books.by_program.add(page)

    def finish(self, t: SystemCalls, names: Iterable[str]) -> Op[None]:
        """When the named threads are done: a last checkpoint, then everything leaves memory."""
        threads = [thread for thread in self.app.threads if thread.name in frozenset(names)]
        yield from t.wait_for("the others", lambda: all(thread.done for thread in threads))
        for block in range(self.blocks):
            yield from self.cut(t, block)
            yield from self._unowned(t, block)
            while self.books.states[block] not in (State.ABSENT, State.POISONED):
                yield from self.evict(t, block)
                yield from self.give_back(t, block)
