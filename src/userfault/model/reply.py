"""What an ioctl of userfaultfd answers, to the last field."""

from __future__ import annotations

from typing import NamedTuple

from userfault.abi import Outcome
from userfault.model.context import Context
from userfault.model.errnos import EINVAL
from userfault.model.layout import PAGE, TASK_SIZE


class Reply(NamedTuple):
    """errno: 0 for success. out: what the kernel stored in the result field; None: it did not touch it."""

    errno: int
    out: int | None = None

    def outcome(self, length: int) -> Outcome:
        """The same as the interface's type: never negative, and the length where there is no result field."""
        if self.out is None:
            return Outcome(0 if self.errno else length, self.errno)
        return Outcome(max(self.out, 0), self.errno)


def range_is_valid(start: int, length: int) -> bool:
    """validate_range: whole pages inside the address space."""
    return (
        start % PAGE == 0
        and length % PAGE == 0
        and length > 0
        and start < TASK_SIZE
        and length <= TASK_SIZE - start
    )


def unaligned_range_is_valid(start: int, length: int) -> bool:
    """validate_unaligned_range, for COPY's source."""
    return start < TASK_SIZE and 0 < length <= TASK_SIZE - start


def refused_before_handshake(ctx: Context) -> Reply | None:
    """userfaultfd_ioctl: nothing but UFFDIO_API works before UFFDIO_API [A4]."""
    return None if ctx.initialized else Reply(EINVAL)
