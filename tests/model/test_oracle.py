"""The model agrees with what real kernels were measured to do, and the replay would notice if it did not."""

from __future__ import annotations

import ast
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import userfault.model.oracle
from model.probe_cases import all_cases
from userfault.model import fault
from userfault.model.errnos import EEXIST
from userfault.model.fill_copy import Copy
from userfault.model.oracle.__main__ import main
from userfault.model.oracle.compare import differences, left_out
from userfault.model.oracle.replay import disagreements, replay

TABLES = {"6.18": "table.jsonl.xz", "6.12": "table-6.12.jsonl.xz", "6.1": "table-6.1.jsonl.xz"}
SECTIONS = Path(userfault.model.oracle.__file__).parent / "sections"


def table(version: str) -> Path:
    beside = Path(__file__).parents[3] / "shared" / "oracle"
    path = Path(os.environ.get("USERFAULT_ORACLE", beside)) / TABLES[version]
    if not path.exists():
        pytest.skip(f"no table of {version}: {path} (set USERFAULT_ORACLE)")
    return path


def rows(version: str) -> list[dict[str, Any]]:
    with lzma.open(table(version), "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("version", TABLES)
def test_every_measured_row_is_replayed_and_agrees_in_every_field(version: str) -> None:
    wrong = {
        row["id"]: found for row in rows(version) if (found := disagreements(row, version, strict=True)) != []
    }
    assert wrong == {}


@pytest.mark.time_limit(600)
def test_every_case_that_the_probe_can_make_has_a_scenario() -> None:
    cases = list(all_cases())
    assert len(cases) == len(set(cases)) == 11_947
    assert [case for case in cases if replay(case, "6.18") is None] == []


def test_the_scenarios_run_on_the_oldest_profile_too() -> None:
    assert [case for case in list(all_cases())[::9] if replay(case, "5.17") is None] == []


def test_the_command_counts_what_it_cannot_replay_as_unsupported_and_never_as_agreement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = tmp_path / "table.jsonl"
    unknown.write_text(
        json.dumps({"id": "op/anon/missing/f0/upside_down/copy", "section": "op", "outcome": "ok"})
        + "\n"
        + json.dumps({"id": "dreams/1", "section": "dreams", "outcome": "ok"})
    )
    assert main([str(unknown), "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("unsupported ") == 2
    assert re.search(r"^all +0 +0 +2$", shown, re.MULTILINE)


def test_the_command_shows_what_differs_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "register/anon/1/f0", "section": "register", **(replay("register/anon/1/f0", "6.18") or {})}
    changed = tmp_path / "table.jsonl"
    changed.write_text(json.dumps({**row, "op": {"ret": -1, "errno": "EBUSY"}}))
    assert main([str(changed), "--verbose"]) == 1
    assert "op.ret: measured -1, the model shows 0" in capsys.readouterr().out
    changed.write_text(json.dumps(row))
    assert main([str(changed), "--verbose"]) == 0


def test_the_command_runs_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "userfault.model.oracle", str(table("6.18")), "--section", "register"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0
    assert "register" in shown.stdout


def test_a_row_with_one_observed_value_changed_disagrees() -> None:
    """Every value of a row in turn, but those that the comparison leaves out by its own rule."""
    checked = 0
    for row in rows("6.18")[::7]:
        shown = replay(row["id"], "6.18")
        assert shown is not None
        for path in _leaves(row, (), left_out(row) | {"id", "section"}):
            at: Any = row
            for key in path[:-1]:
                at = at[key]
            value, at[path[-1]] = at[path[-1]], _other(at[path[-1]])
            assert differences(row, shown), (row["id"], path)
            at[path[-1]] = value
            checked += 1
        assert differences(row, shown) == []
    assert checked > 20_000


def _leaves(value: Any, path: tuple[Any, ...], skip: frozenset[str] | set[str]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in skip:
                yield from _leaves(item, (*path, key), skip)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index), skip)
    else:
        yield path


def _other(value: Any) -> Any:
    match value:
        case int():
            return 1 - value if value in (0, 1) else value + 1
        case str():
            return "none" if value != "none" else "present"
        case list():
            return [{"ev": "pagefault", "fl": "", "off": 0, "ptid": "0"}]
        case None:
            return 0
    raise AssertionError(value)


# A scenario holds steps. What a kernel answers must come out of the model.

SAID_BY_THE_PROBE = {
    "mem",
    "mode",
    "mode2",
    "features",
    "state",
    "op",
    "args",
    "vma",
    "uffd_flags",
    "note",
    "die",
    "cloexec",
    "err",
    "setup_swap",
}
KERNEL_WORDS = re.compile(
    r"-?E[A-Z]{3,}[A-Z0-9]*|BUS_[A-Z]+|SEGV_[A-Z]+|marker:.*|nonpresent_wp|swap|untouched|blocked|um|uw|ui"
)


def _parts(path: Path) -> Iterator[ast.AST]:
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    yield from (node for node in ast.walk(tree) if id(node) not in docstrings)


@pytest.mark.parametrize("path", sorted(SECTIONS.glob("*.py")), ids=lambda path: path.stem)
def test_a_scenario_sees_nothing_that_is_written_in_it(path: Path) -> None:
    for node in _parts(path):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "see"
        ):
            continue
        key, value = node.args
        if isinstance(key, ast.Constant) and key.value in SAID_BY_THE_PROBE:
            continue
        computed = any(isinstance(part, ast.Call | ast.Name | ast.Attribute) for part in ast.walk(value))
        assert computed, f"{path.name}:{node.lineno} writes an observation down instead of making it"


@pytest.mark.parametrize("path", sorted(SECTIONS.glob("*.py")), ids=lambda path: path.stem)
def test_a_scenario_holds_no_answer_of_a_kernel(path: Path) -> None:
    words = [
        (node.lineno, node.value)
        for node in _parts(path)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and KERNEL_WORDS.fullmatch(node.value)
    ]
    assert words == []


def test_a_wrong_rule_for_copy_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [row for row in rows("6.18") if re.fullmatch(r"op/anon/missing/.*/copy", row["id"])]
    assert all(disagreements(row, "6.18") == [] for row in measured)
    monkeypatch.setattr(Copy, "small", lambda *_: -EEXIST)
    assert any(disagreements(row, "6.18") for row in measured)


def test_a_wrong_rule_for_write_protection_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [row for row in rows("6.18") if re.match(r"access/anon/wp/f0/wp_present/", row["id"])]
    assert all(disagreements(row, "6.18") == [] for row in measured)
    monkeypatch.setattr(fault, "asynchronous", lambda vma: True)
    assert any(disagreements(row, "6.18") for row in measured)
