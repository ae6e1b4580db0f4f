"""`userfault bench` measures what it says, checks it, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from userfault.__main__ import app
from userfault.commands import bench
from userfault.commands.curves import picture
from userfault.tour import stop
from userfault.tour.stop import Truth

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a bench be a small one, without limits of the kernel's."""
    monkeypatch.setattr(stop, "MARGIN", 8 * MIB)
    monkeypatch.setattr(bench, "BLOCKS", (64 << 10, 2 << 20))
    monkeypatch.setattr("userfault.testing.memory_cgroup._parents", lambda: iter([]))


def run(folder: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", str(folder), "--size", "24MiB", "--limit", "16MiB", *options])
    return done.exit_code, done.output


def test_each_block_size_has_its_figures_and_the_file_is_gone(tmp_path: Path) -> None:
    status, text = run(tmp_path, "--json")
    assert status == 0, text
    rows = json.loads(text)["seconds"]
    assert [row["way"] for row in rows] == ["userfault, 64 KiB", "userfault, 2 MiB", "numpy.memmap"]
    assert all(row[step] > 0 for row in rows[:2] for step in ("sum", "walk", "sort"))
    assert "it would have all memory" in rows[2]["reason"]
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_line_for_each_way(tmp_path: Path) -> None:
    status, text = run(tmp_path)
    assert status == 0
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == [
        "userfault, 64 KiB",
        "userfault, 2 MiB",
        "numpy.memmap",
    ]


def test_a_wrong_result_is_told_and_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Truth.of

    def wrong(path: Path) -> Truth:
        real = truth(path)
        return Truth({**real.results, "sum": "0"}, real.sorted)

    monkeypatch.setattr(Truth, "of", wrong)
    status, text = run(tmp_path)
    assert status == 1
    assert "wrong result of sum" in text


def test_the_block_sizes_are_the_users_and_the_curves_are_drawn(tmp_path: Path) -> None:
    drawn = tmp_path / "curves.svg"
    status, text = run(tmp_path, "--block", "2MiB", "--block", "256KiB", "--picture", str(drawn), "--json")
    assert status == 0, text
    assert [row["way"] for row in json.loads(text)["seconds"]][:2] == [
        "userfault, 256 KiB",
        "userfault, 2 MiB",
    ]
    root = ElementTree.parse(drawn).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2, 2]
    assert list(tmp_path.iterdir()) == [drawn]


def test_a_curve_is_as_high_as_its_figures() -> None:
    drawn = picture(
        {"sum": "sum"}, [(4096, {"sum": 10.0}), (65536, {"sum": 1.0}), (1 << 20, {})], {"sum": 10.0}
    )
    root = ElementTree.fromstring(drawn)
    (line,) = root.findall("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    (first, second) = points
    assert first[0] < second[0]
    assert first[1] < second[1]
    dashed = [e for e in root.iter() if "stroke-dasharray" in e.attrib]
    assert [e.attrib["d"].startswith(f"M64 {first[1]}H") for e in dashed] == [True]
    with pytest.raises(ValueError, match="nothing was measured"):
        picture({"sum": "sum"}, [(4096, {})], {})


def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options in (
        ["--size", "1MiB"],
        ["--limit", "much"],
        ["--block", "5KiB"],
        ["--picture", str(tmp_path / "nowhere" / "curves.svg")],
    ):
        status, _ = run(tmp_path, *options)
        assert status == 2
    assert CliRunner().invoke(app, ["bench", str(tmp_path / "none")]).exit_code == 2
    assert list(tmp_path.iterdir()) == []
