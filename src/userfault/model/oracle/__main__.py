"""The command line of the oracle."""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import sys
import time
from collections.abc import Iterator
from typing import Any

from userfault.model.oracle.replay import disagreements


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, compressed or not."""
    opened = lzma.open(path, "rt") if path.endswith(".xz") else open(path, encoding="utf-8")  # noqa: SIM115
    with opened as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def main(arguments: list[str] | None = None) -> int:
    """Replay a table; the exit status is 0 only if nothing disagrees."""
    parser = argparse.ArgumentParser(prog="python -m userfault.model.oracle", description=__doc__)
    parser.add_argument("table", help="TABLE.jsonl or TABLE.jsonl.xz")
    parser.add_argument("--kernel", default="6.18", help="the profile to compare with (default 6.18)")
    parser.add_argument("--section", action="append", help="only this section; may be given again")
    parser.add_argument("--strict", action="store_true", help="compare excl and every scan too")
    parser.add_argument(
        "--verbose", action="store_true", help="show the fields that differ, and what is unsupported"
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows(options.table):
        section = row["section"]
        if options.section and section not in options.section:
            continue
        found = disagreements(row, options.kernel, strict=options.strict)
        verdict = "unsupported" if found is None else "disagree" if found else "agree"
        counts[section][verdict] += 1
        if options.verbose and verdict != "agree":
            print(f"{verdict} {row['id']}")
            for difference in found or ():
                print(f"    {difference}")
    total: collections.Counter[str] = collections.Counter()
    print(f"{'section':18} {'agree':>7} {'disagree':>9} {'unsupported':>12}")
    for section, counted in sorted(counts.items()):
        total.update(counted)
        print(f"{section:18} {counted['agree']:7} {counted['disagree']:9} {counted['unsupported']:12}")
    print(f"{'all':18} {total['agree']:7} {total['disagree']:9} {total['unsupported']:12}")
    print(f"{sum(total.values())} rows in {time.perf_counter() - started:.1f} s")
    return 1 if total["disagree"] else 0


if __name__ == "__main__":
    sys.exit(main())
