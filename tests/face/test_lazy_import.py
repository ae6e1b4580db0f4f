"""Importing the package works everywhere; the first use says what is missing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import userfault
from conftest import RunChild

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} or name.startswith({module!r} + "."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(module: str) -> str:
    return WITHOUT.format(module=module)


def test_importing_the_package_loads_nothing_else(run_child: RunChild) -> None:
    done = run_child(
        "import sys, userfault\n"
        "print([m for m in sys.modules if m.startswith(('numpy', 'typer', 'userfault.'))])"
    )
    assert done.stdout.strip() == "[]"


def test_without_the_compiled_part_the_first_use_says_so(run_child: RunChild) -> None:
    code = without("userfault._native") + "import userfault, userfault.abi\nuserfault.FileStore('x')"
    done = run_child(code, check=False)
    assert done.status == 1
    assert "ImportError: userfault.FileStore needs the compiled part of the package" in done.stderr


def test_elsewhere_the_first_use_names_linux(run_child: RunChild) -> None:
    code = (
        without("userfault._native") + "sys.platform = 'darwin'\nimport userfault\nuserfault.FileStore('x')"
    )
    done = run_child(code, check=False)
    assert done.status == 1
    assert "needs Linux 5.19 or newer: this is darwin" in done.stderr


def test_without_numpy_arrays_say_so(run_child: RunChild) -> None:
    done = run_child(without("numpy") + "import userfault\nuserfault.memmap('x')", check=False)
    assert done.status == 1
    assert "ImportError: userfault.memmap needs NumPy" in done.stderr


def test_without_numpy_regions_work(run_child: RunChild, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    code = without("numpy") + "import userfault\nprint(bytes(userfault.open(sys.argv[1])))"
    assert run_child(code, str(tmp_path / "x")).stdout.strip() == "b'abc'"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = userfault.opne  # type: ignore[attr-defined]


def test_every_public_name_has_one_home() -> None:
    source = ast.parse(Path(userfault.__file__).read_text())
    checked = {
        alias.name
        for node in source.body
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert checked == set(userfault.__all__) == set(userfault._HOMES)
    assert set(userfault.__all__) <= set(dir(userfault))
