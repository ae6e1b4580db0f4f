"""What the README and the documentation show is run: a page's Python examples, in order, as one program."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"(<!-- not run: \S.*?-->\s*)?^```(?:python|\{code-block\} python)\n(.*?)^```$", re.M | re.S
)


def examples(page: Path) -> list[str]:
    """The Python blocks of a page that are to be run."""
    return [code for reason, code in BLOCK.findall(page.read_text()) if not reason]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_has_three_examples() -> None:
    assert len(examples(ROOT / "README.md")) == 3


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name)
def test_the_examples_of_a_page_run(page: Path, run_child, tmp_path: Path) -> None:
    program = tmp_path / "examples.py"
    program.write_text("\n".join(examples(page)))
    folder = tmp_path / "here"
    folder.mkdir()
    run_child(
        f"import os, runpy; os.chdir({str(folder)!r}); runpy.run_path({str(program)!r}, run_name='__main__')"
    )


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{name(page)}: {target}")
    assert broken == []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[<>=\[; ]", requirement)[0] for requirement in wanted}
    for manifest in [ROOT / "Cargo.toml", *ROOT.glob("crates/*/Cargo.toml")]:
        read = tomllib.loads(manifest.read_text())
        for table in (read, read.get("workspace", {})):
            for kind in ("dependencies", "dev-dependencies", "build-dependencies"):
                names |= set(table.get(kind, {}))
    page = (ROOT / "docs/explanation/dependencies.md").read_text()
    assert {each for each in names if not each.startswith("userfault") and f"`{each}`" not in page} == set()
