"""`stress`: threads that lock and count on every page while others fill the memory under them."""

from __future__ import annotations

import errno
import random
import struct

from conformance.backend import ALL, Area, Backend, Kind, Process, Userfaultfd
from conformance.checklist import item
from conformance.setting import MISSING, PROTECT, WP, done, fault, page_at, zap
from userfault import abi
from userfault.abi import Message

HEAD = struct.Struct("IIQ")
BOUNCES, LOCKERS = 4, 2


class Bounce:
    """One round: lockers count on the empty area, the handler and a copier fill it from `source`."""

    def __init__(
        self,
        backend: Backend,
        process: Process,
        uffd: Userfaultfd,
        area: Area,
        source: list[bytes],
        mode: int,
    ) -> None:
        self.backend = backend
        self.process = process
        self.uffd = uffd
        self.area = area
        self.source = source
        self.mode = mode
        self.flags: list[int] = []
        self.repeated = 0

    def fill(self, page: int) -> None:
        """Copies a page, as the handler and the copier both do; a page that is there makes its waiters go
        on."""
        index = (page - self.area.start) // self.area.page
        outcome = self.uffd.copy(page, self.source[index], mode=self.mode)
        if outcome.errno == errno.EEXIST:
            self.repeated += 1
            done(self.uffd.wake(page, self.area.page))
        else:
            assert outcome == (self.area.page, 0)

    def answer(self, message: Message) -> None:
        flags = fault(message).flags
        page = page_at(self.area, fault(message).address)
        self.flags.append(flags)
        if flags & abi.UFFD_PAGEFAULT_FLAG_WP:
            done(self.uffd.writeprotect(page, self.area.page, 0))
        else:
            self.fill(page)

    def run(self, seed: int, count: int) -> int:
        """The number of counts; every page is there at the end."""
        lockers = [self.process.thread().bump(self.area, seed * LOCKERS + n, count) for n in range(LOCKERS)]
        copier = iter(self.area.pages)

        def answer_and_copy(message: Message) -> None:
            self.answer(message)
            if (ahead := next(copier, None)) is not None:
                self.fill(ahead)

        counted = [self.backend.serve(locker, self.uffd, answer_and_copy) for locker in lockers]
        assert counted == [count] * LOCKERS, "a page was seen that was not whole"
        for page in copier:
            self.fill(page)
        return sum(counted)


def counters(pages: list[bytes]) -> list[int]:
    found = []
    for page in pages:
        _, _, counter = HEAD.unpack_from(page)
        assert counter == struct.unpack("Q", page[-8:])[0], "the two counters of a page differ"
        found.append(counter)
    return found


def bounce(
    backend: Backend, kind: Kind, *, mode: int = MISSING, copy_mode: int = 0, nonblocking: bool = True
) -> list[Bounce]:
    """Two areas swap roles: what one holds at the end of a round is what the other is filled from."""
    process = backend.process()
    count = 6 if kind.hugetlb else 128
    areas = [process.area(kind, count), process.area(kind, count)]
    page = areas[0].page
    source = [HEAD.pack(0, 0, 1) + bytes(page - HEAD.size - 8) + struct.pack("Q", 1) for _ in range(count)]
    total, rounds = count, []
    seeds = random.Random(20260101)
    uffd = process.userfaultfd(nonblocking=nonblocking)
    for n in range(BOUNCES):
        area = areas[n % 2]
        done(uffd.register(area.start, area.length, mode))
        one = Bounce(backend, process, uffd, area, source, copy_mode)
        total += one.run(seeds.randrange(1 << 32), 60 if kind.hugetlb else 1500)
        done(uffd.writeprotect(area.start, area.length, 0)) if mode & WP else None
        done(uffd.unregister(area.start, area.length))
        source = [process.main.read(address, page).result() for address in area.pages]
        assert sum(counters(source)) == total, "a count was lost"
        zap(process, area, area.start, area.length)
        rounds.append(one)
    return rounds


@item("stress.threads", *ALL)
def no_count_is_lost_while_areas_swap_roles(backend: Backend, kind: Kind) -> None:
    rounds = bounce(backend, kind)
    assert all(one.flags for one in rounds), "a round without a fault tests nothing"


@item("stress.atomic-copy", *ALL)
def a_page_is_never_seen_half_filled(backend: Backend, kind: Kind) -> None:
    # The lockers compare the first and the last bytes of every page they lock, on their first touch too, and
    # say -1 for a page that is not whole: Bounce.run fails on that.
    rounds = bounce(backend, kind)
    assert len(rounds) == BOUNCES


@item("stress.copy-retry", *ALL)
def a_second_copy_finds_the_page_through_any_mapping(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    area = process.area(kind, 4)
    uffd = process.userfaultfd()
    done(uffd.register(area.start, area.length, MISSING))
    places = [area.start]
    if area.alias is not None:
        done(uffd.register(area.alias, area.length, MISSING))
        places.append(area.alias)
    for n in range(4):
        page = b"\1" * area.page
        done(uffd.copy(area.start + n * area.page, page))
        for place in places:
            assert uffd.copy(place + n * area.page, page) == (0, errno.EEXIST)


@item("stress.wp", *ALL)
def no_count_is_lost_with_protected_copies(backend: Backend, kind: Kind) -> None:
    rounds = bounce(backend, kind, mode=MISSING | WP, copy_mode=abi.UFFDIO_COPY_MODE_WP)
    written = [flags for one in rounds for flags in one.flags if flags & abi.UFFD_PAGEFAULT_FLAG_WP]
    assert written
    # And a range protected while it is in use: the next store asks again.
    process = backend.process()
    area = process.area(kind, 4)
    uffd = process.userfaultfd()
    done(uffd.register(area.start, area.length, MISSING | WP))
    done(uffd.copy(area.start, b"\1" * area.page))
    done(uffd.writeprotect(area.start, area.length, PROTECT))
    running = process.thread().store(area.start, 2)
    [message] = backend.messages(uffd)
    assert fault(message).flags & abi.UFFD_PAGEFAULT_FLAG_WP
    done(uffd.writeprotect(area.start, area.length, 0))
    assert running.result().signal is None


@item("stress.re-register", *ALL)
def after_register_no_page_of_the_round_before_is_left(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    area = process.area(kind, 4)
    uffd = process.userfaultfd()
    toucher = process.thread()
    for value in (1, 2, 3):
        done(uffd.register(area.start, area.length, MISSING))
        served: list[int] = []

        def answer(message: Message, value: int = value, served: list[int] = served) -> None:
            page = page_at(area, fault(message).address)
            served.append(page)
            done(uffd.copy(page, bytes([value]) * area.page))

        for address in area.pages:
            assert backend.serve(toucher.load(address), uffd, answer).value == value
        assert served == list(area.pages)
        zap(process, area, area.start, area.length)
        done(uffd.unregister(area.start, area.length))


@item("stress.first-read", *ALL)
def the_first_fault_on_a_page_is_a_read(backend: Backend, kind: Kind) -> None:
    # The lockers read a page before they lock it.
    for one in bounce(backend, kind):
        assert set(one.flags) == {0}


@item("stress.read-and-poll", *ALL)
def handlers_may_poll_or_sleep_in_read(backend: Backend, kind: Kind) -> None:
    assert bounce(backend, kind, nonblocking=True)
    process = backend.process()
    area = process.area(kind, 4)
    uffd = process.userfaultfd(nonblocking=False)
    done(uffd.register(area.start, area.length, MISSING))
    toucher = process.thread()
    for n, address in enumerate(area.pages):
        running = toucher.load(address)
        # A blocking descriptor cannot be polled: read sleeps until the fault comes.
        [message] = uffd.read_messages()
        done(uffd.copy(page_at(area, fault(message).address), bytes([n + 1]) * area.page))
        assert running.result().value == n + 1
