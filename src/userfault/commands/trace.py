"""``userfault trace``: run a program and record the faults of its regions."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated

import typer


def trace(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where the recording goes; it must not exist.")],
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit",
            help="Holds every region to so much, so that more touches are faults and are recorded.",
        ),
    ] = None,
) -> None:
    """Run COMMAND, and record the faults of its regions in FILE: time, thread, region, block and kind.

    Touches of what is in memory are not seen. The recording is for the simulator in sim/, which has a README.

    The exit status is that of the command, or 2 if nothing could be recorded (raises Exit).
    """
    from userfault.sizes import parse_size

    command = list(context.args)
    if not command:
        typer.echo(
            "userfault trace: name the program to run: userfault trace FILE python program.py", err=True
        )
        raise typer.Exit(2)
    if file.exists():
        typer.echo(f"userfault trace: {file} exists; remove it, or name another file", err=True)
        raise typer.Exit(2)
    environment = {**os.environ, "USERFAULT_TRACE": str(file.absolute())}
    environment.pop("USERFAULT_TRACE_LIMIT", None)
    try:
        if memory_limit is not None:
            environment["USERFAULT_TRACE_LIMIT"] = str(parse_size(memory_limit, "--memory-limit"))
        status = subprocess.run(command, env=environment, check=False).returncode
    except (OSError, ValueError) as error:
        typer.echo(f"userfault trace: {error}", err=True)
        raise typer.Exit(2) from None
    if not file.exists():
        typer.echo("userfault trace: the program opened no region: nothing was recorded", err=True)
        raise typer.Exit(status or 2)
    typer.echo(summary(file), err=True)
    # A program that a signal ended has the status that a shell would give it.
    raise typer.Exit(status if status >= 0 else 128 - status)


def summary(file: Path) -> str:
    """One line about a recording: how many faults of which kind, and in how many regions."""
    counts = dict.fromkeys("mrwa", 0)
    regions = lost = 0
    with file.open() as lines:
        for line in lines:
            words = line.split(" ", 1)
            kind = line.rstrip("\n")[-2:]
            if words[0] == "region":
                regions += 1
            elif words[0] == "lost":
                lost += int(words[1])
            elif kind[:1] == " " and kind[1:] in counts:
                counts[kind[1:]] += 1
    what = {
        "m": "faults on absent blocks",
        "r": "on resting ones",
        "w": "on protected pages",
        "a": "brought in",
    }
    counted = ", ".join(f"{counts[kind]} {words}" for kind, words in what.items())
    plural = "" if regions == 1 else "s"
    return f"{file}: {regions} region{plural}, {counted}" + (f"; {lost} events lost" if lost else "")
