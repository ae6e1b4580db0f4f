"""The list of items: a name from the kernel's selftests, a function, and the kinds of memory it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from conformance.backend import Backend, Kind

Check = Callable[[Backend, Kind], None]


class Item(NamedTuple):
    """One behaviour."""

    name: str
    """group.item"""
    check: Check
    kinds: tuple[Kind, ...]


ITEMS: list[Item] = []


def item(name: str, *kinds: Kind) -> Callable[[Check], Check]:
    """Puts a function on the list; without kinds the item is about no memory."""

    def enter(check: Check) -> Check:
        assert all(name != other.name for other in ITEMS), f"{name} is on the list already"
        ITEMS.append(Item(name, check, kinds or (Kind.NONE,)))
        return check

    return enter


def everything() -> list[Item]:
    """The whole list, in the order of the selftests."""
    from conformance import items

    for module in items.MODULES:
        __import__(f"conformance.items.{module}")
    return ITEMS
