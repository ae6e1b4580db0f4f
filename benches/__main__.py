"""`python -m benches [NAME ...]`: take the measurements whose names begin so, or all, and write the page."""

from __future__ import annotations

import argparse
import signal
import sys

from benches import compare, files, report
from benches.measurements import COMPARISONS


def main() -> None:
    names = "\n".join(f"  {comparison.name:32} {comparison.title}" for comparison in COMPARISONS)
    parser = argparse.ArgumentParser(
        prog="python -m benches",
        description="Measure userfault beside floors and rivals, and write docs/reference/performance.md.",
        epilog=f"measurements:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="beginnings of names; none means all")
    parser.add_argument(
        "--rounds", type=int, default=0, help="turns that each contestant takes; 0: as written"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, make the page from the lines")
    parser.add_argument("--keep-files", action="store_true", help="leave the large files for the next run")
    options = parser.parse_args()
    chosen = [c for c in COMPARISONS if not options.names or c.name.startswith(tuple(options.names))]
    if not chosen:
        parser.error("no measurement has such a name")

    # A run that is ended puts back what it holds: its child, its files, the machine's huge pages.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    lines = report.Lines()
    try:
        for comparison in [] if options.page else chosen:
            print(f"\n{comparison.name}: {comparison.title}", flush=True)
            lines.begin(comparison)

            def keep(
                contestant: str, number: int, sample: compare.Sample, of: compare.Comparison = comparison
            ) -> None:
                got = (
                    f"{float(sample['value']):.4g} {of.unit}"
                    if "value" in sample
                    else f"{sample['unavailable']}"
                )
                print(f"  round {number + 1}  {contestant:28} {got}", flush=True)
                lines.add(of, contestant, number, sample)

            compare.run(comparison, keep, options.rounds)
            lines.save()
            found = {
                result.contestant.name: result for result in compare.results(comparison, lines.of(comparison))
            }
            for bar in comparison.bars:
                got, verdict = report.judge(comparison, bar, found)
                print(f"  {bar.kind} {bar.limit:g}: {bar} = {got} {verdict}")
    finally:
        if not options.keep_files:
            files.remove_kept()
        report.write_page(COMPARISONS, lines)
    print(f"\n{report.PAGE}")


if __name__ == "__main__":
    main()
