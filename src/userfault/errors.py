"""The errors that the standard library has no name for.

Each is also the standard error that comes closest, so that ``except OSError`` and ``except ValueError``
catch what one would expect::

    Error
    ├── StoreError      also OSError: a store could not read, write or sync
    ├── InUseError      also BlockingIOError: somebody else has the file
    ├── PoisonedError   a block could not be had and was given up
    └── CorruptError    also ValueError: a file does not hold what its format says
"""

from __future__ import annotations


class Error(Exception):
    """The root of the package's own errors."""


class StoreError(Error, OSError):
    """A store could not do what was asked of it.

    ``errno`` and ``filename`` are an OSError's (the file name is the store's name if it is no file).
    ``what`` is "read", "write", "sync" or "punch"; ``offset`` and ``length`` are the bytes of the store.
    """

    what: str = ""
    offset: int = 0
    length: int = 0


class InUseError(Error, BlockingIOError):
    """Somebody else has the file in a way that excludes this one; ``filename`` is the file."""


class PoisonedError(Error):
    """The bytes were given up after an error; `Region.heal` tries them again.

    ``offset`` and ``length`` are the bytes of the region.
    """

    offset: int = 0
    length: int = 0


class CorruptError(Error, ValueError):
    """A file does not hold what its format says."""
