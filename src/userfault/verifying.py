"""Looking for wrong bytes in a directory of points."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from userfault import _native

__all__ = ["Damage", "Verified", "verify"]


@dataclass(frozen=True)
class Damage:
    """Something that is not what was saved."""

    step: int | None
    """The point, if one is touched."""
    array: str | None
    """The array, if it is known."""
    offset: int | None
    """The first byte of the damaged block in the array."""
    path: str
    """The file."""
    detail: str
    """What is wrong."""

    def __str__(self) -> str:
        where = [f"step {self.step}"] if self.step is not None else []
        where += [f"array {self.array!r}"] if self.array is not None else []
        where += [f"block at byte {self.offset}"] if self.offset is not None else []
        return f"{', '.join([*where, str(self.path)])}: {self.detail}"


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what was found."""

    points: int
    """Number of points."""
    nbytes: int
    """Bytes of blocks that were read and hashed; blocks that points share count once."""
    damage: list[Damage]
    """What is wrong with points."""
    unused: list[Damage]
    """Bytes that belong to no point and are not zeros: harmless, the next prune gives them back."""


def verify(
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> Verified:
    """Reads every byte of all finished points, or of one.

    `progress(nbytes)` is told now and then how many bytes have been checked since the last time. Raises
    FileNotFoundError if there is no checkpoint or no such point.
    """
    points, nbytes, damage, unused = _native.verify_points(directory, step, progress)
    return Verified(points, nbytes, [Damage(*line) for line in damage], [Damage(*line) for line in unused])
