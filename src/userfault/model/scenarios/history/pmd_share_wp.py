"""A shared page table protects a stranger (mended by c1991e0705d1, "forbid huge pmd sharing").

Two mappings of the same hugetlb file that both cover an aligned GiB may share one page table. Protection is a
bit in that table. A process that registered its mapping for write-protection, and protected a page, so
protected it in the other process too, which never asked for it and has nobody to lift it: its writer faults
for ever. Since the fix a mapping with write-protection has a table of its own.
"""

from __future__ import annotations

from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import (
    GIB,
    HUGE_A,
    HUGE_B,
    HUGE_PAGE,
    HUGE_PLACES,
    WP,
    hugetlb_file,
    map_gib,
)
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "pmd_share_wp"


def scenario(defective: bool) -> Scenario:
    """app protects a page of A; a stranger maps the same file at B and writes that page."""

    def build() -> World:
        kernel, memfd, app = hugetlb_file([DEFECT] if defective else [])
        map_gib(app, memfd, HUGE_A)
        stranger = kernel.process("stranger")
        theirs = app.run(app.calls.send_descriptor(memfd, stranger))
        map_gib(stranger, theirs, HUGE_B)

        def protector(t: SystemCalls) -> Op[None]:
            fd = yield from t.userfaultfd()
            yield from t.register(fd, HUGE_A, GIB, WP)
            yield from t.load(HUGE_A)
            yield from t.writeprotect(fd, HUGE_A, HUGE_PAGE, 1)

        def writer(t: SystemCalls) -> Op[None]:
            yield from t.store(HUGE_B, b"x")

        app.spawn("protector", protector)
        stranger.spawn("writer", writer)
        return World(kernel, places=HUGE_PLACES)

    about = "a process protects its own mapping of a file that a stranger writes through another one"
    return Scenario(DEFECT, about, build, (nobody_dies, nobody_hangs))
