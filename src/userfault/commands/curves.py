"""The picture of ``userfault bench``: seconds by block size, a curve for each step, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from userfault.sizes import in_words

__all__ = ["picture"]

_COLOURS = ("#2f7d6b", "#7a4fa3", "#c98b3d")
_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 34, 520, 300
_LEGEND = 190


def picture(
    steps: Mapping[str, str], ways: Sequence[tuple[int, Mapping[str, float]]], rival: Mapping[str, float]
) -> str:
    """Both axes are logarithmic; a dashed line is what the rival, numpy.memmap, took.

    `steps` has a title for each step. `ways` are block sizes in bytes, from small to large, with the seconds
    of each step; `rival` has the seconds of numpy.memmap. What was not measured is left out. Raises
    ValueError if nothing was.
    """
    known = [value for _, seconds in (*ways, (0, rival)) for step, value in seconds.items() if step in steps]
    if not ways or not known:
        raise ValueError("nothing was measured: there is nothing to draw")
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    high += high == low
    bottom, right = _TOP + _HEIGHT, _LEFT + _WIDTH
    each = _WIDTH / max(1, len(ways) - 1)

    def height(value: float) -> float:
        return bottom - _HEIGHT * (math.log10(value) - low) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + _LEGEND}" height="{bottom + 50}" '
        'font-family="sans-serif" font-size="13" role="img" aria-label="Seconds by block size">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18" fill="#666">seconds, less is better; dashed: numpy.memmap</text>',
    ]
    for power in range(low, high + 1):
        y = height(10.0**power)
        out.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        out.append(
            f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end" fill="#222">{10.0**power:g}</text>'
        )
    for i, (block, _) in enumerate(ways):
        x, words = _LEFT + i * each, escape(in_words(block))
        out.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#222"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle" fill="#222">{words}</text>')
    middle = _LEFT + _WIDTH / 2
    out.append(f'<text x="{middle:.0f}" y="{bottom + 42}" text-anchor="middle" fill="#666">block</text>')
    for i, (step, title) in enumerate(steps.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        there = [(_LEFT + j * each, height(s[step])) for j, (_, s) in enumerate(ways) if step in s]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in there)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in there)
        if step in rival:
            y = height(rival[step])
            out.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="{colour}" stroke-dasharray="6 5"/>')
        y = _TOP + 14 + 22 * i
        out.append(f'<text x="{right + 18}" y="{y}" fill="{colour}">{escape(title)}</text>')
    return "\n".join([*out, "</svg>\n"])
