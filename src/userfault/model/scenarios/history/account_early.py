"""Charged before it is mapped (the order that 7d64ae3ab648 turned round).

A COPY into shared memory charges the file for a page and then puts the page in place. If somebody else
fills the same page first, putting it in place fails, and the charge must be given back; an error path that
forgets this leaves the file charged for a page that it does not have. Since that commit the page is mapped
first and accounted after, so a failure has nothing to give back.
"""

from __future__ import annotations

from userfault.model.explorer import Scenario, World, at_the_end, nobody_dies, nobody_hangs
from userfault.model.kernel import Kernel
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "account_early"


@at_the_end("a file is charged for the pages that it has")
def accounts_balance(world: World) -> str | None:
    """The charge of every file is the number of its pages."""
    for file in world.kernel.files:
        if file.charged != len(file.pages):
            return f"{file.name} is charged for {file.charged} pages and has {len(file.pages)}"
    return None


def scenario(defective: bool) -> Scenario:
    """Two handler threads fill the same page of a file."""

    def build() -> World:
        kernel = Kernel(defects=[DEFECT] if defective else [])
        app = kernel.process("app")
        calls = app.calls
        memfd = app.run(calls.memfd_create(PAGE))
        app.run(calls.mmap(A, PAGE, shared=True, file=calls.file(memfd)))
        app.run(calls.mmap(SOURCE, PAGE))
        app.run(calls.fill(SOURCE, PAGE, ord("d")))
        fd = app.run(calls.userfaultfd())
        app.run(calls.register(fd, A, PAGE, MISSING)).check()

        def filler(t: SystemCalls) -> Op[None]:
            yield from t.copy(fd, A, SOURCE, PAGE)

        app.spawn("H1", filler)
        app.spawn("H2", filler)
        return World(kernel, places=PLACES)

    about = "two handlers fill the same page of shared memory"
    return Scenario(DEFECT, about, build, (accounts_balance, nobody_dies, nobody_hangs))
