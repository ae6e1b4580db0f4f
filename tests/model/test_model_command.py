"""`userfault model ...` from the command line."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from userfault.__main__ import app

OWN = '''
from userfault.model import Kernel, World

def build():
    """A thread of one's own."""
    kernel = Kernel()
    app = kernel.process("app")

    def program(t):
        yield from t.mmap(0x10000000, 4096)
        yield from t.store(0x10000000, b"hello")
        return (yield from t.load(0x10000000, 5))

    app.spawn("T1", program)
    return World(kernel, places={"A": 0x10000000})
'''


def model(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["model", *arguments])


def test_it_lists_every_scenario() -> None:
    listed = model("scenarios").output
    for name in ("history/mmap_changing_bool", "handlers/forgets_eagain", "engine/evict"):
        assert name in listed


def test_exploring_prints_the_counterexample_and_draws_it(tmp_path: Path) -> None:
    svg, html = tmp_path / "chart.svg", tmp_path / "chart.html"
    done = model("explore", "history/mmap_changing_bool", "--svg", str(svg), "--html", str(html))
    assert done.exit_code == 1
    assert "mmap_changing = 0" in done.output
    assert ET.parse(svg).getroot().tag.endswith("svg")
    assert "mmap_changing = 0" in html.read_text()


def test_exploring_the_mended_twin_succeeds() -> None:
    done = model("explore", "history/mmap_changing_bool", "--mended")
    assert done.exit_code == 0
    assert "every interleaving was looked at" in done.output


def test_a_wrong_rule_of_the_engine_is_named_on_the_command_line() -> None:
    assert model("explore", "engine/two_readers", "--wrong", "stale_message_is_evidence").exit_code == 1
    refused = model("explore", "engine/two_readers", "--wrong", "luck")
    assert refused.exit_code == 2
    assert "stale_message_is_evidence" in refused.output


def test_a_bound_that_is_too_small_has_an_exit_status_of_its_own() -> None:
    assert model("explore", "history/mmap_changing_bool", "--mended", "--max-steps", "5").exit_code == 3


def test_walks_can_be_asked_for() -> None:
    done = model("explore", "handlers/forgets_to_wake", "--strategy", "random:500:1")
    assert done.exit_code == 1
    assert model("explore", "handlers/forgets_to_wake", "--strategy", "luck").exit_code == 2


def test_a_file_of_yours_is_run_and_explored(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    run = model("run", str(path))
    assert run.exit_code == 0
    assert "returned b'hello'" in run.output
    assert "store A" in run.output
    explored = model("explore", str(path))
    assert explored.exit_code == 0
    assert "A thread of one's own" in explored.output


@pytest.mark.parametrize("text", ["", "build = 3\n"])
def test_a_file_without_a_scenario_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.py"
    path.write_text(text)
    done = model("run", str(path))
    assert done.exit_code == 2
    assert "defines neither" in done.output


def test_the_table_answers_the_question_of_the_swapped_page() -> None:
    """What does a write to a swapped-out, write-protected shmem page do under MISSING|WP?"""
    done = model("table", "shmem_shared", "missing+wp", "wp_swapped")
    assert done.exit_code == 0
    (row,) = (line for line in done.output.splitlines() if line.startswith("a write "))
    assert row.split()[2:4] == ["write-protect", "ok"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("anon", "minor", "none"), "no page of anon memory"),
        (("wood", "missing", "none"), "is none of anon"),
        (("anon", "missing", "wp_present"), "no page of anon memory"),
        (("anon", "wp", "wp_marker_none"), "0x2000"),
    ],
)
def test_a_table_that_cannot_be_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = model("table", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
