"""Every point is what memory held at its cut, while the program writes at full speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunChild

PROGRAM = Path(__file__).parent / "exactness.py"
HUGE_PAGES = 6
"""For the two huge arrays of the program, and one of each may straddle."""


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("pool", [True, False], ids=["hugetlb", "transparent"])
@pytest.mark.parametrize("drain", ["auto", "off"])
@pytest.mark.parametrize("compress", ["none", "lz4", "zstd"])
def test_every_point_obeys_the_laws_of_its_memory_and_equals_a_copy_made_at_its_cut(
    run_child: RunChild,
    hugepages: Callable[[int], None],
    tmp_path: Path,
    compress: str,
    drain: str,
    pool: bool,
) -> None:
    if pool:
        hugepages(HUGE_PAGES)
    done = run_child(PROGRAM, str(tmp_path), compress, drain, "20", "--huge", timeout=280)
    assert "guarded" in done.stdout
    assert "tracked" in done.stdout
    assert "copied" in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("compress", ["none", "lz4", "zstd"])
def test_hundreds_of_points_obey_them(
    run_child: RunChild, tmp_path: Path, soak_seconds: float, compress: str
) -> None:
    points = str(max(300, int(soak_seconds)))
    run_child(PROGRAM, str(tmp_path), compress, "auto", points, "--huge", timeout=soak_seconds + 100)
