"""Programs for the differential test, as Hypothesis draws them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from conformance.differential import PAGES, THREADS, Program, Step
from userfault import abi

SIGBUS, THREAD_ID, EXACT = (
    abi.UFFD_FEATURE_SIGBUS,
    abi.UFFD_FEATURE_THREAD_ID,
    abi.UFFD_FEATURE_EXACT_ADDRESS,
)
UNPOPULATED, ASYNC = abi.UFFD_FEATURE_WP_UNPOPULATED, abi.UFFD_FEATURE_WP_ASYNC
EVENTS = (
    abi.UFFD_FEATURE_EVENT_FORK,
    abi.UFFD_FEATURE_EVENT_REMAP,
    abi.UFFD_FEATURE_EVENT_REMOVE,
    abi.UFFD_FEATURE_EVENT_UNMAP,
)

threads = st.integers(0, THREADS - 1)
pages = st.integers(0, PAGES - 1)
anywhere = st.one_of(pages, pages, pages, st.integers(PAGES, 2 * PAGES - 1))
values = st.integers(1, 255)


@st.composite
def ranges(draw: st.DrawFn, first: st.SearchStrategy[int] = anywhere) -> tuple[int, int]:
    """(first page, number of pages), inside the area or inside the room."""
    page = draw(first)
    return page, draw(st.integers(1, PAGES - page % PAGES))


def _step(name: str, *numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(name), *numbers)


def _ranged(name: str, *rest: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(ranges(), *rest).map(lambda drawn: (name, *drawn[0], *drawn[1:]))


TOUCHES = st.one_of(
    _step("load", threads, anywhere),
    _step("store", threads, anywhere, values),
    _step("store", threads, pages, values),
    _step("call_reads", threads, anywhere),
    _step("call_writes", threads, anywhere),
)

ANSWERS = st.one_of(
    _ranged("copy", values, st.sampled_from((0, 0, 1, 2))),
    _ranged("zeropage", st.sampled_from((0, 1))),
    _ranged("continue", st.sampled_from((0, 0, 1, 2))),
    _ranged("poison"),
    _step("move", anywhere, anywhere, st.sampled_from((0, 1, 2))),
    _ranged("writeprotect", st.sampled_from((0, 1, 1, 2, 3))),
    _ranged("wake"),
    _ranged("register", st.integers(1, 7)),
    _ranged("unregister"),
)

ZAPS = st.one_of(*(_ranged(name) for name in ("dontneed", "remove", "free", "pageout", "pageout", "cold")))
ADVICE = st.one_of(
    *(
        _ranged(name)
        for name in (
            "collapse",
            "populate_read",
            "populate_write",
            "hugepage",
            "nohugepage",
            "dontfork",
            "dofork",
            "wipeonfork",
            "guard_install",
            "guard_remove",
        )
    )
)
MAPPINGS = st.one_of(
    _ranged("protect", st.sampled_from((1, 3, 3))),
    _ranged("munmap"),
    _ranged("mmap"),
    st.tuples(ranges(), anywhere, st.sampled_from((0, 0, 0, 1, 2, 4)), st.sampled_from((0, 0, 0, 1))).map(
        lambda drawn: ("mremap", *drawn[0], *drawn[1:])
    ),
)
FILES = st.one_of(
    _step("pwrite", pages, values),
    st.tuples(ranges(pages)).map(lambda drawn: ("punch", *drawn[0])),
    _step("truncate", st.integers(0, PAGES)),
)
SCANS = _ranged(
    "scan",
    st.sampled_from((0, abi.PM_SCAN_WP_MATCHING, abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC)),
    st.sampled_from((0, abi.PAGE_IS_WRITTEN)),
)
CHILDS = st.one_of(TOUCHES, ANSWERS, ZAPS, MAPPINGS).map(lambda step: ("child", step))
TOGETHER = st.tuples(
    _step("load", st.just(0), pages) | _step("store", st.just(0), pages, values),
    _step("load", st.just(1), pages) | _step("store", st.just(1), pages, values),
).map(lambda steps: ("together", *steps))

COMMON = (TOUCHES, TOUCHES, TOUCHES, ANSWERS, ANSWERS, ANSWERS, ZAPS, ADVICE, MAPPINGS, TOGETHER, SCANS)
RARE = (_step("fork"), CHILDS, _step("deaf"), _step("read"), _step("close"))


@st.composite
def programs(draw: st.DrawFn, *, kinds: tuple[str, ...], steps: int = 20) -> Program:
    """A program on one of these kinds of memory."""
    kind = draw(st.sampled_from(kinds))
    on_disk = kind.startswith("file")
    features = draw(st.sampled_from((0, 0, UNPOPULATED, SIGBUS, THREAD_ID, EXACT | THREAD_ID, ASYNC)))
    if on_disk:
        features |= ASYNC
    for event in EVENTS:
        if draw(st.booleans()):
            features |= event
    mode = abi.UFFDIO_REGISTER_MODE_WP if on_disk else draw(st.integers(1, 7))
    choices = [*COMMON, *RARE, *([FILES] if kind not in ("anon", "thp") else [])]
    least = draw(st.sampled_from((1, 6, 12)))
    drawn = draw(st.lists(st.one_of(*choices), min_size=least, max_size=max(steps, least)))
    return Program(kind, mode, features, drawn)
