"""What a page holds: an immutable value, so that copying a page is sharing it.

Most pages of a test hold one byte repeated, so a content is a base (one byte value, or all the bytes) and
a few patches over it. Two contents that read the same need not be equal; `Content.read` is the truth.
"""

from __future__ import annotations

from typing import Final

_PATCHES_AT_MOST: Final = 64  # beyond this the base is written out once


class Content:
    """The bytes of one page of any size. Offsets are bytes from the page's start."""

    __slots__ = ("base", "patches")

    def __init__(self, base: int | bytes, patches: tuple[tuple[int, int], ...] = ()) -> None:
        self.base = base
        self.patches = patches

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.base == other.base and self.patches == other.patches

    def __hash__(self) -> int:
        return hash((self.base, self.patches))

    def __repr__(self) -> str:
        shown = f"{self.base:#04x}" if isinstance(self.base, int) else f"{len(self.base)} bytes"
        return f"Content({shown}{', patched' if self.patches else ''})"

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length)."""
        base = self.base
        if isinstance(base, int):
            if not self.patches:
                return bytes((base,)) * length
            data = bytearray((base,)) * length
        else:
            data = bytearray(base[offset : offset + length])
        for at, value in self.patches:
            if offset <= at < offset + length:
                data[at - offset] = value
        return bytes(data)

    def write(self, offset: int, data: bytes, page_size: int) -> Content:
        """The content after `data` was stored at `offset` in a page of `page_size` bytes."""
        if len(data) == page_size:
            first = data[:1]
            return Content(first[0]) if data == first * page_size else Content(data)
        patches = {
            **dict(self.patches),
            **{offset + i: value for i, value in enumerate(data[:_PATCHES_AT_MOST])},
        }
        if len(data) <= _PATCHES_AT_MOST and len(patches) <= _PATCHES_AT_MOST:
            return Content(self.base, tuple(sorted(patches.items())))
        whole = bytearray(self.read(0, page_size))
        whole[offset : offset + len(data)] = data
        return Content(bytes(whole))

    def part(self, offset: int, length: int) -> Content:
        """The content of a smaller page cut out of this one (a huge page that is split)."""
        if isinstance(self.base, int):
            if not self.patches:
                return self
            kept = tuple((at - offset, v) for at, v in self.patches if offset <= at < offset + length)
            return Content(self.base, kept)
        return Content(self.read(offset, length))


ZERO: Final = Content(0)


def join(parts: list[Content], part_size: int) -> Content:
    """The content of one large page made of equal smaller ones (COPY into a huge page, MADV_COLLAPSE)."""
    first = parts[0]
    if (
        isinstance(first.base, int)
        and not first.patches
        and all(part is first or part == first for part in parts)
    ):
        return first
    return Content(b"".join(part.read(0, part_size) for part in parts))
