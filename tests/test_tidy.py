"""The house rules that a machine can hold. CONTRIBUTING.md says what each is for."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from docstrings import complaints, public_definitions

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "userfault"

LAYERS = ["userfault-uffd", "userfault-store", "userfault-engine", "userfault-snapshot", "userfault-python"]
"""The crates, lowest first: a crate may depend on those before it."""

LONGEST = 800
LONGER_WITH_REASON: dict[str, str] = {}
"""Files that may pass LONGEST lines, each with its reason."""


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file that belongs to the repository."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def crates() -> dict[str, dict[str, object]]:
    manifests = [tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("crates/*/Cargo.toml"))]
    return {manifest["package"]["name"]: manifest for manifest in manifests}


def dependencies(manifest: dict[str, object]) -> set[str]:
    """The names of everything a crate depends on: to run, to build and to test, on any platform."""
    found: set[str] = set()
    for key, value in manifest.items():
        if key.endswith("dependencies") and isinstance(value, dict):
            found |= set(value)
        elif key == "target" and isinstance(value, dict):
            for platform in value.values():
                found |= dependencies(platform)
    return found


def test_every_crate_has_a_layer() -> None:
    assert set(crates()) == set(LAYERS)


@pytest.mark.parametrize("crate", LAYERS)
def test_a_crate_depends_only_on_the_layers_below(crate: str) -> None:
    ours = {name for name in dependencies(crates()[crate]) if name.startswith("userfault")}
    assert ours <= set(LAYERS[: LAYERS.index(crate)])


@pytest.mark.parametrize("crate", LAYERS)
def test_a_crate_takes_the_lints_of_the_workspace(crate: str) -> None:
    assert crates()[crate].get("lints") == {"workspace": True}


def test_an_unsafe_block_without_a_safety_comment_is_an_error() -> None:
    lints = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["lints"]
    assert lints["clippy"]["undocumented_unsafe_blocks"] == "deny"
    assert lints["rust"]["unsafe_op_in_unsafe_fn"] == "deny"


def test_no_release_has_the_defects_that_tests_put_back() -> None:
    native = importlib.import_module("userfault._native")
    assert native.__file__
    assert b"USERFAULT_DEFECT" not in Path(native.__file__).read_bytes()


def test_only_the_python_crate_knows_python() -> None:
    knowing = {name for name, manifest in crates().items() if dependencies(manifest) & {"pyo3", "numpy"}}
    assert knowing == {"userfault-python"}


def test_unsafe_outside_the_kernel_interface_says_why_at_the_top_of_its_file(tracked: list[Path]) -> None:
    silent = []
    for path in tracked:
        if path.suffix != ".rs" or "uffd" in path.relative_to(ROOT).parts:
            continue
        text = path.read_text()
        code = re.sub(r"//.*|\"(\\.|[^\"\\])*\"", "", text)
        reasons = [line for line in text.splitlines() if re.match(r"//! Unsafe: \S", line)]
        if re.search(r"\bunsafe\b", code) and not reasons:
            silent.append(named(path))
    assert silent == []


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """The absolute names of the modules that a module of `package` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            if node.module == "userfault":
                yield from (f"userfault.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            if node.module:
                yield module
            else:
                yield from (f"{module}.{alias.name}" for alias in node.names)


def foreign(path: Path, allowed: tuple[str, ...]) -> list[str]:
    """Imports of a file that are neither the standard library's nor one of `allowed` or below it."""
    package = ".".join(["userfault", *path.relative_to(PACKAGE).parent.parts])
    return [
        f"{named(path)}: {module}"
        for module in imported(ast.parse(path.read_text()), package)
        if module.partition(".")[0] not in sys.stdlib_module_names
        and not any(module == name or module.startswith(name + ".") for name in allowed)
    ]


def test_the_model_imports_the_standard_library_and_the_abi_alone() -> None:
    allowed = ("userfault.abi", "userfault.model")
    assert [
        line for path in sorted((PACKAGE / "model").rglob("*.py")) for line in foreign(path, allowed)
    ] == []


@pytest.mark.parametrize("module", ["abi.py", "__init__.py"])
def test_what_works_on_any_platform_imports_the_standard_library_alone(module: str) -> None:
    path = PACKAGE / module
    if not path.exists():
        pytest.skip(f"{module} is not written yet")
    # Inside functions and behind `if TYPE_CHECKING` anything goes: it is not run by the import.
    tree = ast.parse(path.read_text())
    at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    outside = [
        name
        for name in imported(at_import, "userfault")
        if name.partition(".")[0] not in sys.stdlib_module_names and name != "userfault.abi"
    ]
    assert outside == []


def test_files_are_named_after_concepts(tracked: list[Path]) -> None:
    vague = re.compile(
        r"^(utils?|helpers?|managers?|misc|common|stuff|tools?)(\.|$)|_(utils?|helpers?|manager)\."
    )
    assert [named(path) for path in tracked if vague.search(path.name)] == []


def test_a_file_holds_one_concept(tracked: list[Path]) -> None:
    long = {
        named(path): lines
        for path in tracked
        if path.suffix in {".rs", ".py", ".pyi", ".c"} and (lines := path.read_text().count("\n")) > LONGEST
    }
    assert {name: lines for name, lines in long.items() if name not in LONGER_WITH_REASON} == {}
    assert set(LONGER_WITH_REASON) <= set(long), "a reason for a file that is not long"


def test_no_path_of_one_machine_is_in_the_repository(tracked: list[Path]) -> None:
    paths = re.compile(r"(?<![\w.}>-])/(wor[k]|roo[t]|home/\w+|Users)/")
    found = []
    for path in tracked:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{named(path)}:{n}" for n, line in enumerate(lines, 1) if paths.search(line)]
    assert found == []


def test_every_skip_says_why(tracked: list[Path]) -> None:
    silent = []
    for path in tracked:
        if path.suffix == ".rs":
            silent += [named(path) for line in path.read_text().splitlines() if line.strip() == "#[ignore]"]
        elif path.suffix == ".py" and "tests" in path.parts:
            silent += [f"{named(path)}:{line}" for line in skips_without_reason(ast.parse(path.read_text()))]
    assert silent == []


def skips_without_reason(tree: ast.Module) -> Iterator[int]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords}
            if name in {"pytest.skip", "pytest.xfail"} and not (node.args or "reason" in keywords):
                yield node.lineno
            if re.search(r"\bmark\.(skip|skipif|xfail)$", name) and "reason" not in keywords:
                yield node.lineno
        elif (
            isinstance(node, ast.Attribute)
            and id(node) not in called
            and re.search(r"\bmark\.(skip|xfail)$", ast.unparse(node))
        ):
            yield node.lineno


def public_modules() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not any(part.startswith("_") and part != "__init__.py" for part in path.relative_to(PACKAGE).parts)
    ]


@pytest.mark.parametrize("path", public_modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_is_documented(path: Path) -> None:
    """Of every module there is a docstring; of the face, shapes, units and errors too (see docstrings.py)."""
    tree = ast.parse(path.read_text())
    # The model is read like a specification: its quantities are explained where they are defined.
    whole = "model" not in path.relative_to(PACKAGE).parts
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for definition in public_definitions(tree):
        found += complaints(definition.or_inherited(inherited(path, definition.name)), whole=whole)
    assert found == []


def inherited(path: Path, name: str) -> str | None:
    """The docstring of the method that a method overrides, wherever its class stands."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return inspect.getdoc(functools.reduce(getattr, name.split("."), module)) if "." in name else None


def test_every_name_of_the_compiled_part_is_documented() -> None:
    """Its docstrings are Rust comments, so they are asked of the module; the signatures are the stub's."""
    native = pytest.importorskip("userfault._native", reason="the compiled part is not built")
    found = []
    for definition in public_definitions(ast.parse((PACKAGE / "_native.pyi").read_text()), stub=True):
        value: object = native
        for part in definition.name.split("."):
            value = getattr(value, part)
        found += complaints(definition.with_docstring(getattr(value, "__doc__", None)), whole=True)
    assert found == []
