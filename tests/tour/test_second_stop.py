"""The second stop shows what is true of points of memory that keeps changing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from userfault.tour import second_stop

MIB = 1 << 20


def shown(size: int = 16 * MIB) -> tuple[bool, str]:
    console = Console(record=True, width=140, force_terminal=False)
    return second_stop.show(console, size), console.export_text()


def test_the_second_stop_takes_points_verifies_and_restores_them() -> None:
    right, text = shown()
    assert right, text
    for name in second_stop.NAMES.values():
        assert name in text
    assert text.count("✓") == 2
    assert "Both points equal copies made at their cuts." in text


def test_what_it_says_of_the_steps_is_measured(tmp_path: Path) -> None:
    said = {message["step"]: message for message in second_stop.run(16 * MIB, tmp_path)}
    assert list(said) == list(second_stop.NAMES)
    assert 0 < said["full"]["stall"] <= said["full"]["seconds"]
    assert said["full"]["size"] >= 16 * MIB > said["incremental"]["size"] > 0


def test_a_wrong_point_is_shown_and_fails_the_tour(monkeypatch: pytest.MonkeyPatch) -> None:
    run = second_stop.run

    def wrong(size: int, folder: Path) -> Iterator[dict[str, Any]]:
        for message in run(size, folder):
            yield {**message, "right": False} if message["step"] == "restore" else message

    monkeypatch.setattr(second_stop, "run", wrong)
    right, text = shown()
    assert not right
    assert "not what memory was" in text


def test_a_program_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right, text = shown(8)
    assert not right
    assert "did not come to its end" in text
