"""The package builds and works without its compiled part."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tools.pure_wheel import build

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
