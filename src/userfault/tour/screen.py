"""What the tour looks like: a sentence of what is going to happen, a live table, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from userfault.sizes import in_words
from userfault.testing.memory_cgroup import MemoryCgroup
from userfault.tour.stop import Message, Plan, Stuck, Truth, cool, limited, run

__all__ = ["show"]

WAYS = {"userfault": "userfault", "memmap": "numpy.memmap"}

DOES = {
    "hash": "SHA-256",
    "sum": "sum",
    "walk": "2,000 random reads",
    "sort": "sort, flush",
}


@dataclass
class _Board:
    """What is known so far, by way and step."""

    plan: Plan
    done: dict[tuple[str, str], Message] = field(default_factory=dict)
    now: tuple[str, Message] | None = None
    ended: dict[str, str] = field(default_factory=dict)
    """A way that did not come to its end, and why."""
    right: dict[tuple[str, str], bool] = field(default_factory=dict)

    def render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for way in WAYS.values():
            table.add_column(way, justify="right")
        for name in ("faults", "hits", "read", "written"):
            table.add_column(name, justify="right", style="dim")
        table.add_column("")
        for step in self.plan.steps:
            ours = self.done.get(("userfault", step))
            table.add_row(
                DOES[step],
                *(self._time(way, step) for way in WAYS),
                f"{ours['faults']:,.0f}" if ours else "",
                f"{ours['hits']:,.0f}" if ours else "",
                in_words(ours["read"]) if ours else "",
                in_words(ours["written"]) if ours else "",
                self._verdict(step),
            )
        return Group(table, self._live())

    def _time(self, way: str, step: str) -> Text:
        message = self.done.get((way, step))
        if message:
            return Text(f"{message['seconds']:.2f} s", style="bold" if way == "userfault" else "")
        if self.now and self.now[0] == way and self.now[1].get("tick") == step:
            return Text(f"{self.now[1]['seconds']:.1f} s …", style="yellow")
        return Text("-" if way in self.ended else "", style="dim")

    def _verdict(self, step: str) -> Text:
        known = [self.right[way, step] for way in WAYS if (way, step) in self.right]
        if not known:
            return Text("")
        return Text("✓", style="green") if all(known) else Text("✗ wrong result", style="bold red")

    def _live(self) -> Text:
        if not self.now or "tick" not in self.now[1]:
            return Text("")
        way, tick = self.now
        parts = [WAYS[way], f"{tick['faults']:,.0f} faults"]
        if "hits" in tick:
            parts.append(f"{tick['hits']:,.0f} hits")
        parts.append(f"{in_words(tick['read'])} read")
        if "memory" in tick:
            parts.append(f"{in_words(tick['memory'])} of {in_words(self.plan.blocks)} in memory")
        return Text("\n" + " · ".join(parts), style="dim")


def show(plan: Plan, console: Console | None = None) -> bool:
    """Run the stop and show it. True if every result of both ways was right and userfault came to its end."""
    console = console or Console(highlight=False)
    board = _Board(plan)
    try:
        if plan.own:
            with console.status("making a file …"):
                plan.write()
        with console.status("reading the file plainly, to know what is right …"):
            truth = Truth.of(plan.path)
        console.print(
            "\n[bold]Memory larger than RAM.[/] An ordinary NumPy program works on a file of "
            f"{in_words(plan.size)}, and may use {in_words(plan.limit)} of memory.\n"
        )
        with Live(board.render(), console=console, auto_refresh=False) as live:
            for way in WAYS:
                with limited(plan.limit) as (group, reason):
                    if group is None and way == "memmap":
                        board.ended[way] = f"this machine gives no memory limit to compare under: {reason}"
                        break
                    _run(way, board, group, truth, live)
            board.now = None
            live.update(board.render(), refresh=True)
    finally:
        plan.remove()
    _conclude(board, console)
    return all(board.right.values()) and "userfault" not in board.ended


def _run(way: str, board: _Board, group: MemoryCgroup | None, truth: Truth, live: Live) -> None:
    plan = board.plan
    if plan.own and any("sort" in key for key in board.done):
        # The way before has sorted it.
        plan.write()
    cool(plan.path)
    try:
        for message in run(way, plan, group):
            board.now = way, message
            if "step" in message:
                board.done[way, message["step"]] = message
                if message["step"] != "sort":
                    board.right[way, message["step"]] = message["result"] == truth.results[message["step"]]
            live.update(board.render(), refresh=True)
    except Stuck as error:
        board.ended[way] = str(error)
        return
    if (way, "sort") in board.done:
        after = Truth.of(plan.path)
        board.right[way, "sort"] = after.sorted and after.results["sum"] == truth.results["sum"]


def _conclude(board: _Board, console: Console) -> None:
    console.print()
    for way, reason in board.ended.items():
        console.print(f"[yellow]{WAYS[way]}: {reason}[/]")
    took = {
        way: sum(board.done[way, step]["seconds"] for step in board.plan.steps)
        for way in WAYS
        if way not in board.ended
    }
    if len(took) == 2:
        console.print(
            f"All of it: userfault {took['userfault']:.1f} s, numpy.memmap {took['memmap']:.1f} s "
            f"({took['userfault'] / took['memmap']:.2f} of it). Each began with a cold file, in a control "
            f"group of {in_words(board.plan.limit)}. Of these userfault kept its blocks in "
            f"{in_words(board.plan.blocks)}."
        )
    wrong = [f"{WAYS[way]}: {step}" for (way, step), right in board.right.items() if not right]
    if wrong:
        console.print(f"[bold red]Wrong results: {', '.join(wrong)}[/]")
    elif board.right:
        console.print("[green]Every result agrees with the file read plainly.[/]")
