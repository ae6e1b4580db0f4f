"""The machine of regions on files, opened by their path too: in the modes that create, empty and lengthen."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import userfault
from userfault import FileStore, Store
from userfault.testing import FaultyStore
from userfault.testing.stateful import RegionStateMachine

_PLACES = st.integers(0, (1 << 32) - 1)


class FileMachine(RegionStateMachine):
    """As its base, over a file."""

    def make_store(self, contents: bytes) -> Store:
        self.folder = Path(tempfile.mkdtemp(prefix="userfault-machine-"))
        self.path = self.folder / "file"
        self.path.write_bytes(contents)
        return self.by_descriptor()

    def by_descriptor(self) -> FileStore:
        # Two stores of one file: the second would be refused as a second writer.
        return FileStore(self.path, "r+", locking=False)

    def stored(self) -> bytes:
        return self.path.read_bytes()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder)

    @precondition(lambda self: self.region is None)
    @rule(
        mode=st.sampled_from(["r", "r+", "w", "w-", "x", "a", "c"]),
        begin=st.one_of(st.just(0), st.integers(0, 9000), _PLACES),
        length=_PLACES,
        block=_PLACES,
        limit=st.sampled_from([1, 5, 20, None]),
        on_error=st.sampled_from(["retry", "poison"]),
    )
    def open_path(
        self,
        mode: str,
        begin: int,
        length: int,
        block: int,
        limit: int | None,
        on_error: Literal["retry", "poison"],
    ) -> None:
        before = self.stored()
        size = self.blocks[block % len(self.blocks)]
        creates = mode in ("w", "w-", "x")
        begin %= self.largest if creates or mode == "a" else len(before)
        length = 1 + length % (self.largest if creates or mode == "a" else len(before) - begin)
        options: dict[str, Any] = {
            "offset": begin,
            "length": length,
            "block": size,
            "pages": self.pages,
            "fault": self.fault,
            "memory_limit": None if limit is None else limit * size,
            "on_error": on_error,
        }
        if mode in ("w-", "x"):
            self.refused(mode, options)
            self.path.unlink()
        region = userfault.open(self.path, mode, **options)
        if creates:
            assert self.stored() == bytes(begin + length)
        elif mode == "a":
            assert self.stored() == before + bytes(max(0, begin + length - len(before)))
        else:
            assert self.stored() == before
        self.store = FaultyStore(self.by_descriptor())
        self._opened(region)

    def refused(self, mode: str, options: dict[str, Any]) -> None:
        try:
            userfault.open(self.path, mode, **options)
        except FileExistsError:
            return
        raise AssertionError(f"mode {mode} opened a file that exists")
