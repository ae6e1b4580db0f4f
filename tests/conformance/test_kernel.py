"""The checklist against the running kernel: one test for each item and kind of memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("userfault._native", reason="the compiled part is not built")

from conformance.backend import Kind, Unavailable
from conformance.checklist import Item, everything
from conformance.kernel import KernelBackend
from conformance.puppet import build

CASES = [
    pytest.param(item, kind, id=item.name if kind is Kind.NONE else f"{item.name}-{kind.value}")
    for item in everything()
    for kind in item.kinds
]


@pytest.fixture(scope="session")
def puppet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled puppet.c."""
    try:
        return build(tmp_path_factory.mktemp("conformance"))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def backend(puppet: Path, tmp_path: Path, hugepages: Callable[[int], None]) -> Iterator[KernelBackend]:
    kernel = KernelBackend(puppet, tmp_path, hugepages)
    yield kernel
    kernel.close()


DEFECTS = {
    ("wp-fork.present", Kind.HUGETLB_PRIVATE): "a fork keeps the protection of private hugetlb pages",
    ("ksm_functional_tests", Kind.ANON): "unmerging does not come through write protection",
}
"""What Linux 6.1 was seen to do otherwise, and 6.12 not."""


@pytest.mark.parametrize(("item", "kind"), CASES)
def test_the_running_kernel(item: Item, kind: Kind, backend: KernelBackend) -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if (defect := DEFECTS.get((item.name, kind))) and release < (6, 12):
        pytest.skip(f"a defect that Linux 6.1 has and 6.12 has not: {defect}")
    try:
        item.check(backend, kind)
    except Unavailable as missing:
        pytest.skip(str(missing))
