"""One thing that the doctor found out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["yes", "partly", "no", "unknown", "fact"]
"""Whether the machine has it; "fact" for what is neither good nor bad, such as the kernel's version."""


@dataclass(frozen=True)
class Finding:
    """A feature, privilege or limit of this machine: what it is, why it is so, and what mends it."""

    topic: str
    """The heading it stands under, such as "userfaultfd" or "huge pages"."""
    name: str
    """What was looked at, the same on every machine."""
    state: State
    """Whether the machine has it."""
    value: str = ""
    """What was seen."""
    why: str = ""
    """Why it is missing, and what that means for a program."""
    mend: tuple[str, ...] = ()
    """Commands, best first; the first that works is enough."""

    def as_json(self) -> dict[str, object]:
        """The fields as JSON has them."""
        return {**asdict(self), "mend": list(self.mend)}
