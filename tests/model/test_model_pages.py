"""The pages that are written from the model say what the model says now."""

from __future__ import annotations

import pytest
from tools.model_pages import DOCS, EVERYTHING, bound, pages

from userfault.model import explore
from userfault.model.scenarios import engine

# Every situation is explored anew: a minute on an idle machine.
pytestmark = pytest.mark.time_limit(400)


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    if not DOCS.exists():
        pytest.skip("the documentation is not here (a package without the repository)")
    return dict(pages())


@pytest.mark.time_limit(900)
def test_every_page_is_as_the_model_says(written: dict[str, str]) -> None:
    old = [name for name, text in written.items() if (DOCS / name).read_text() != text]
    assert old == [], "run: python tools/model_pages.py"


@pytest.mark.time_limit(900)
def test_no_page_is_left_over(written: dict[str, str]) -> None:
    there = {str(path.relative_to(DOCS)) for path in (DOCS / "explanation" / "defects").iterdir()}
    assert there == {name for name in written if name.startswith("explanation/defects/")}


@pytest.mark.soak
def test_the_bound_of_the_largest_situation_is_as_written() -> None:
    assert bound(explore(engine.scenario("everything"))) == EVERYTHING
