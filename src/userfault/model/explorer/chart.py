"""A trace as a sequence chart: one lifeline a thread, one row a step, in SVG or in a page of HTML.

lifeline    solid while the thread can run, pale while it sleeps
dot         the step; beside it what was done, and below it what that changed
arrow       from the step that queued a message to the step that read it, and from a wake to whom it woke
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from userfault.model.explorer.counterexample import Counterexample, Line

_ROW: Final = 20
_CHANGE: Final = 14
_TOP: Final = 84
_LEFT: Final = 70
_LANE: Final = 110
_TEXT: Final = 7.4  # width of a letter, about
_QUEUED = re.compile(r": queued (.*)")
_READ = re.compile(r": read (.*)")
_WOKE = re.compile(r": woke (.*)")
_STYLE: Final = """
text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2430}.name{font-weight:bold;text-anchor:middle}
.title{font-weight:bold;font-size:14px}.change{fill:#7a4b00;font-size:11px}.number{fill:#999;text-anchor:end}
.awake{stroke:#3465a4;stroke-width:2}.asleep{stroke:#c3cddc;stroke-width:2;stroke-dasharray:2 4}
.arrow{stroke:#b0372f;stroke-width:1.4;fill:none;marker-end:url(#head)}.lap{fill:#fff3d6}
.dot{fill:#3465a4}.last{fill:#b0372f}.band{fill:#f6f8fa}
"""


@dataclass(slots=True)
class _Place:
    lane: int
    y: int
    height: int


def to_svg(found: Counterexample) -> str:
    """The counterexample as an SVG picture, a text that can be written to a file."""
    lines = found.lines()
    lanes = list(dict.fromkeys(line.who for line in lines))
    for line in lines:
        lanes += sorted(name for name in line.asleep if name not in lanes)
    places = _places(lines, lanes)
    text_at = _LEFT + _LANE * len(lanes)
    width = max(
        text_at + round(_TEXT * max((len(line.what) for line in lines), default=0)),
        text_at + round(_TEXT * max((len(change) for line in lines for change in line.changed), default=0)),
        round((_TEXT + 1) * max(len(found.invariant), len(found.wrong_in_words()))),
    )
    height = (places[-1].y + places[-1].height if places else _TOP) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 20}" height="{height}" '
        f'viewBox="0 0 {width + 20} {height}" role="img">',
        f"<title>{escape(found.title())}</title><style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#b0372f"/></marker></defs>',
        f'<rect width="{width + 20}" height="{height}" fill="white"/>',
        f'<text class="title" x="12" y="20">broken: {escape(found.invariant)}</text>',
        f'<text x="12" y="40">{escape(found.wrong_in_words())}</text>',
        *_bands(found, places, width + 20),
        *_lifelines(lines, lanes, places),
        *_arrows(lines, lanes, places),
        *_steps(lines, places, text_at),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def to_html(found: Counterexample) -> str:
    """A page with the picture and the trace as text below it."""
    title = escape(found.title())
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{margin:2em;font-family:system-ui,sans-serif}pre{background:#f6f8fa;padding:1em;"
        "overflow-x:auto}.chart{overflow-x:auto}</style>\n"
        f'<h1>{title}</h1>\n<div class="chart">{to_svg(found)}</div>\n'
        f"<h2>The same as text</h2>\n<pre>{escape(str(found))}</pre>\n</html>\n"
    )


def _x(lane: int) -> int:
    return _LEFT + _LANE * lane


def _places(lines: Sequence[Line], lanes: list[str]) -> list[_Place]:
    places = []
    y = _TOP
    for line in lines:
        height = _ROW + _CHANGE * len(line.changed)
        places.append(_Place(lanes.index(line.who), y, height))
        y += height
    return places


def _bands(found: Counterexample, places: Sequence[_Place], width: int) -> list[str]:
    """Every second row has a background; the circle that repeats for ever has one of its own."""
    first = len(places) - found.lap if found.lap else len(places)
    return [
        f'<rect class="{"lap" if number >= first else "band"}" x="0" y="{place.y}" width="{width}" '
        f'height="{place.height}"/>'
        for number, place in enumerate(places)
        if number % 2 or number >= first
    ]


def _lifelines(lines: Sequence[Line], lanes: list[str], places: Sequence[_Place]) -> list[str]:
    parts = []
    for lane, name in enumerate(lanes):
        x = _x(lane)
        parts.append(f'<text class="name" x="{x}" y="{_TOP - 14}">{escape(name)}</text>')
        asleep = False
        for line, place in zip(lines, places, strict=True):
            kind = "asleep" if asleep else "awake"
            parts.append(
                f'<line class="{kind}" x1="{x}" y1="{place.y}" x2="{x}" y2="{place.y + place.height}"/>'
            )
            asleep = name in line.asleep
    return parts


def _arrows(lines: Sequence[Line], lanes: list[str], places: Sequence[_Place]) -> list[str]:
    parts = []
    queued: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        for change in line.changed:
            if match := _QUEUED.search(change):
                queued.setdefault(_kind(match[1]), []).append(number)
            elif (match := _READ.search(change)) and queued.get(_kind(match[1])):
                parts.append(_arrow(places[queued[_kind(match[1])].pop(0)], places[number]))
            elif (match := _WOKE.search(change)) and match[1] in lanes:
                here = places[number]
                parts.append(_arrow(here, _Place(lanes.index(match[1]), here.y + 4, _ROW)))
    return parts


def _kind(message: str) -> str:
    """A FORK is queued without the descriptor that its reader will get."""
    return re.sub(r"Fork\(.*\)", "Fork", message)


def _arrow(source: _Place, target: _Place) -> str:
    y1, y2 = source.y + _ROW // 2, target.y + _ROW // 2
    x1, x2 = _x(source.lane), _x(target.lane)
    if x1 == x2:
        return f'<path class="arrow" d="M{x1} {y1}C{x1 - 40} {y1} {x1 - 40} {y2} {x2 - 5} {y2}"/>'
    return f'<path class="arrow" d="M{x1} {y1}L{x2 + (-6 if x2 > x1 else 6)} {y2}"/>'


def _steps(lines: Sequence[Line], places: Sequence[_Place], text_at: int) -> list[str]:
    parts = []
    for number, (line, place) in enumerate(zip(lines, places, strict=True), 1):
        y = place.y + _ROW // 2
        last = " last" if number == len(lines) else ""
        parts.append(f'<text class="number" x="28" y="{y + 4}">{number}</text>')
        parts.append(f'<circle class="dot{last}" cx="{_x(place.lane)}" cy="{y}" r="4"/>')
        parts.append(f'<text x="{text_at}" y="{y + 4}">{escape(line.what)}</text>')
        for below, change in enumerate(line.changed, 1):
            at = y + 4 + below * _CHANGE
            parts.append(f'<text class="change" x="{text_at + 14}" y="{at}">{escape(change)}</text>')
    return parts
