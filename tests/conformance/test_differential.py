"""The running kernel and the model, compared on programs that nobody thought of."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings

pytest.importorskip("userfault._native", reason="the compiled part is not built")

from conformance.backend import Unavailable
from conformance.differential import Program, as_script, difference
from conformance.found import FOUND, ODDITIES
from conformance.generated import programs
from conformance.sides import Makes, compare, on_the_kernel, on_the_model, running_kernel, uses_swap, version
from conftest import soak_minutes
from userfault.model.versions import PROFILES

SMALL = ("anon", "shmem", "shmem-private")
HUGE = ("hugetlb", "hugetlb-private")
OTHERS = ("thp", "file", "file-private")
EXAMPLES = {SMALL: 60, HUGE: 25, OTHERS: 25}
"""Programs in an ordinary run; `make soak` goes on for its minutes."""

if version() not in PROFILES:
    pytest.skip(f"the model has no profile of Linux {version()}", allow_module_level=True)


class Kernel:
    """Makes backends of the running kernel; `swap`: it can page out."""

    def __init__(self, make: Makes, lacks: list[str]) -> None:
        self.make = make
        self.lacks = lacks
        self.swap = not any(lack.startswith("swap") for lack in lacks)

    def agrees(self, program: Program) -> None:
        """Fails with the first difference and a script; rejects what this machine cannot run."""
        if "hugetlb" in program.kind and any(lack.startswith("huge") for lack in self.lacks):
            pytest.skip("; ".join(self.lacks))
        try:
            found = compare(self.make, program, swap=self.swap)
        except Unavailable:
            reject()
        assert found is None, f"{found}\n\n{as_script(program)}"


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(running_kernel(huge_pages=True, swap=True))
        except Unavailable as error:
            pytest.skip(str(error))
        yield Kernel(*made)


def test_a_model_that_is_wrong_is_told_by_the_first_step_and_a_script(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Program("anon", 2, 0, [("load", 0, 1), ("store", 0, 1, 9), ("wake", 0, 4)])
    wrong = on_the_model(program, swap=False, defects=("wp_vma_only",))
    real = on_the_kernel(kernel.make, program, [wrong])
    told = difference(wrong, real)
    assert told is not None
    assert told.startswith("after step 2, ('store', 0, 1, 9)")
    shown = []
    for side in ("model", "kernel"):
        monkeypatch.setattr(sys, "argv", ["script", side])
        exec(as_script(program), {})
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "('store', 0, 1, 9)" in shown[0]


@pytest.mark.parametrize("name", [*FOUND, *ODDITIES])
def test_what_was_found_once_stays_mended(name: str, kernel: Kernel) -> None:
    _, program = (FOUND | ODDITIES)[name]
    if uses_swap(program) and not kernel.swap:
        pytest.skip("; ".join(kernel.lacks))
    kernel.agrees(program)


def _property(kernel: Kernel, kinds: tuple[str, ...], **options: object) -> None:
    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)  # type: ignore[arg-type]
    @given(program=programs(kinds=kinds))
    def agree(program: Program) -> None:
        kernel.agrees(program)

    agree()


@pytest.mark.parametrize("kinds", EXAMPLES, ids=lambda kinds: kinds[0])
@pytest.mark.time_limit(600)
def test_the_model_and_the_kernel_agree(kinds: tuple[str, ...], kernel: Kernel) -> None:
    _property(kernel, kinds, max_examples=EXAMPLES[kinds], derandomize=True)


@pytest.mark.soak
def test_they_go_on_agreeing(kernel: Kernel) -> None:
    end = time.monotonic() + 60 * soak_minutes()
    while time.monotonic() < end:
        _property(kernel, (*SMALL, *HUGE, *OTHERS), max_examples=500, phases=(Phase.generate, Phase.shrink))
