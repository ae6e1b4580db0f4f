"""The package builds and works without its compiled part."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.pure_wheel import build

TESTS = Path(__file__).parent.parent
OFFLINE = ("No matching distribution", "Could not find a version", "ConnectionError", "Connection")

PROGRAM = """
import sys
assert not any(name == "numpy" or name.startswith("numpy.") for name in sys.modules)
import userfault, userfault.abi
from userfault.model import explore
from userfault.model.scenarios import history
from userfault.testing import rehearsal

assert explore(history.scenario("minor_leak", True)).found is not None
with rehearsal() as process:
    assert process.load(process.map(4096)) == b"\\0"
assert not any(name.startswith(("numpy", "typer")) for name in sys.modules)
try:
    userfault.open
except ImportError as error:
    print(error)
print(userfault.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("wheel"))
    except RuntimeError as error:
        if any(words in str(error) for words in OFFLINE):
            pytest.skip(f"the build backend cannot be had: {str(error).splitlines()[-1]}")
        raise


def test_it_is_for_every_platform_and_holds_no_compiled_part(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "userfault/model/kernel.py" in names
    assert "userfault/py.typed" in names
    assert not any(name.endswith((".so", ".pyd", ".rs", ".pyc")) for name in names)


def test_the_model_works_from_it_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    # -S: no site-packages, so nothing but the standard library and the wheel can be imported.
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n" + PROGRAM
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said, where = done.stdout.splitlines()
    assert Path(where).is_relative_to(target)
    assert "compiled part" in said or "needs Linux" in said or "NumPy" in said


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can read; pytest's own is for its user alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


NOBODY = 65534


def unprivileged() -> tuple[list[str], dict[str, Any]]:
    """How to run Python as a user without rights: what goes before the command, and options for subprocess.

    Where Python lies in a folder of root's alone, nobody is only called so, in a user namespace.
    """
    if os.geteuid() != 0:
        return [], {}
    ways: tuple[tuple[list[str], dict[str, Any]], ...] = (
        ([], {"user": NOBODY, "group": NOBODY, "extra_groups": []}),
        (["unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}"], {}),
    )
    for prefix, options in ways:
        try:
            subprocess.run([*prefix, sys.executable, "-c", "import pytest"], check=True, cwd="/", **options)
        except (OSError, subprocess.CalledProcessError):
            continue
        return prefix, options
    pytest.skip("no other user may run this Python, and there are no user namespaces")


@pytest.mark.time_limit(900)
def test_the_tests_of_the_model_pass_without_root_and_without_the_compiled_part(
    wheel: Path, open_folder: Path
) -> None:
    site, tests = open_folder / "site", open_folder / "tests"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    for name in ("conftest.py", "child_process.py"):
        (tests / name).parent.mkdir(exist_ok=True)
        shutil.copy(TESTS / name, tests)
    for name in ("model", "conformance"):
        shutil.copytree(TESTS / name, tests / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TESTS.parent / "tools", open_folder / "tools")
    shutil.copy(TESTS.parent / "pyproject.toml", open_folder)
    # The wheel comes before whatever else is installed here.
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import os, pytest, userfault\n"
        f"assert userfault.__file__.startswith({str(site)!r}), userfault.__file__\n"
        "assert os.geteuid() != 0\n"
        "sys.modules['userfault._native'] = None\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    # The replay of all cases, and the pages that are written from the model, are the same work for anybody.
    quick = ["-q", "-p", "no:cacheprovider", "-k", "not every_case and not page", "--no-header"]
    prefix, options = unprivileged()
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program, *quick, "tests/model", "tests/conformance/test_model.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=open_folder,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        **options,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b[2-9]\d\d passed", done.stdout), done.stdout[-500:]
