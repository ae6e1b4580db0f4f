"""User-space paging for Python, on Linux userfaultfd."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from userfault.userfaultfd import Userfaultfd

_HOMES = {
    "Userfaultfd": "userfault.userfaultfd",
}

__all__ = ["Userfaultfd"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'userfault' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value
