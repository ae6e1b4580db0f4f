"""What is done to the executable model: replaying tables of measured cases, exploring scenarios.

No memory is measured here and no kernel is asked. A sample is one replay or one exploration, in a process of
its own, and its value is seconds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from benches.memory import Unavailable

ROOT = Path(__file__).parent.parent

TABLES = {"6.18": "table.jsonl.xz", "6.12": "table-6.12.jsonl.xz", "6.1": "table-6.1.jsonl.xz"}
"""The measured cases of each kernel."""


def replay(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to replay the table of the kernel `memory` names, and compare every row."""
    from userfault.model.oracle.__main__ import rows
    from userfault.model.oracle.replay import disagreements

    folder = Path(os.environ.get("USERFAULT_ORACLE", ROOT.parent / "shared" / "oracle"))
    path = folder / TABLES[options.memory]
    if not path.exists():
        raise Unavailable("no table of measured cases; USERFAULT_ORACLE names their folder")
    verdicts = {"agree": 0, "disagree": 0, "unsupported": 0}
    begin = time.perf_counter()
    for row in rows(str(path)):
        found = disagreements(row, options.memory)
        verdicts["unsupported" if found is None else "disagree" if found else "agree"] += 1
    return {"value": time.perf_counter() - begin, **verdicts}


def explore(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to find what is wrong in a scenario, or to look at all there is of its mended twin.

    `memory` is group:name:found or group:name:exhausted.
    """
    from userfault.model import explore as explored
    from userfault.model.scenarios import engine, handlers, history

    group, name, what = options.memory.split(":")
    wrong = what == "found"
    if group == "history":
        scenario = history.scenario(name, wrong)
    elif group == "handlers":
        scenario = handlers.scenario(name, not wrong)
    elif wrong:
        scenario = engine.scenario(engine.RULES[name].situation, (name,))
    else:
        scenario = engine.scenario(name)
    result = explored(scenario)
    if wrong == (result.found is None) or not (wrong or result.exhausted):
        raise Unavailable(f"it was not {what}: {result}".splitlines()[0])
    steps = len(result.found.schedule) if result.found else result.longest
    return {"value": result.seconds, "states": result.states, "steps": result.steps, "longest": steps}


WORKLOADS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "model-replay": replay,
    "model-explore": explore,
}
