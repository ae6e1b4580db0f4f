"""User-space paging for Python, on Linux userfaultfd.

A file larger than memory, used as memory::

    import userfault

    a = userfault.memmap("big.bin", dtype="float64", mode="r+", memory_limit="256MiB")
    a.sort()
    a.flush()

Names are loaded when they are first used, so that importing the package works on every platform; on one
that cannot page, the first use says what is missing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from userfault._native import (
        FileStore,
        MemoryStore,
        OverlayStore,
        Pin,
        PrefetchTicket,
        Stats,
        Store,
        ZeroStore,
    )
    from userfault.arrays import Arena, empty, full, zeros
    from userfault.checkpointer import Checkpointer, Point
    from userfault.errors import CorruptError, Error, InUseError, PoisonedError, StoreError
    from userfault.limits import set_memory_limit, stats
    from userfault.mapped_array import memmap
    from userfault.npy import load, open_memmap
    from userfault.opening import open
    from userfault.region import BlockError, Region
    from userfault.restoring import State, restore
    from userfault.serving import Served, serve
    from userfault.userfaultfd import Userfaultfd

__version__ = "0.1.0"

_HOMES = {
    "Arena": "userfault.arrays",
    "BlockError": "userfault.region",
    "Checkpointer": "userfault.checkpointer",
    "CorruptError": "userfault.errors",
    "Error": "userfault.errors",
    "FileStore": "userfault._native",
    "InUseError": "userfault.errors",
    "MemoryStore": "userfault._native",
    "OverlayStore": "userfault._native",
    "Pin": "userfault._native",
    "Point": "userfault.checkpointer",
    "PoisonedError": "userfault.errors",
    "PrefetchTicket": "userfault._native",
    "Region": "userfault.region",
    "Served": "userfault.serving",
    "State": "userfault.restoring",
    "Stats": "userfault._native",
    "Store": "userfault._native",
    "StoreError": "userfault.errors",
    "Userfaultfd": "userfault.userfaultfd",
    "ZeroStore": "userfault._native",
    "empty": "userfault.arrays",
    "full": "userfault.arrays",
    "load": "userfault.npy",
    "memmap": "userfault.mapped_array",
    "open": "userfault.opening",
    "open_memmap": "userfault.npy",
    "restore": "userfault.restoring",
    "serve": "userfault.serving",
    "set_memory_limit": "userfault.limits",
    "stats": "userfault.limits",
    "zeros": "userfault.arrays",
}

__all__ = [
    "Arena",
    "BlockError",
    "Checkpointer",
    "CorruptError",
    "Error",
    "FileStore",
    "InUseError",
    "MemoryStore",
    "OverlayStore",
    "Pin",
    "Point",
    "PoisonedError",
    "PrefetchTicket",
    "Region",
    "Served",
    "State",
    "Stats",
    "Store",
    "StoreError",
    "Userfaultfd",
    "ZeroStore",
    "empty",
    "full",
    "load",
    "memmap",
    "open",
    "open_memmap",
    "restore",
    "serve",
    "set_memory_limit",
    "stats",
    "zeros",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'userfault' has no attribute {name!r}")
    try:
        value: object = getattr(import_module(home), name)
    except ImportError as error:
        missing = error.name
        if missing == "userfault" and "'_native'" in str(error):  # from userfault import _native
            missing = "userfault._native"
        if missing not in ("userfault._native", "numpy"):
            raise
        raise ImportError(_what_is_missing(name, missing), name=missing) from error
    globals()[name] = value
    return value


def _what_is_missing(name: str, module: str) -> str:
    if module == "numpy":
        return f"userfault.{name} needs NumPy, which is not installed: pip install numpy"
    if sys.platform != "linux":
        return (
            f"userfault.{name} needs Linux 5.19 or newer: this is {sys.platform}, which has no userfaultfd. "
            "userfault.abi, userfault.model and userfault.testing.simulated_process work here."
        )
    return (
        f"userfault.{name} needs the compiled part of the package ({module}), which is not installed: "
        "build it with `pip install -e .` in the repository (it needs cargo)."
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
