"""The names and defaults that other programs use. What is added later is keyword-only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import userfault
from userfault.testing import FaultyStore

PROMISED: dict[str, tuple[Callable[..., Any], str]] = {
    "open": (
        userfault.open,
        "path_or_store, mode='r', *, offset=0, length=None, block='auto', memory_limit=None, "
        "fault='threads', pages='auto', on_error='auto', retry_for=30.0, readahead='auto', locking=None",
    ),
    "memmap": (
        userfault.memmap,
        "filename, dtype=uint8, mode='r+', offset=0, shape=None, order='C', *, memory_limit=None, "
        "block='auto'",
    ),
    "load": (userfault.load, "file, mmap_mode='r', *, memory_limit=None"),
    "open_memmap": (
        userfault.open_memmap,
        "filename, mode='r+', dtype=None, shape=None, fortran_order=False, version=None, *, "
        "memory_limit=None",
    ),
    "set_memory_limit": (userfault.set_memory_limit, "limit"),
    "stats": (userfault.stats, ""),
    "Region.ndarray": (userfault.Region.ndarray, "self, dtype, shape=None, order='C', offset=0"),
    "Region.flush": (userfault.Region.flush, "self, offset=0, length=None"),
    "Region.close": (userfault.Region.close, "self"),
    "Region.prefetch": (userfault.Region.prefetch, "self, ranges, *, wait=False"),
    "Region.pin": (userfault.Region.pin, "self, offset=0, length=None, *, write=False"),
    "Region.evict": (userfault.Region.evict, "self, offset=0, length=None"),
    "Region.stats": (userfault.Region.stats, "self"),
    "Region.resident": (userfault.Region.resident, "self, offset=0, length=None"),
    "Region.heal": (userfault.Region.heal, "self, offset, length"),
    "Region.pread": (userfault.Region.pread, "self, n, offset"),
    "Region.pwrite": (userfault.Region.pwrite, "self, data, offset"),
    "Region.readinto": (userfault.Region.readinto, "self, file, offset, n"),
    "memmap.flush": (userfault.memmap.flush, "self"),
    "memmap.close": (userfault.memmap.close, "self"),
    "FaultyStore": (FaultyStore, "store, plan=()"),
}


def written(parameters: list[inspect.Parameter]) -> str:
    """Parameters as a signature has them, without types."""
    parts: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = parameter.default
        if default is parameter.empty:
            parts.append(parameter.name)
        else:
            text = "uint8" if default is np.uint8 else repr(default)
            parts.append(f"{parameter.name}={text}")
    return ", ".join(parts)


@pytest.mark.parametrize("name", PROMISED)
def test_the_signature_is_the_promised_one(name: str) -> None:
    function, promised = PROMISED[name]
    parameters = list(inspect.signature(function).parameters.values())
    names = [part.split("=")[0] for part in promised.split(", ")]
    added = [p for p in parameters if p.name not in names]
    assert written([p for p in parameters if p not in added]) == promised
    assert all(p.kind is p.KEYWORD_ONLY for p in added)


def test_some_names_are_properties() -> None:
    for name in ("errors", "kernel_faults", "closed", "mode", "offset", "block", "pages", "name", "store"):
        assert not callable(inspect.getattr_static(userfault.Region, name, None)), name
