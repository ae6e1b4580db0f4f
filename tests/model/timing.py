"""How long an exploration takes: of the processor's time, for the machine may be busy with something else."""

from __future__ import annotations

import time

from userfault.model import Exploration, Scenario, explore


def timed(scenario: Scenario) -> tuple[Exploration, float]:
    """What exploring came to, and the seconds of processor time that it took."""
    begin = time.process_time()
    result = explore(scenario)
    return result, time.process_time() - begin
