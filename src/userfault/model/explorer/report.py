"""What came of an exploration."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.model.explorer.counterexample import Counterexample


@dataclass(frozen=True, slots=True)
class Exploration:
    """found: the counterexample, or None. exhausted: there is none, every interleaving was looked at.

    states      different states met
    steps       steps taken between them
    longest     most steps from the beginning
    schedules   how many interleavings that stands for, if exhausted; None: unknown, or without end
    walks       random walks made (0 when exhaustive)
    seconds     time it took
    """

    strategy: str
    found: Counterexample | None
    exhausted: bool
    states: int
    steps: int
    longest: int
    schedules: int | None
    seconds: float
    walks: int = 0

    @property
    def ok(self) -> bool:
        """No violation was found."""
        return self.found is None

    def __str__(self) -> str:
        took = f"{self.seconds:.2f} s"
        if self.walks:
            looked = f"{self.walks} walks, {self.steps} steps, {took}"
        else:
            looked = f"{self.states} states, {self.steps} steps between them, {took}"
        if self.found is not None:
            return f"violation found ({looked})\n{self.found}"
        if not self.exhausted:
            return f"no violation found, but not every interleaving was looked at ({looked})"
        return f"no violation: every interleaving was looked at ({looked}{self._many()})"

    def _many(self) -> str:
        if self.schedules is None:
            return ""
        count = str(self.schedules) if self.schedules < 10**6 else f"{self.schedules:.1e}"
        return f"; {count} schedules of at most {self.longest} steps"
