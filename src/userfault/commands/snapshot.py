"""``userfault snapshot ...``: list, check, export and compare points."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(help="Points that a Checkpointer has saved.", no_args_is_help=True)

_Directory = Annotated[Path, typer.Argument(metavar="PATH", help="The directory of the points.")]
_Step = Annotated[int | None, typer.Option("--step", help="This point; the latest by default.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def _fail(error: Exception) -> typer.Exit:
    # The text of a KeyError is what it was made of.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    typer.echo(f"userfault snapshot: {text}", err=True)
    return typer.Exit(2)


def _differs() -> NoReturn:
    raise typer.Exit(1)


def _array(name: str, description: dict[str, Any], nbytes: int) -> dict[str, Any]:
    # Of an array without elements a byte is saved.
    return {"name": name, "nbytes": 0 if 0 in description["shape"] else nbytes, **description}


@app.command()
def ls(path: _Directory, as_json: _Json = False) -> None:
    """List the finished points, oldest first, with their arrays."""
    from userfault import _native
    from userfault.sizes import in_words

    try:
        points = []
        for step, when, segments in _native.list_points(path):
            opened = _native.OpenPoint(path, step)
            arrays = [
                _array(name, json.loads(description), opened.store(data).nbytes)
                for name, description, data in opened.arrays()
            ]
            points.append(
                {
                    "step": step,
                    "time": when,
                    "segments": segments,
                    "meta": json.loads(opened.meta),
                    "arrays": arrays,
                }
            )
    except (OSError, ValueError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps({"points": points}))
        return
    for point in points:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(point["time"]))
        typer.echo(f"step {point['step']}  {date}  {point['segments']} segments")
        for array in point["arrays"]:
            shape = "x".join(str(size) for size in array["shape"])
            typer.echo(f"  {array['name']:24} {array['dtype']!s:12} {shape:20} {in_words(array['nbytes'])}")


@app.command()
def verify(path: _Directory, step: _Step = None, as_json: _Json = False) -> None:
    """Read every byte of all points, or of one, and say what is wrong.

    The exit status is 0 if nothing is, else 1.
    """
    from dataclasses import asdict

    from userfault.sizes import in_words
    from userfault.verifying import verify as look

    try:
        found = look(path, step)
    except (OSError, ValueError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(asdict(found), default=str))
    else:
        for damage in found.damage:
            typer.echo(str(damage))
        for unused in found.unused:
            typer.echo(f"harmless: {unused}")
        verdict = f"{len(found.damage)} damaged" if found.damage else "sound"
        typer.echo(f"{found.points} points, {in_words(found.nbytes)}: {verdict}")
    if found.damage:
        _differs()


@app.command()
def export(
    path: _Directory,
    target: Annotated[
        Path,
        typer.Argument(help="A .npz or .safetensors file, a .npy or .raw file of one array, or a folder."),
    ],
    step: _Step = None,
    kind: Annotated[
        str | None, typer.Option("--as", help="npy, npz, safetensors or raw; by the target's name otherwise.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Only this array. May be repeated.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write the arrays of a point as .npy files, one .npz, one .safetensors, or raw bytes."""
    from userfault.exporting import export as write

    try:
        written = write(path, target, step, kind=kind, names=name)
    except (OSError, ValueError, KeyError) as error:
        raise _fail(error) from None
    files = [str(file) for file in written.files]
    if as_json:
        typer.echo(json.dumps({"step": written.step, "arrays": written.arrays, "files": files}))
    else:
        typer.echo("\n".join(files))


def _two(points: list[tuple[int, float, int]], first: int | None, second: int | None) -> tuple[int, int]:
    """The two points that are compared."""
    steps = [step for step, _, _ in points]
    if second is None:
        if not steps:
            raise ValueError("there is no point")
        second = steps[-1]
    if first is None:
        earlier = [step for step in steps if step < second]
        if not earlier:
            raise ValueError(f"there is no point before step {second} to compare it with")
        first = earlier[-1]
    return first, second


@app.command()
def diff(
    path: _Directory,
    first: Annotated[int | None, typer.Argument(help="A step; the last but one by default.")] = None,
    second: Annotated[int | None, typer.Argument(help="Another step; the last by default.")] = None,
    as_json: _Json = False,
) -> None:
    """Say how much of each array differs between two points.

    The exit status is 0 if nothing does, else 1.
    """
    from userfault import _native
    from userfault.comparing import compare
    from userfault.sizes import in_words

    try:
        first, second = _two(_native.list_points(path), first, second)
        changes = compare(_native.OpenPoint(path, first), _native.OpenPoint(path, second))
    except (OSError, ValueError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps({"first": first, "second": second, "arrays": changes}))
    else:
        for name, change in changes.items():
            if "only_in" in change:
                typer.echo(f"{name:24} only in step {change['only_in']}")
            else:
                share = f"{in_words(change['changed'])} of {in_words(change['nbytes'])}"
                typer.echo(f"{name:24} {share} in blocks that differ")
    if any(change.get("changed", 1) for change in changes.values()):
        _differs()
