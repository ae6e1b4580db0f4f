"""Every mistaken handler is caught, and the mended one beside it survives every interleaving."""

from __future__ import annotations

import pytest

from model.timing import timed
from userfault.model import explore
from userfault.model.scenarios import handlers


@pytest.mark.parametrize("name", handlers.NAMES)
def test_the_mistake_is_found(name: str) -> None:
    result, seconds = timed(handlers.scenario(name, False))
    assert result.found is not None
    assert seconds < 10


@pytest.mark.parametrize("name", handlers.NAMES)
def test_the_mended_handler_is_exhausted_without_a_violation(name: str) -> None:
    result, seconds = timed(handlers.scenario(name, True))
    assert result.exhausted, str(result)
    assert seconds < 60


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("forgets_eagain", "T1 cannot go on: sleep until the fault"),
        ("retries_while_readable", "T1 cannot go on: sleep until the fault"),
        ("closes_too_early", r"read b'\x00'"),
        ("fills_late", "read b'd'"),
        ("trusts_the_order", r"read b'\x00'"),
        ("serves_itself", "T1 cannot go on"),
        ("reads_into_served_memory", "T1 cannot go on"),
        ("allocates_in_fork", "T1 cannot go on: sleep until Fork"),
    ],
)
def test_what_a_mistake_leads_to(name: str, wrong: str) -> None:
    found = explore(handlers.scenario(name, False)).found
    assert found is not None
    assert wrong in found.wrong
