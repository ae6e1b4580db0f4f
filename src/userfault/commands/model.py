"""``userfault model ...``: run and explore scenarios, and look up what happens when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from userfault.model import Exploration, Scenario

app = typer.Typer(
    help="The executable model of userfaultfd: no privileges, no Linux needed.", no_args_is_help=True
)

_ScenarioName = Annotated[
    str,
    typer.Argument(
        metavar="SCENARIO",
        help="A Python file with a function build() or a Scenario called scenario, or one that comes with "
        "the package: see `userfault model scenarios`.",
    ),
]
_Mended = Annotated[
    bool, typer.Option("--mended", help="The mended kernel or handler, not the mistaken one.")
]
_Wrong = Annotated[
    list[str] | None,
    typer.Option("--wrong", help="For engine/...: a rule that is got wrong. May be repeated."),
]


@app.command()
def scenarios() -> None:
    """List the scenarios that come with the package."""
    from userfault.model.scenarios.catalogue import catalogue

    for name, about in catalogue():
        typer.echo(f"{name:36}{about}")


@app.command()
def run(
    scenario: _ScenarioName,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Draw the order of steps; without it everybody has a turn.")
    ] = None,
    mended: _Mended = False,
    wrong: _Wrong = None,
) -> None:
    """Run a scenario once and print every step.

    The exit status is 1 if an invariant was broken on the way (raises Exit).
    """
    from userfault.model.explorer.once import run_once

    chosen = _find(scenario, mended, wrong)
    text, ok = run_once(chosen, seed)
    typer.echo(text)
    if not ok:
        raise typer.Exit(1)


@app.command()
def explore(
    scenario: _ScenarioName,
    strategy: Annotated[
        str,
        typer.Option("--strategy", help="exhaustive, random[:WALKS[:SEED]] or pct[:WALKS[:DEPTH[:SEED]]]."),
    ] = "exhaustive",
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Bound on the length of an execution.")
    ] = None,
    mended: _Mended = False,
    wrong: _Wrong = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Write the counterexample as a sequence chart.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="The same as a page, with its text.")] = None,
) -> None:
    """Try a scenario's interleavings and print the shortest one that breaks an invariant.

    The exit status is 0 if every interleaving was tried and none does, 1 if one was found, 3 if the bound was
    too small to say (raises Exit), 2 if the strategy is unknown (raises BadParameter).
    """
    from userfault.model import explore as search

    chosen = _find(scenario, mended, wrong)
    try:
        result = search(chosen, max_steps=max_steps, strategy=strategy)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--strategy") from None
    typer.echo(f"{chosen.name}: {chosen.about}")
    typer.echo(str(result))
    _draw(result, svg, html)
    if result.found is not None:
        raise typer.Exit(1)
    if not result.exhausted:
        raise typer.Exit(3)


@app.command()
def table(
    memory: Annotated[
        str, typer.Argument(help="anon, shmem_shared, shmem_private, hugetlb_shared, hugetlb_private.")
    ],
    mode: Annotated[str, typer.Argument(help="missing, wp, minor, or several: missing+wp.")],
    state: Annotated[str, typer.Argument(help="State of the page; an unknown one lists them all.")],
    kernel: Annotated[str, typer.Option("--kernel", help="5.17, 6.1, 6.12 or 6.18.")] = "6.18",
    features: Annotated[
        str, typer.Option("--features", help="Feature bits of the handshake, such as 0x2000.")
    ] = "0",
) -> None:
    """Print what happens when such a page is touched, filled, protected or moved.

    The exit status is 2 if there is no such page (raises BadParameter).
    """
    from userfault.model.tables import as_text, what_happens

    try:
        rows = what_happens(memory, mode, state, features=int(features, 0), version=kernel)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(as_text(rows))


def _find(name: str, mended: bool, wrong: list[str] | None) -> Scenario:
    from userfault.model.scenarios.catalogue import find

    try:
        return find(name, mended=mended, wrong=tuple(wrong or ()))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="SCENARIO") from None


def _draw(result: Exploration, svg: Path | None, html: Path | None) -> None:
    if result.found is None:
        return
    for path, text in ((svg, result.found.to_svg), (html, result.found.to_html)):
        if path is not None:
            path.write_text(text(), encoding="utf-8")
            typer.echo(f"written: {path}")
