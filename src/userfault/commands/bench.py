"""``userfault bench``: which block size suits this machine and this folder, beside numpy.memmap."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from userfault.tour.stop import Plan, Truth

BLOCKS = (4 << 10, 64 << 10, 2 << 20)
"""Block sizes that are tried, in bytes."""

STEPS = {"sum": "sum", "walk": "2,000 random reads", "sort": "sort, flush"}
"""The steps of each way, and what the table calls them."""

Row = dict[str, float | str]
"""One way and what it took: "way", seconds by step, or "reason" for a way that did not come to its end."""


def bench(
    folder: Annotated[Path, typer.Argument(help="Where the file is made; it is removed again.")] = Path("."),
    size: Annotated[str, typer.Option("--size", help="Of the file.")] = "512MiB",
    limit: Annotated[str, typer.Option("--limit", help="Memory that each way may use.")] = "128MiB",
    block: Annotated[
        list[str] | None, typer.Option("--block", help="A block size to try; may be given several times.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="An SVG file for the curves, by block size.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Sum, visit at random and sort a file of FOLDER that is larger than the memory, by block size.

    Each way begins with a cold file, and has a control group of the limit where the machine gives one;
    numpy.memmap is measured only then. Every result is checked. What else runs meanwhile changes the figures.

    The exit status is 1 if a result was wrong or a way did not come to its end, 2 if it could not begin
    (raises Exit).
    """
    from userfault.commands import curves
    from userfault.opening import checked_block
    from userfault.sizes import parse_size
    from userfault.tour.stop import Plan, Truth, limited

    path = folder / f"userfault-bench-{os.getpid()}"
    try:
        blocks = sorted({checked_block(size) for size in block}) if block else BLOCKS
        plan = Plan(path, parse_size(size, "--size"), parse_size(limit, "--limit"), own=True)
        free = shutil.disk_usage(folder).free
        if picture is not None:
            picture.touch()
        path.touch(exist_ok=False)
    except (OSError, ValueError) as error:
        typer.echo(f"userfault bench: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        if free < 2 * plan.size:
            typer.echo(f"userfault bench: {folder} has less than {2 * plan.size} bytes free", err=True)
            raise typer.Exit(2)
        plan.write()
        truth = Truth.of(path)
        ways = [("userfault", size) for size in blocks]
        with limited(plan.limit) as (group, reason):
            ways += [("memmap", 0)] if group else []
        rows: list[Row] = []
        for way, size_of_block in ways:
            rows.append(measure(way, size_of_block, plan, truth))
            if not as_json:
                typer.echo(_line(rows[-1]) if len(rows) > 1 else f"{_head(plan)}\n{_line(rows[-1])}")
    finally:
        plan.remove()
    if not group:
        rows.append({"way": "numpy.memmap", "reason": f"not measured, it would have all memory: {reason}"})
        if not as_json:
            typer.echo(_line(rows[-1]))
    if picture is not None:
        figures: list[dict[str, float]] = [
            {step: float(row[step]) for step in STEPS if step in row} for row in rows
        ]
        measured = list(zip(blocks, figures, strict=False))
        try:
            picture.write_text(curves.picture(STEPS, measured, figures[len(blocks)]))
        except (OSError, ValueError) as error:
            typer.echo(f"userfault bench: {picture}: {error}", err=True)
            raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"size": plan.size, "limit": plan.limit, "seconds": rows}))
    if any("reason" in row for row in rows if row["way"] != "numpy.memmap"):
        raise typer.Exit(1)


def measure(way: str, block: int, plan: Plan, truth: Truth) -> Row:
    """One way through all steps: seconds by step, or the reason why there is none. `block` in bytes."""
    from userfault.sizes import in_words
    from userfault.tour.stop import Stuck, Truth, cool, limited, run

    row: Row = {"way": f"userfault, {in_words(block)}" if way == "userfault" else "numpy.memmap"}
    plan.write()
    cool(plan.path)
    try:
        with limited(plan.limit) as (group, _):
            for message in run(way, plan, group, tuple(STEPS), block):
                if "step" not in message:
                    continue
                step = str(message["step"])
                row[step] = float(message["seconds"])
                if step != "sort" and message["result"] != truth.results[step]:
                    row["reason"] = f"wrong result of {step}"
    except Stuck as error:
        row["reason"] = str(error)
        return row
    after = Truth.of(plan.path)
    if not after.sorted or after.results["sum"] != truth.results["sum"]:
        row["reason"] = "the file was not sorted right"
    return row


def _head(plan: Plan) -> str:
    from userfault.sizes import in_words

    what = f"{in_words(plan.size)} in {in_words(plan.limit)} of memory, seconds:"
    return f"{what}\n{'':20}" + "".join(f"{title:>20}" for title in STEPS.values())


def _line(row: Row) -> str:
    figures = "".join(f"{float(row[step]):20.2f}" if step in row else f"{'-':>20}" for step in STEPS)
    return f"{row['way']:20}" + figures + (f"   {row['reason']}" if "reason" in row else "")
