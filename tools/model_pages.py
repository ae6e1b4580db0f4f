"""Writes the pages of the documentation that the executable model knows: `python tools/model_pages.py`.

    docs/explanation/how-userfaultfd-behaves.md   tables of what happens when
    docs/explanation/defects.md and defects/*     the kernel's history, each defect with its trace and chart
    docs/explanation/exploring.md                 what was explored, up to which bound

A test compares the files with what the model says now, so they cannot fall behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from inspect import getdoc
from pathlib import Path

from userfault.model import Exploration, explore
from userfault.model.defects import DEFECTS
from userfault.model.scenarios import engine, handlers, history
from userfault.model.tables import MODES, STATES, Row, possible, what_happens

DOCS = Path(__file__).parent.parent / "docs"
BEHAVES = "explanation/how-userfaultfd-behaves.md"
EXPLORING = "explanation/exploring.md"

GENERATED = "<!-- Written by tools/model_pages.py from the model. Change the model, not this page. -->"

KINDS = {
    "anon": "Private anonymous memory",
    "shmem_shared": "Shared memory (memfd, tmpfs, shared anonymous)",
    "shmem_private": "A private mapping of shared memory",
    "hugetlb_shared": "Shared hugetlb",
    "hugetlb_private": "Private hugetlb",
}
STATES_IN_WORDS = {
    "none": "nothing mapped, nothing cached",
    "present": "mapped, private or written",
    "zeropage": "the zero page",
    "present_pagecache": "mapped from the page cache",
    "cache_only": "cached, not mapped",
    "wp_present": "mapped, protected",
    "wp_zeropage": "the zero page, protected",
    "wp_present_pagecache": "mapped from the page cache, protected",
    "wp_marker_none": "write-protect marker, nothing cached",
    "wp_marker_cache": "write-protect marker, cached",
    "poison_marker": "poisoned",
    "swapped": "in swap",
    "wp_swapped": "in swap, protected",
}
WP_UNPOPULATED = 0x2000

INTRODUCTION = f"""# How userfaultfd really behaves

{GENERATED}

Every cell of these tables is an experiment on the executable model (`src/userfault/model/`): a fresh
machine, one page brought into a state, one access or one operation. The model in turn is held to thousands
of the same experiments on real kernels. This is Linux 6.18 with the feature WP_UNPOPULATED; `userfault
model table` prints any other case, and `--kernel` any other version.

A touch asks the handler if, in this order,

1. the page is not poisoned (else SIGBUS, and nobody is asked);
2. nothing is mapped: *minor* if the page is cached and the range is registered MINOR, else *missing* if it is
   not cached and the range is registered MISSING; otherwise the kernel fills the page itself;
3. it is a write, the range is registered WP, and the page is protected: *WP*.

A page in swap counts as mapped in private memory. In shared memory it counts as cached. A write-protect
marker is an empty entry that remembers its protection: the page that comes there is protected, unless a
plain COPY or CONTINUE brings it.

M, W and I stand for MISSING, WP and MINOR. *no*: nobody is asked.
"""

OPERATIONS = (
    "COPY",
    "COPY, protected",
    "ZEROPAGE",
    "CONTINUE",
    "POISON",
    "WRITEPROTECT, protect",
    "WRITEPROTECT, unprotect",
)


def pages() -> Iterator[tuple[str, str]]:
    """(path below docs, text) of every page."""
    yield BEHAVES, behaves()
    yield "explanation/defects.md", defects()
    for name in history.NAMES:
        page, chart = defect(name)
        yield f"explanation/defects/{name}.md", page
        yield f"explanation/defects/{name}.svg", chart
    yield EXPLORING, exploring()


# What happens when.


def behaves() -> str:
    """The page of tables."""
    parts = [INTRODUCTION]
    for kind, title in KINDS.items():
        parts += [f"## {title}\n", "What a touch asks for (read / write):\n", _touches(kind), ""]
        everything = "missing+wp" if kind == "anon" else "missing+wp+minor"
        parts += [
            f"What an operation answers, and the page afterwards (registered {_letters(everything)}):\n",
            _operations(kind, everything),
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def _letters(mode: str) -> str:
    return "+".join({"missing": "M", "wp": "W", "minor": "I"}[word] for word in mode.split("+"))


def _modes(kind: str) -> list[str]:
    return [mode for mode in MODES if not (kind == "anon" and "minor" in mode)]


def _states(kind: str, modes: Iterable[str]) -> list[str]:
    return [state for state in STATES if any(possible(kind, mode, state) for mode in modes)]


def _rows(kind: str, mode: str, state: str) -> dict[str, Row]:
    rows = what_happens(kind, mode, state, features=WP_UNPOPULATED)
    return {row.what: row for row in rows}


def _touches(kind: str) -> str:
    modes = _modes(kind)
    lines = ["| page | " + " | ".join(map(_letters, modes)) + " |", "|---" * (len(modes) + 1) + "|"]
    for state in _states(kind, modes):
        cells = []
        for mode in modes:
            if possible(kind, mode, state):
                rows = _rows(kind, mode, state)
                cells.append(f"{_asks(rows['a read'])} / {_asks(rows['a write'])}")
            else:
                cells.append("")
        lines.append(f"| {STATES_IN_WORDS[state]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _asks(row: Row) -> str:
    if row.answer != "ok":
        return row.answer
    names = {"write-protect": "WP", "-": "no"}
    words = [word.split(",")[0] for word in row.asks.split(", then ")]
    return ", then ".join(names.get(word, word) for word in words)


def _operations(kind: str, mode: str) -> str:
    lines = ["| page | " + " | ".join(OPERATIONS) + " |", "|---" * (len(OPERATIONS) + 1) + "|"]
    for state in _states(kind, [mode]):
        rows = _rows(kind, mode, state)
        cells = []
        for what in OPERATIONS:
            row = rows[what]
            cells.append(row.page if row.answer == "ok" else row.answer)
        lines.append(f"| {STATES_IN_WORDS[state]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The kernel's history.


def _story(text: str) -> tuple[str, str]:
    title, _, rest = text.partition("\n")
    return title.rstrip("."), rest.strip()


def defects() -> str:
    """The list of defects."""
    lines = [
        "# Defects of the kernel's history",
        "",
        GENERATED,
        "",
        "Each of these can be switched on in the executable model, as in",
        "`Kernel(defects={'minor_leak'})`. With the defect on, the explorer finds a schedule of threads that",
        "breaks an invariant. With it off it has looked at every schedule, and there is none. Some were in",
        "released kernels, some were caught in review, some are gaps that a later feature closed.",
        "",
        "| switch | what goes wrong, and what mended it |",
        "|---|---|",
        *(f"| [{name}](defects/{name}.md) | {DEFECTS[name]} |" for name in history.NAMES),
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(f"defects/{name}" for name in history.NAMES),
        "```",
        "",
    ]
    return "\n".join(lines)


def defect(name: str) -> tuple[str, str]:
    """A defect's page, and its chart."""
    title, story = _story(getdoc(history.story(name)) or "")
    on, off = explore(history.scenario(name, True)), explore(history.scenario(name, False))
    assert on.found is not None
    assert off.exhausted
    page = [
        f"# {title}",
        "",
        GENERATED,
        "",
        story,
        "",
        "## The shortest schedule that shows it",
        "",
        f"The situation: {history.scenario(name, True).about}.",
        "",
        "```text",
        str(on.found),
        "```",
        "",
        f"![The same as a sequence chart]({name}.svg)",
        "",
        f"    userfault model explore history/{name}",
        "",
        "## Without the defect",
        "",
        f"Every interleaving was looked at: {bound(off)}. None breaks an invariant.",
        "",
        f"    userfault model explore history/{name} --mended",
        "",
    ]
    return "\n".join(page), on.found.to_svg()


def bound(result: Exploration) -> str:
    """How much was exhausted, in words."""
    return f"{result.states} states, {_many(result.schedules)} of at most {result.longest} steps"


def _many(schedules: int | None) -> str:
    if schedules is None:
        return "schedules without number (a handler may retry for as long as it is made to)"
    if schedules == 1:
        return "one schedule"
    return f"{schedules:,} schedules" if schedules < 10**6 else f"{schedules:.1e} schedules"


# What was explored.


EXPLORED = f"""# What was explored, and up to which bound

{GENERATED}

The explorer runs every interleaving of a scenario's threads on the executable model. A thread's step is as
fine as the kernel's known races need: taking a lock, looking at mmap_changing, filling one page, waking,
posting an event, queueing a fault, looking at the page table again, going to sleep.

**Each state once.** Two interleavings that lead to the same state have the same future, so a state that was
met before is not looked at again. States are compared by a fingerprint of everything: page tables, page
cache, queues, locks, the scenario's own data, and for every thread the place and the variables of its
suspended functions. The table shows what that pays: schedules grow exponentially with the length of an
execution, states do not. Partial-order reduction would leave out orders of independent steps; but here
nearly every step takes a lock or looks at a table that another thread's next step may change, and what is
independent would have to be worked out from the model's plain Python data. With the states of these
scenarios in the thousands, it was not needed.

**Shortest first.** States are visited in the order of their distance from the beginning, so the first
violation has the fewest steps. A state from which no end can be reached any more is reported as well:
somebody runs in circles.

**Beyond the bound** there are random walks and PCT (`--strategy pct:1000:3`); what they find is shortened
before it is shown. They prove nothing.

An exhausted scenario is a proof about the model and this scenario: these threads, these pages, this many
steps. It is no proof about more threads, more blocks or the Rust code.
"""


def exploring() -> str:
    """The page of figures."""
    parts = [EXPLORED, "## Handlers\n", "| mistake | broken by | the mended handler |", "|---|---|---|"]
    for name in handlers.NAMES:
        title, _ = _story(getdoc(handlers.story(name)) or "")
        wrong = explore(handlers.scenario(name, False)).found
        assert wrong is not None
        mended = explore(handlers.scenario(name, True))
        parts.append(
            f"| `{name}`: {title} | {wrong.invariant}, in {len(wrong.schedule)} steps | {bound(mended)} |"
        )
    parts += ["", "## The engine's protocol\n"]
    parts += ["With the right rules:\n", "| situation | what happens | exhausted |", "|---|---|---|"]
    for name in engine.SITUATIONS:
        scenario = engine.scenario(name)
        exhausted = EVERYTHING if name == "everything" else bound(explore(scenario))
        parts.append(f"| `{name}` | {scenario.about} | {exhausted} |")
    parts += ["", "With one rule wrong (the tags are those of [hazards](hazards.md)):\n"]
    parts += ["| tag | the wrong rule | found in | broken | steps |", "|---|---|---|---|---|"]
    for name, rule in engine.RULES.items():
        found = explore(engine.scenario(rule.situation, (name,))).found
        assert found is not None
        parts.append(
            f"| {rule.tag} | `{name}`: {rule.wrong} | `{rule.situation}` | {found.invariant} | "
            f"{len(found.schedule)} |"
        )
    return "\n".join(parts) + "\n"


EVERYTHING = "18437 states, 7.3e+12 schedules of at most 52 steps"
"""The largest situation takes half a minute to exhaust, so `make soak` compares this."""


def main() -> None:
    """Write every page."""
    for name, text in pages():
        path = DOCS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
