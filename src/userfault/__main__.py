"""The command line: ``userfault ...`` or ``python -m userfault ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from userfault.commands import bench, model, snapshot, trace

app = typer.Typer(
    help="User-space paging for Python, on Linux userfaultfd.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(model.app, name="model")
app.add_typer(snapshot.app, name="snapshot")
app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(trace.trace)
app.command()(bench.bench)


@app.callback()
def _program() -> None:
    """Keeps ``userfault doctor`` a sub-command, however many there are."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a page.")] = False,
) -> None:
    """Say what this machine allows, why something is missing, and the command that mends it.

    The exit status is 0 if regions work here, else 1.
    """
    from userfault.doctor import examine, usable
    from userfault.doctor.report import as_json as json_of
    from userfault.doctor.report import as_text

    findings = examine()
    typer.echo(json_of(findings) if as_json else as_text(findings))
    if not usable(findings):
        raise typer.Exit(1)


@app.command()
def tour(
    file: Annotated[
        Path | None, typer.Option("--file", help="A file of yours, to be read; without it one is made.")
    ] = None,
    size: Annotated[str, typer.Option("--size", help="Of the file that is made.")] = "512MiB",
    limit: Annotated[str, typer.Option("--limit", help="Memory that the program may use.")] = "128MiB",
) -> None:
    """Watch NumPy work on a file several times larger than the memory it may use.

    The exit status is 0 if every result was right, else 1.
    """
    from userfault.sizes import parse_size
    from userfault.tour import tour as take

    try:
        status = take(file, size=parse_size(size, "--size"), limit=parse_size(limit, "--limit"))
    except (OSError, ValueError) as error:
        typer.echo(f"userfault tour: {error}", err=True)
        raise typer.Exit(2) from None
    if status:
        raise typer.Exit(status)


def main() -> None:
    """Runs the command line."""
    app(prog_name="userfault")


if __name__ == "__main__":
    main()
