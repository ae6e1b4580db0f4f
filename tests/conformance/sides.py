"""The two sides of the differential test: the running kernel and the model of its version."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from conformance.backend import Unavailable
from conformance.differential import Line, Program, depends_on_order, difference, run
from conformance.kernel import KernelBackend
from conformance.kernel_settings import swap_file
from conformance.model import ModelBackend
from conformance.puppet import build
from userfault.testing.hugetlb_pool import PoolUnavailable, reserved

HUGE_PAGES = 24
"""Of 2 MiB, for four pages of a private mapping, what fork copies of them, and a second mapping."""
ORDERS = 8
"""Orders of the threads that are tried on the model before the kernel runs, where the order matters."""
MORE_ORDERS = 150
"""Orders that are tried afterwards, before a difference is believed."""

Makes = Callable[[], KernelBackend]


def version() -> str:
    """The profile of the model for the running kernel."""
    return ".".join(os.uname().release.split(".")[:2])


@contextlib.contextmanager
def running_kernel(*, huge_pages: bool, swap: bool) -> Iterator[tuple[Makes, list[str]]]:
    """Makes backends of the running kernel, and says what this machine does not allow."""
    lacks: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        puppet = build(folder)
        if huge_pages:
            try:
                stack.enter_context(reserved(HUGE_PAGES))
            except PoolUnavailable as error:
                lacks.append(f"huge pages: {error.strerror}")
        if swap:
            try:
                stack.enter_context(swap_file())
            except Unavailable as error:
                lacks.append(f"swap: {error}")
        yield lambda: KernelBackend(puppet, folder, lambda pages: None), lacks


def on_the_kernel(
    make: Makes, program: Program, expected: Sequence[Sequence[Line]] = (), *, patience: float = 0.3
) -> list[Line]:
    """What the running kernel shows. Unavailable if it has no huge pages left for this one."""
    deadline = time.monotonic() + 10
    while True:
        backend = make()
        try:
            return run(backend, program, expected, patience=patience)
        except OSError as error:
            # The pages of the last program come back a moment after its processes are dead.
            if error.errno != errno.ENOMEM or "hugetlb" not in program.kind:
                raise
            if time.monotonic() > deadline:
                raise Unavailable("others hold the huge pages of this machine") from error
        finally:
            backend.close()
        time.sleep(0.1)


def on_the_model(
    program: Program, *, swap: bool, seed: int | None = None, defects: Sequence[str] = ()
) -> list[Line]:
    """What the model shows, its threads in turn or in the order that `seed` draws."""
    return run(ModelBackend(version(), defects, swap=swap, seed=seed), program)


def compare(make: Makes, program: Program, *, swap: bool) -> str | None:
    """The first difference between the model and the kernel, in words; None: they agree.

    A difference must show three times, the later ones with more patience: what a busy machine did too late is
    none. Where threads run at once, one order of theirs that gives what the kernel showed is agreement.
    """
    orders = iter(range(MORE_ORDERS) if depends_on_order(program) else range(3))
    expected = [on_the_model(program, swap=swap)]
    if depends_on_order(program):
        expected += [on_the_model(program, swap=swap, seed=seed) for seed in itertools.islice(orders, ORDERS)]
    found = None
    for patience in (0.5, 2.0, 2.0):
        real = on_the_kernel(make, program, expected, patience=patience)
        if real in expected:
            return None
        found = difference(max(expected, key=lambda lines: _alike(lines, real)), real)
        for seed in orders:
            other = on_the_model(program, swap=swap, seed=seed)
            if other == real:
                return None
            if other[: len(real)] == real:  # the kernel was not run to the end; now it will be
                expected.append(other)
                break
    return found


def _alike(one: Sequence[Line], other: Sequence[Line]) -> int:
    """How many lines are the same before the first that is not."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def show(program: Program, side: str) -> None:
    """Print what a side shows: "model" or "kernel"."""
    with running_kernel(huge_pages="hugetlb" in program.kind, swap=uses_swap(program)) as (make, lacks):
        for lack in lacks:
            print(f"this machine does not allow {lack}", file=sys.stderr)
        swapping = uses_swap(program) and not any(lack.startswith("swap") for lack in lacks)
        expected = on_the_model(program, swap=swapping)
        for line in expected if side == "model" else on_the_kernel(make, program, [expected]):
            print(line.step, "->", line.answer)
            for name, value in zip(line._fields[2:], line[2:], strict=True):
                if value:
                    print(f"    {name}:", *value, sep="\n        " if name == "pages" else " ")


def uses_swap(program: Program) -> bool:
    """The program pages out."""
    return any("pageout" in repr(step) for step in program.steps)
