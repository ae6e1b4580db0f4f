"""``userfault snapshot ...``: list, check, export and compare points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from userfault.restoring import State

app = typer.Typer(help="Points that a Checkpointer has saved.", no_args_is_help=True)

_Directory = Annotated[Path, typer.Argument(metavar="PATH", help="The directory of the points.")]
_Step = Annotated[int | None, typer.Option("--step", help="This point; the latest by default.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"userfault snapshot: {error}", err=True)
    return typer.Exit(2)


def _differs() -> NoReturn:
    raise typer.Exit(1)


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
                {"name": name, "nbytes": opened.store(data).nbytes, **json.loads(description)}
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
    target: Annotated[Path, typer.Argument(help="A .npz or .safetensors file, or a folder.")],
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
    from userfault.restoring import restore

    try:
        write = _writer(kind, target)
        with restore(path, step, names=name, mode="r") as state:
            files = write(state, target)
            written: dict[str, Any] = {
                "step": state.step,
                "arrays": list(state),
                "files": [str(file) for file in files],
            }
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _fail(error) from None
    typer.echo(json.dumps(written) if as_json else "\n".join(written["files"]))


def _writer(kind: str | None, target: Path) -> Callable[[State, Path], list[Path]]:
    kind = kind or {".npz": "npz", ".safetensors": "safetensors"}.get(target.suffix, "npy")
    writers = {"npy": _npy, "npz": _npz, "safetensors": _safetensors, "raw": _raw}
    if kind not in writers:
        raise ValueError(f"--as is {kind!r}: it must be one of {', '.join(writers)}")
    return writers[kind]


def _file_name(name: str, suffix: str) -> str:
    """A file name that stays in its folder, whatever an array is called."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return f"{safe.lstrip('.') or '_'}{suffix}"


def _npy(state: State, target: Path) -> list[Path]:
    import numpy as np

    target.mkdir(parents=True, exist_ok=True)
    files = [target / _file_name(name, ".npy") for name in state]
    for file, array in zip(files, state.values(), strict=True):
        np.save(file, array)
    return files


def _raw(state: State, target: Path) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    files = [target / _file_name(name, ".raw") for name in state]
    for file, array in zip(files, state.values(), strict=True):
        array.tofile(file)
    return files


def _npz(state: State, target: Path) -> list[Path]:
    import numpy as np

    arrays: dict[str, Any] = dict(state)
    with target.open("wb") as file:
        np.savez(file, **arrays)
    return [target]


def _safetensors(state: State, target: Path) -> list[Path]:
    from userfault.safetensors import write

    write(target, dict(state))
    return [target]


@app.command()
def diff(
    path: _Directory,
    first: Annotated[int, typer.Argument(help="A step.")],
    second: Annotated[int, typer.Argument(help="A later step.")],
    as_json: _Json = False,
) -> None:
    """Say how much of each array differs between two points.

    The exit status is 0 if nothing does, else 1.
    """
    from userfault import _native
    from userfault.comparing import compare
    from userfault.sizes import in_words

    try:
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
