"""The checklist against the executable model."""

from __future__ import annotations

import pytest

from conformance.backend import Kind, Unavailable
from conformance.checklist import Item, everything
from conformance.model import ModelBackend

SLOW = ("stress.threads", "stress.atomic-copy", "stress.wp", "stress.first-read", "stress.read-and-poll")
"""Thousands of counts under contention: one kind of memory is enough for each change."""


def _case(item: Item, kind: Kind) -> object:
    marks = [pytest.mark.soak] if item.name in SLOW and (item.name, kind) != (SLOW[0], Kind.ANON) else []
    name = item.name if kind is Kind.NONE else f"{item.name}-{kind.value}"
    return pytest.param(item, kind, id=name, marks=marks)


@pytest.mark.parametrize(
    ("item", "kind"), [_case(item, kind) for item in everything() for kind in item.kinds]
)
def test_the_model(item: Item, kind: Kind) -> None:
    try:
        item.check(ModelBackend(), kind)
    except Unavailable as missing:
        pytest.skip(str(missing))
