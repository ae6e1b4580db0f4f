"""Comparing what a row observed with what the model shows."""

from __future__ import annotations

from typing import Any, Final

_NAMES: Final = frozenset(("id", "section"))
"""Fields that name the case."""

_ASYNC: Final = 0x8000


def left_out(row: dict[str, Any]) -> frozenset[str]:
    """Fields that are not compared unless asked for: `excl` depends on how a page was made; so does `scan`,
    which counts only where tracking by WP_ASYNC is the subject."""
    tracking = row["section"] == "wp_async" or bool(_number(row.get("features")) & _ASYNC)
    return frozenset(("excl",)) if tracking else frozenset(("excl", "scan"))


def _number(text: Any) -> int:
    try:
        return int(text, 16)
    except (TypeError, ValueError):
        return 0


def differences(measured: dict[str, Any], shown: dict[str, Any], *, strict: bool = False) -> list[str]:
    """Each difference in words, with its path; empty if the two agree. strict: leave nothing out."""
    found: list[str] = []
    observed = {key: value for key, value in measured.items() if key not in _NAMES}
    _compare("", observed, shown, frozenset() if strict else left_out(measured), found)
    return found


def _compare(path: str, measured: Any, shown: Any, skip: frozenset[str], found: list[str]) -> None:
    if isinstance(measured, dict) and isinstance(shown, dict):
        for key in [*measured, *(key for key in shown if key not in measured)]:
            if key in skip:
                continue
            at = f"{path}.{key}" if path else key
            if key not in shown:
                found.append(f"{at}: measured {measured[key]!r}, the model shows nothing")
            elif key not in measured:
                found.append(f"{at}: nothing measured, the model shows {shown[key]!r}")
            else:
                _compare(at, measured[key], shown[key], skip, found)
    elif isinstance(measured, list) and isinstance(shown, list) and len(measured) == len(shown):
        for index, (one, other) in enumerate(zip(measured, shown, strict=True)):
            _compare(f"{path}[{index}]", one, other, skip, found)
    elif type(measured) is not type(shown) or measured != shown:
        found.append(f"{path}: measured {measured!r}, the model shows {shown!r}")
