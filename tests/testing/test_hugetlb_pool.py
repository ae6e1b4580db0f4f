"""The pool of huge pages is as it was after a test, whoever died meanwhile."""

from pathlib import Path

import pytest

from userfault.testing import hugetlb_pool
from userfault.testing.hugetlb_pool import PoolUnavailable, reclaim, reserved

PAGES = 2


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool made of ordinary files: other tests on this machine use the real one at the same time."""
    monkeypatch.setattr(hugetlb_pool, "_POOL", tmp_path)
    monkeypatch.setattr(hugetlb_pool, "_LOCK", tmp_path / "lock")
    (tmp_path / "nr_hugepages").write_text("5\n")
    return tmp_path


def size(pool: Path) -> int:
    return int((pool / "nr_hugepages").read_text())


def test_pages_are_added_and_taken_off_again(pool: Path) -> None:
    with reserved(PAGES), reserved(3):
        assert size(pool) == 10
    assert size(pool) == 5


def test_pages_of_a_failed_test_are_taken_off_too(pool: Path) -> None:
    with pytest.raises(KeyError), reserved(PAGES):
        raise KeyError
    assert size(pool) == 5


def test_what_others_changed_meanwhile_is_kept(pool: Path) -> None:
    with reserved(PAGES):
        (pool / "nr_hugepages").write_text("107")
    assert size(pool) == 105


def test_the_pages_of_the_dead_are_given_back(pool: Path, run_child) -> None:
    run_child(
        f"""
import os
from pathlib import Path
from userfault.testing import hugetlb_pool
hugetlb_pool._POOL = Path({str(pool)!r})
hugetlb_pool._LOCK = Path({str(pool / "lock")!r})
held = hugetlb_pool.reserved({PAGES})
held.__enter__()
os._exit(0)
"""
    )
    assert size(pool) == 7
    reclaim()
    assert size(pool) == 5
    reclaim()
    assert size(pool) == 5


def test_the_pages_of_the_living_stay(pool: Path) -> None:
    with reserved(PAGES):
        reclaim()
        assert size(pool) == 7


def test_a_machine_without_huge_pages_says_so(pool: Path) -> None:
    (pool / "nr_hugepages").unlink()
    with pytest.raises(PoolUnavailable, match="no huge pages"), reserved(PAGES):
        pass


def test_the_machine_gives_real_pages(hugepages) -> None:
    hugepages(PAGES)
    assert hugetlb_pool.free_pages() >= 1
