"""Runs one of the machines: ``drive.py NAME EXAMPLES STEPS [SECONDS]``.

Without seconds the examples are always the same ones. With seconds, examples of ever new seeds are run until
the time is over, and each seed is printed before it is used.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

import userfault
from machines.file_machine import FileMachine
from machines.threads_machine import ThreadsMachine
from userfault.testing.stateful import RegionStateMachine


def machine(name: str) -> type[RuleBasedStateMachine]:
    """The machine that a name such as "file-4KiB" or "threads-inline-2MiB" stands for."""
    kind, *words, pages = name.split("-")
    base: Any = {"store": RegionStateMachine, "file": FileMachine, "threads": ThreadsMachine}[kind]
    way = {"fault": "inline"} if "inline" in words else {}
    if pages == "4KiB":
        return type("Machine", (base,), way)
    huge = {**way, "pages": "2MiB", "blocks": (2 << 20, 4 << 20), "largest": (11 << 20) - 1000}
    return type("Machine", (base,), huge)


def main(name: str, examples: str, steps: str, seconds: str = "0") -> None:
    common: dict[str, Any] = {
        "max_examples": int(examples),
        "stateful_step_count": int(steps),
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
    }
    end = time.monotonic() + float(seconds)
    if float(seconds) == 0:
        run_state_machine_as_test(machine(name), settings=settings(derandomize=True, **common))
    while time.monotonic() < end:
        number = random.SystemRandom().randrange(1 << 32)
        print("seed", number, flush=True)
        run_state_machine_as_test(seed(number)(machine(name)), settings=settings(print_blob=True, **common))
    print(userfault.stats())


if __name__ == "__main__":
    main(*sys.argv[1:])
