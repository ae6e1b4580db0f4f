"""A write-protect message without a look at the page's own bit (the helpers of 55adf4de3034).

A page can be read-only for reasons that are none of userfaultfd's business: the zero page after a read, a
page shared after fork. If every write to a read-only page of a range that is registered for
write-protection asked the handler, the handler would lift a protection that is not there, the page would
stay read-only, and the writer would fault again, for ever. So the bit in the page's own entry decides, not
the registration of the VMA.
"""

from __future__ import annotations

from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs, nobody_spins
from userfault.model.scenarios.setting import PAGE, PLACES, WP, A, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "wp_vma_only"


def scenario(defective: bool) -> Scenario:
    """T1 reads page A, which maps the zero page, and then writes it. Nobody ever protected it."""

    def build() -> World:
        s = registered(WP, pages=1, defects=[DEFECT] if defective else [])

        def t1(t: SystemCalls) -> Op[None]:
            yield from t.load(A)
            yield from t.store(A, b"x")

        def handler(t: SystemCalls) -> Op[None]:
            while True:
                yield from messages(t, s.fd)
                yield from t.writeprotect(s.fd, A, PAGE, 0)

        s.app.spawn("T1", t1)
        s.app.spawn("handler", handler)
        return World(s.kernel, daemons=frozenset(("handler",)), places=PLACES)

    about = "a thread writes a page that is read-only, but was never protected"
    return Scenario(DEFECT, about, build, (nobody_dies, nobody_hangs, nobody_spins))
