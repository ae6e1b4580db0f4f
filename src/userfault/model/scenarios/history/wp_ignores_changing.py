"""Protecting in the middle of a mapping change (a review note inside ffd05793963a).

A thread moves its memory with mremap; the REMAP event says so, but is not read yet. A monitor that protects
the old address now protects whatever happens to be mapped there, while its books describe the layout
before. So WRITEPROTECT is refused with EAGAIN like the fills, until every event has been read.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, always, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import (
    ELSEWHERE,
    PAGE,
    PLACES,
    WP,
    A,
    B,
    contexts,
    messages,
    registered,
)
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "wp_ignores_changing"


@always("memory is protected only when every event has been read")
def no_protection_inside_a_change(world: World) -> str | None:
    """A WRITEPROTECT that succeeds changes the layout that its caller knows."""
    if any(note.startswith("WRITEPROTECT of") and note.endswith("errno 0") for note in world.notes):
        for ctx in contexts(world):
            for event in ctx.events:
                return f"WRITEPROTECT succeeded while {event.message} has not been read"
    return None


def scenario(defective: bool) -> Scenario:
    """T1 moves page A away while the monitor protects A and B."""

    def build() -> World:
        s = registered(WP, features=abi.UFFD_FEATURE_EVENT_REMAP, defects=[DEFECT] if defective else [])
        s.app.run(s.app.calls.store(A, b"a"))
        s.app.run(s.app.calls.store(B, b"b"))

        def t1(t: SystemCalls) -> Op[None]:
            yield from t.mremap(A, PAGE, PAGE, ELSEWHERE)

        def monitor(t: SystemCalls) -> Op[None]:
            yield from t.writeprotect(s.fd, A, 2 * PAGE, abi.UFFDIO_WRITEPROTECT_MODE_WP)
            yield from messages(t, s.fd)

        s.app.spawn("T1", t1)
        s.app.spawn("monitor", monitor)
        return World(s.kernel, places=PLACES)

    about = "a monitor protects memory that a thread is moving away"
    return Scenario(DEFECT, about, build, (no_protection_inside_a_change, nobody_dies, nobody_hangs))
