"""What the README and the documentation show is run: a page's Python examples, in order, as one program."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"(<!-- (?:not run|needs): \S.*?-->\s*)?^```(?:python|\{code-block\} python)\n(.*?)^```$", re.M | re.S
)
NEEDS = re.compile(r"<!-- needs: (\w+) -->")


def examples(page: Path) -> list[str]:
    """The Python blocks of a page that are to be run."""
    return [code for reason, code in BLOCK.findall(page.read_text()) if not reason]


def guests() -> list[Any]:
    """The blocks that need a package of others, which is not one of ours: page, package, block."""
    return [
        pytest.param(found[1], code, id=f"{name(page)}-{found[1]}")
        for page in PAGES
        for reason, code in BLOCK.findall(page.read_text())
        if (found := NEEDS.match(reason))
    ]


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


@pytest.mark.parametrize(("package", "code"), guests())
def test_an_example_that_needs_another_package_runs_by_itself_where_that_is_installed(
    package: str, code: str, run_child, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = tmp_path / "example.py"
    program.write_text(code)
    run_child(f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path({str(program)!r})", timeout=100)


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


UMAP = """
umap umap_ex uunmap umap_flush umap_prefetch_item umap_prefetch umap_has_write_support umap_fetch_and_pin
umapcfg_get_umap_page_size umapcfg_get_max_fault_events umapcfg_get_num_fillers umapcfg_get_num_evictors
umapcfg_get_max_pages_in_buffer umapcfg_get_read_ahead umapcfg_get_evict_low_water_threshold
umapcfg_get_evict_high_water_threshold umapcfg_get_system_page_size UMAP_PRIVATE UMAP_FIXED UMAP_FAILED
Store make_store read_from_store write_to_store SparseStore get_current_capacity get_capacity close_files
UMAP_MAX_FAULT_EVENTS UMAP_PAGE_FILLERS UMAP_PAGE_EVICTORS UMAP_EVICT_HIGH_WATER_THRESHOLD
UMAP_EVICT_LOW_WATER_THRESHOLD UMAP_PAGESIZE UMAP_BUFSIZE UMAP_MONITOR_FREQ UMAP_LOG_LEVEL
UMAP_LOG_NO_TIMESTAMP_LEVEL UMAP_READ_AHEAD UMAP_RO_MODE ENABLE_LOGGING ENABLE_DISPLAY_STATS ENABLE_TESTS
ENABLE_TESTS_LINK_STATIC_UMAP caliper_DIR
"""
"""What umap 2.1.0 declares in its headers, asks its environment for, and lets a build choose."""


def test_whoever_comes_from_umap_finds_each_of_its_calls_and_settings() -> None:
    rows = re.findall(r"^\| (.*?) \| ", (ROOT / "docs/how-to/coming-from-umap.md").read_text(), re.M)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", " ".join(rows)))))
    assert set(UMAP.split()) - words == set()
