"""The C parts of the measurements, compiled when they are needed, called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "floors"
BUILT = Path(__file__).parent.parent / "target" / "benches"


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The shared library made of floors/NAME.c. Calls into it leave the interpreter lock."""
    source, built = SOURCES / f"{name}.c", BUILT / f"{name}.so"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        BUILT.mkdir(parents=True, exist_ok=True)
        # Its own name first: several children may come here at once.
        fresh = built.with_suffix(f".{os.getpid()}")
        command = [
            "cc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-shared",
            "-fPIC",
            "-pthread",
            str(source),
            "-o",
            str(fresh),
        ]
        subprocess.run(command, check=True)
        fresh.replace(built)
    return ctypes.CDLL(str(built))
