"""The running kernel and the model, compared on programs that nobody thought of."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("userfault._native", reason="the compiled part is not built")

from conformance.differential import PAGES, THREADS, Line, Program, as_script, difference, run
from conformance.kernel import KernelBackend
from conformance.model import ModelBackend

EXAMPLES = 60
"""Programs in an ordinary run; `make soak` goes on for its minutes."""

pages = st.integers(0, PAGES - 1)
threads = st.integers(0, THREADS - 1)
values = st.integers(1, 255)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """(first page, number of pages), inside the area."""
    first = draw(pages)
    return first, draw(st.integers(1, PAGES - first))


def _ranged(name: str, *rest: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.tuples(ranges(), *rest).map(lambda drawn: (name, *drawn[0], *drawn[1:]))


STEPS = st.one_of(
    st.tuples(st.just("load"), threads, pages),
    st.tuples(st.just("store"), threads, pages, values),
    st.tuples(st.just("store"), threads, pages, values),
    _ranged("copy", values, st.sampled_from((0, 0, 1, 2))),
    _ranged("zeropage", st.sampled_from((0, 1))),
    _ranged("continue", st.sampled_from((0, 0, 1, 2))),
    _ranged("poison"),
    st.tuples(st.just("move"), pages, pages, st.sampled_from((0, 1, 2))),
    _ranged("writeprotect", st.sampled_from((0, 1, 1, 2, 3))),
    _ranged("wake"),
    _ranged("register", st.integers(1, 7)),
    _ranged("unregister"),
    _ranged("dontneed"),
    _ranged("remove"),
    _ranged("protect", st.sampled_from((1, 3, 3))),
)

PROGRAMS = st.builds(
    Program,
    st.sampled_from(("anon", "shmem", "shmem-private")),
    st.integers(1, 7),
    st.sampled_from((0, 0x2000, 0x8000)),
    st.lists(STEPS, min_size=1, max_size=12),
)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Callable[[], KernelBackend]]:
    """Makes backends of the running kernel."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to build the touching process with: apt install gcc")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "puppet"
        source = Path(__file__).parent / "puppet.c"
        subprocess.run(["cc", "-O2", "-pthread", "-o", binary, source], check=True)
        yield lambda: KernelBackend(binary, Path(folder), lambda pages: None)


def version() -> str:
    """The profile of the model for the running kernel."""
    return ".".join(os.uname().release.split(".")[:2])


def compare(program: Program, kernel: Callable[[], KernelBackend]) -> None:
    """Fails with the first difference and a script."""
    model = list(run(ModelBackend(version()), program))
    backend = kernel()
    try:
        real: list[Line] = list(run(backend, program, model))
    finally:
        backend.close()
    found = difference(model, real)
    assert found is None, f"{found}\n\n{as_script(program)}"


def test_a_model_that_is_wrong_is_told_by_the_first_step_and_a_script(
    kernel: Callable[[], KernelBackend],
) -> None:
    program = Program("anon", 2, 0, [("load", 0, 1), ("store", 0, 1, 9), ("wake", 0, 4)])
    wrong = list(run(ModelBackend(version(), {"wp_vma_only"}), program))
    backend = kernel()
    try:
        real = list(run(backend, program, wrong))
    finally:
        backend.close()
    told = difference(wrong, real)
    assert told is not None
    assert told.startswith("after step 2, ('store', 0, 1, 9)")
    shown: list[Line] = []
    exec(as_script(program), {"print": shown.append})
    assert difference(shown, real) is None


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(program=PROGRAMS)
def test_the_model_and_the_kernel_agree(program: Program, kernel: Callable[[], KernelBackend]) -> None:
    compare(program, kernel)


@pytest.mark.soak
def test_they_go_on_agreeing(kernel: Callable[[], KernelBackend]) -> None:
    end = time.monotonic() + 60 * float(os.environ.get("USERFAULT_SOAK_MINUTES", "1"))

    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(program=PROGRAMS)
    def more(program: Program) -> None:
        compare(program, kernel)

    while time.monotonic() < end:
        more()
