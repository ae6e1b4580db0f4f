"""UFFDIO_WAKE: let the waiters of a range fault again, resolved or not.

It validates the range and nothing else: holes, foreign and unregistered memory, parts of huge pages are all
right; only this context's own waiters are woken [K1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.context import Context
from userfault.model.errnos import EFAULT, EINVAL
from userfault.model.reply import Reply, range_is_valid, refused_before_handshake
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.thread import Thread


def wake(thread: Thread, ctx: Context, start: int | None, length: int) -> Op[Reply]:
    """UFFDIO_WAKE (userfaultfd_wake). `start` None: the argument cannot be read."""
    refused = refused_before_handshake(ctx)
    if refused:
        return refused
    if start is None:
        return Reply(EFAULT)
    if not range_is_valid(start, length):
        return Reply(EINVAL)
    yield f"WAKE: {start:#x} to {start + length:#x}"
    ctx.wake(start, length)
    return Reply(0)
