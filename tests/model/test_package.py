"""The model stands on the standard library and `userfault.abi`, and its face is the real one's."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import userfault.model
from userfault import abi
from userfault.model import Kernel, Userfaultfd
from userfault.model.versions import PROFILES, features

PACKAGE = Path(userfault.model.__file__).parent


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_it_imports_only_the_standard_library_and_the_numbers_of_the_kernel(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
            if node.module == "userfault":
                names = [f"userfault.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            own = name == "userfault.abi" or name == "userfault.model" or name.startswith("userfault.model.")
            assert own or name.partition(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_it_works_where_there_is_no_compiled_part() -> None:
    program = (
        "import sys; sys.modules['userfault._native'] = None\n"
        "from userfault.testing import simulated_process\n"
        "with simulated_process() as p: print(p.map(4096).address > 0)\n"
        "assert 'numpy' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "True\n"


def test_its_userfaultfd_has_the_methods_and_parameters_of_the_real_one() -> None:
    real = pytest.importorskip("userfault.userfaultfd", reason="needs the compiled part").Userfaultfd
    for name, method in inspect.getmembers(real):
        if name.startswith("_"):
            continue
        assert hasattr(Userfaultfd, name) or name in Userfaultfd.__annotations__, name
        if inspect.isfunction(method):
            theirs = inspect.signature(method).parameters
            ours = inspect.signature(getattr(Userfaultfd, name)).parameters
            assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
                (p.name, p.kind, p.default) for p in ours.values()
            ], name


def test_each_profile_offers_the_features_that_its_kernel_had() -> None:
    offered = {version: features(Kernel(version).version) for version in PROFILES}
    assert offered["6.1"] == 0x1FFF  # measured
    assert offered["6.12"] == offered["6.18"] == 0x1FFFF  # measured
    assert offered["5.17"] == 0x7FF  # up to MINOR_SHMEM


def test_a_name_that_is_no_version_or_defect_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel version"):
        Kernel("six")
    with pytest.raises(ValueError, match="unknown defects"):
        Kernel(defects={"gremlins"})
    assert Kernel(defects={"mmap-changing-bool"}).defects == {"mmap_changing_bool"}


def test_constants_of_the_face_come_from_the_interface() -> None:
    assert Userfaultfd.pagemap_scan.__kwdefaults__["return_mask"] == abi.PAGE_IS_GUARD - 1
