"""The tour's second stop: points of memory that keeps changing, beside fork() and numpy.save."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from userfault.sizes import in_words

__all__ = ["SIZE", "show"]

SIZE = 256 << 20
"""Bytes of the array."""

PATIENCE = 300
"""Seconds after which the program is taken for stuck."""

NAMES = {
    "fork": "fork() of a twin, 4 KiB pages",
    "numpy.save": "numpy.save",
    "full": "a point: everything",
    "incremental": "a point: what changed",
    "verify": "every byte verified",
    "restore": "restored lazily: an element",
}


def run(size: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Lets the program take its points of `size` bytes in a folder, and yields what it says.

    Raises RuntimeError if it does not come to its end.
    """
    command = [sys.executable, "-m", "userfault.tour.points", str(folder), "--size", str(size)]
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, process_group=0)
        try:
            assert child.stdout
            for line in child.stdout:
                yield json.loads(line)
            child.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode != 0:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"it ended with status {child.returncode}: {said[-1] if said else ''}")


def show(console: Console | None = None, size: int = SIZE) -> bool:
    """Takes points of an array of `size` bytes and shows it. True if all that was checked was right."""
    console = console or Console(highlight=False)
    console.print(
        f"\n[bold]Memory that keeps changing.[/] A thread writes to {in_words(size)} as fast as it can, "
        "while points of it are taken.\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, style in (
        ("", ""),
        ("stands still", "bold"),
        ("finished after", ""),
        ("on disk", "dim"),
        ("", ""),
    ):
        table.add_column(name, justify="left" if not name else "right", style=style, no_wrap=True)
    said: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="userfault-tour-") as folder,
        Live(table, console=console) as live,
    ):
        try:
            for message in run(size, Path(folder)):
                said[message["step"]] = message
                table.add_row(*_row(message))
                live.refresh()
        except (RuntimeError, OSError) as error:
            console.print(f"[bold red]The second stop did not come to its end: {error}[/]")
            return False
    right = all(message.get("right", True) for message in said.values()) and set(said) == set(NAMES)
    full, fork, save = said["full"], said["fork"], said["numpy.save"]
    console.print(
        f"\nFor a point the writing program stood still for {_ms(full['stall'])}: "
        f"{full['stall'] / fork['stall']:.2f} of what fork() takes before it has saved anything, and "
        f"{full['stall'] / save['stall']:.4f} of numpy.save. The array was {full['method']}."
    )
    if right:
        console.print("[green]Both points equal copies made at their cuts.[/]")
    else:
        console.print("[bold red]A point is not what memory was at its cut.[/]")
    return right


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _row(message: dict[str, Any]) -> tuple[str, ...]:
    right = {True: "[green]✓[/]", False: "[bold red]✗[/]", None: ""}[message.get("right")]
    return (
        NAMES[message["step"]],
        _ms(message["stall"]) if "stall" in message else "",
        _ms(message["seconds"]) if "seconds" in message else "",
        in_words(message["size"]) if "size" in message else "",
        right,
    )
