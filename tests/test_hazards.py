"""Every hazard that concerns the engine has a test, and the page that says which is right."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "explanation" / "hazards.md").read_text()
TABLE = PAGE[PAGE.index("## Which test holds it") :]

ELSEWHERE = {
    "R3": "other processes' memory: nothing of it is evicted",
    "M6": "a rule for measurements, not for the engine",
    "D5": "a figure behind the choice of a method",
    "D6": "migration",
}
"""Hazards that are not the engine's, or no trap that a test could hold. S1 to S8 are those of snapshots."""


def test_every_hazard_of_the_engine_is_in_the_table() -> None:
    told = set(re.findall(r"^\| ([A-Z]\d) \|", PAGE[: PAGE.index("## Which test holds it")], re.M))
    tags = re.findall(r"^\| ([A-Z]\d(?:, [A-Z]\d)*) \|", TABLE, re.M)
    held = {tag for row in tags for tag in row.split(", ")}
    ours = {tag for tag in told if not tag.startswith("S")} - set(ELSEWHERE)
    assert ours - held == set()
    assert set(ELSEWHERE) <= told


def test_every_test_that_the_table_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.(?:rs|py))`: ((?:`\w+`(?:, )?)+)", TABLE)
    assert len(named) > 25
    for file, tests in named:
        path = ROOT / file if "/" in file else ROOT / "crates" / "engine" / "tests" / file
        text = path.read_text()
        for test in re.findall(r"`(\w+)`", tests):
            assert re.search(rf"(fn|def) {test}\b", text), f"{path.name} has no {test}"
