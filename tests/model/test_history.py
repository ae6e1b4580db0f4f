"""Every defect in the kernel's history is found with the defect on, and refuted with it off."""

from __future__ import annotations

import pytest

from model.timing import timed
from userfault.model import Exploration, explore
from userfault.model.defects import DEFECTS
from userfault.model.scenarios import history

FIND_WITHIN = 10.0  # seconds
EXHAUST_WITHIN = 60.0


def test_every_switch_of_the_kernel_has_a_scenario() -> None:
    assert set(history.NAMES) == set(DEFECTS)
    assert len(history.NAMES) == 10


@pytest.mark.parametrize("name", history.NAMES)
def test_the_defect_is_found(name: str) -> None:
    result, seconds = timed(history.scenario(name, True))
    assert result.found is not None
    assert seconds < FIND_WITHIN


@pytest.mark.parametrize("name", history.NAMES)
def test_the_mended_kernel_is_exhausted_without_a_violation(name: str) -> None:
    result, seconds = timed(history.scenario(name, False))
    assert result.exhausted, str(result)
    assert seconds < EXHAUST_WITHIN


@pytest.mark.parametrize("name", history.NAMES)
def test_the_shortest_trace_is_the_same_every_time(name: str) -> None:
    one, two = (explore(history.scenario(name, True)).found for _ in range(2))
    assert one is not None
    assert str(one) == str(two)


def steps(result: Exploration) -> list[str]:
    assert result.found is not None
    return [f"{line.who}: {line.what} | {'; '.join(line.changed)}" for line in result.found.lines()]


def test_the_trace_of_mmap_changing_tells_the_story_of_its_commit() -> None:
    """Set twice, cleared once while the other event is unread, and the fill goes through."""
    told = steps(explore(history.scenario("mmap_changing_bool", True)))

    def at(*words: str) -> int:
        return next(n for n, line in enumerate(told) if all(word in line for word in words))

    first_queued = at("queued Remove", "start=A")
    second_queued = at("queued Remove", "start=B")
    read = at("monitor", "read Remove")
    cleared = at("acknowledge the event", "mmap_changing = 0")
    filled = at("monitor", "COPY: filled B")
    assert max(first_queued, second_queued) < read < cleared < filled
    assert sum("mmap_changing = 1" in line for line in told) == 2
    # The event that is never read is the one about the page that is filled.
    assert "start=A" in told[read]
    assert told[cleared].startswith("T1:")
    assert not any("read Remove" in line and "start=B" in line for line in told)


def test_a_page_that_nobody_protected_is_asked_about_for_ever() -> None:
    found = explore(history.scenario("wp_vma_only", True)).found
    assert found is not None
    assert found.lap
    lap = [line.what for line in found.lines()][-found.lap :]
    assert any("unprotect" in what for what in lap)
    assert any("queue write-protect fault" in what for what in lap)
