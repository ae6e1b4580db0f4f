"""The figures as JSON lines, and a page with tables and pictures made of them.

performance.jsonl, in docs/reference or where USERFAULT_BENCH_REPORT says, holds every sample with the command
that took it and the machine it was taken on. The page is made from it alone, without measuring again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path

from benches.compare import Bar, Comparison, Result, Sample, command, ratio, results

ROOT = Path(__file__).parent.parent
REFERENCE = Path(os.environ.get("USERFAULT_BENCH_REPORT", ROOT / "docs" / "reference"))
LINES = REFERENCE / "performance.jsonl"
PAGE = REFERENCE / "performance.md"
PICTURES = REFERENCE / "performance"

COLOURS = {"floor": "#8a8f98", "rival": "#c98b3d", "subject": "#2f7d6b"}


def machine() -> dict[str, str]:
    """What is needed to judge a figure, and nothing that names a person or a place."""
    model = next(
        (
            line.split(": ")[1]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    return {
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {model}",
        "memory": f"{int(total.split()[1]) / (1 << 20):.0f} GiB",
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that is measured, with a + if anything but the documentation differs from it.

    The lines and the page are documentation: a run that has written them is still a run of its commit.
    """

    def ask(*question: str) -> str:
        done = subprocess.run(("git", *question), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    at = ask("rev-parse", "--short", "HEAD")
    differs = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    return f"{at}{'+' if differs else ''}" if at else "unknown"


class Lines:
    """The JSON lines: what was measured before stays, what is measured now replaces its own comparison."""

    def __init__(self, path: Path = LINES) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.records = [json.loads(line) for line in text.splitlines()]

    def begin(self, comparison: Comparison) -> None:
        """Forget the former samples of a comparison."""
        self.records = [record for record in self.records if record["comparison"] != comparison.name]

    def add(self, comparison: Comparison, contestant: str, number: int, sample: Sample) -> None:
        """Keep one sample, with all that is needed to take it again."""
        chosen = next(each for each in comparison.contestants if each.name == contestant)
        record = {
            "comparison": comparison.name,
            "contestant": contestant,
            "role": chosen.role,
            "round": number,
            "unit": comparison.unit,
            "command": "python " + " ".join(command(comparison, chosen)),
            "cgroup": chosen.cgroup,
            "huge_pages": chosen.huge_pages,
            "commit": commit(),
            **machine(),
            "sample": {name: round(v, 6) if isinstance(v, float) else v for name, v in sample.items()},
        }
        self.records.append(record)

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def of(self, comparison: Comparison) -> list[tuple[str, int, Sample]]:
        """The samples of a comparison: contestant, round, sample."""
        return [
            (record["contestant"], record["round"], record["sample"])
            for record in self.records
            if record["comparison"] == comparison.name
        ]


def write_page(comparisons: tuple[Comparison, ...], lines: Lines) -> None:
    """Make the page and its pictures from the lines."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES.glob("*.svg"):
        picture.unlink()
    parts = [HEAD]
    measured = {(r["kernel"], r["cpu"], r["memory"], r["python"], r["commit"]) for r in lines.records}
    for kernel, cpu, memory, python, at in sorted(measured):
        parts.append(f"- Linux {kernel}, {cpu}, {memory}, Python {python}; commit `{at}`\n")
    parts.append("\n## Bars\n\n" + _bars(comparisons, lines))
    missing = [f"`{comparison.name}`" for comparison in comparisons if not lines.of(comparison)]
    if missing:
        parts.append(f"\nNot run: {', '.join(missing)}.\n")
    for comparison in comparisons:
        samples = lines.of(comparison)
        if samples:
            parts.append(_section(comparison, list(results(comparison, samples))))
    PAGE.write_text("".join(parts))


HEAD = """\
# Performance

Made by `make bench` from {download}`performance.jsonl`, which holds every sample and its command. A figure
is the median of its samples; a ratio is the median of the ratios within each round, for the contestants take
turns. Floors are what the kernel itself costs, in C. Nothing here is a timed test.

A bar is what the work is held to; a goal is what it is going for. A figure that is missing says why.

"""


def _bars(comparisons: tuple[Comparison, ...], lines: Lines) -> str:
    rows = ["| measurement | ratio | wanted | measured | |\n|---|---|---|---|---|\n"]
    for comparison in comparisons:
        if not lines.of(comparison):
            continue
        found = {result.contestant.name: result for result in results(comparison, lines.of(comparison))}
        for bar in comparison.bars:
            sign = "at most" if comparison.better == "less" else "at least"
            got, verdict = judge(comparison, bar, found)
            rows.append(
                f"| [{comparison.title}](#{comparison.name}) | {bar} "
                f"| {bar.kind}: {sign} {bar.limit:g}{'' if bar.against else ' ' + comparison.unit} "
                f"| {got} | {verdict} |\n"
            )
    return "".join(rows)


def judge(comparison: Comparison, bar: Bar, found: dict[str, Result]) -> tuple[str, str]:
    """The ratio (or the figure itself) as text, and "held", "missed" or why there is none."""
    below = _below(comparison, found[bar.subject], found[bar.against]) if bar.against else 0.0
    # Beyond the bar that says nothing: the rival may have ended a second later.
    if 0 < below <= bar.limit:
        return f"below {_number(below)}", "held"
    for name in filter(None, (bar.subject, bar.against)):
        if not found[name].values:
            return "", f"not measured: {name}: {found[name].unavailable}"
    subject = found[bar.subject]
    got = ratio(subject, found[bar.against]) if bar.against else subject.median
    held = got <= bar.limit if comparison.better == "less" else got >= bar.limit
    return _number(got), "held" if held else "**missed**"


def _below(comparison: Comparison, subject: Result, against: Result) -> float:
    """What a ratio is below if the rival was stopped before it was done; 0 if that says nothing."""
    if comparison.better != "less" or comparison.unit != "s" or not subject.values or against.values:
        return 0.0
    return subject.median / against.stopped_after if against.stopped_after else 0.0


def _section(comparison: Comparison, found: list[Result]) -> str:
    there = [result for result in found if result.values]
    # Alone among themselves subjects are different things, not contestants.
    rivals = any(result.contestant.role != "subject" for result in found)
    reference = there[0] if there and rivals else None
    lines = [f"\n({comparison.name})=\n## {comparison.title}\n\n{comparison.text}\n"]
    lines.append(f"{comparison.better.capitalize()} is better. `make bench ARGS={comparison.name}`\n\n")
    if there:
        (PICTURES / f"{comparison.name}.svg").write_text(_picture(comparison, there))
        lines.append(f"![{comparison.title}](performance/{comparison.name}.svg)\n\n")
    against = [f"to {reference.contestant.name}"] if reference else []
    head = [comparison.unit, "least to most", *against, *(COLUMNS[fact][0] for fact in comparison.columns)]
    lines.append(f"| | {' | '.join(head)} |\n{'|---' * (len(head) + 1)}|\n")
    for result in found:
        name = f"{result.contestant.name} ({result.contestant.role})" if rivals else result.contestant.name
        if not result.values:
            missing = f"not measured: {result.unavailable}"
            lines.append(f"| {name} | | {missing} {'| ' * (len(head) - 2)}|\n")
            continue
        low, high = min(result.values.values()), max(result.values.values())
        cells = [
            _number(result.median),
            f"{_number(low)} to {_number(high)}",
            *([_number(ratio(result, reference))] if reference else []),
            *(COLUMNS[fact][1](result.facts.get(fact, 0)) for fact in comparison.columns),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(lines)


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "cpu_s": ("CPU s", lambda value: f"{value:.2f}"),
    "disk_read": ("read MB", lambda value: f"{value / 1e6:.0f}"),
    "disk_written": ("written MB", lambda value: f"{value / 1e6:.0f}"),
    "page_tables": ("page tables MB", lambda value: f"{value / 1e6:.1f}"),
    "agree": ("rows that agree", lambda value: f"{value:.0f}"),
    "disagree": ("disagree", lambda value: f"{value:.0f}"),
    "unsupported": ("unsupported", lambda value: f"{value:.0f}"),
    "states": ("states", lambda value: f"{value:.0f}"),
    "steps": ("steps between them", lambda value: f"{value:.0f}"),
    "longest": ("steps of the trace", lambda value: f"{value:.0f}"),
}
"""Facts, what their column is called and how they are written."""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _picture(comparison: Comparison, there: list[Result]) -> str:
    """Horizontal bars, each with a whisker from its least to its most."""
    left, width, row = 210, 380, 26
    most = max(max(result.values.values()) for result in there)
    height = row * len(there) + 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(comparison.title)}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for i, result in enumerate(there):
        y = 8 + i * row
        long = width * result.median / most
        low, high = (width * f(result.values.values()) / most for f in (min, max))
        name, text = escape(result.contestant.name), y + 14
        colour, end = COLOURS[result.contestant.role], left + max(long, high) + 6
        out.append(
            f'<text x="{left - 8}" y="{text}" text-anchor="end" fill="#222">{name}</text>'
            f'<rect x="{left}" y="{y}" width="{long:.1f}" height="18" fill="{colour}"/>'
            f'<path d="M{left + low:.1f} {y + 9}H{left + high:.1f}" stroke="#222" stroke-width="1.5"/>'
            f'<text x="{end:.1f}" y="{text}" fill="#222">{_number(result.median)}</text>'
        )
    arrow = "less is better" if comparison.better == "less" else "more is better"
    out.append(f'<text x="{left}" y="{height - 8}" fill="#666">{comparison.unit}, {arrow}</text></svg>')
    return "\n".join(out) + "\n"
