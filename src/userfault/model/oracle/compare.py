"""Comparing what a row observed with what the model shows."""

from __future__ import annotations

from typing import Any, Final

NOT_OBSERVED: Final = frozenset(("id", "section"))
"""Fields that name the case."""

LEFT_OUT: Final = frozenset(("note",))
"""Fields that are not compared: `excl` is not reproducible, `note` is a remark of the probe's author."""


def differences(measured: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    """Each difference in words, with its path; empty if the two agree."""
    found: list[str] = []
    _compare("", _without(measured, NOT_OBSERVED), shown, found)
    return found


def _without(row: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def _compare(path: str, measured: Any, shown: Any, found: list[str]) -> None:
    if isinstance(measured, dict) and isinstance(shown, dict):
        for key in [*measured, *(key for key in shown if key not in measured)]:
            if key in LEFT_OUT:
                continue
            at = f"{path}.{key}" if path else key
            if key not in shown:
                found.append(f"{at}: measured {measured[key]!r}, the model shows nothing")
            elif key not in measured:
                found.append(f"{at}: nothing measured, the model shows {shown[key]!r}")
            else:
                _compare(at, measured[key], shown[key], found)
    elif isinstance(measured, list) and isinstance(shown, list) and len(measured) == len(shown):
        for index, (one, other) in enumerate(zip(measured, shown, strict=True)):
            _compare(f"{path}[{index}]", one, other, found)
    elif type(measured) is not type(shown) or measured != shown:
        found.append(f"{path}: measured {measured!r}, the model shows {shown!r}")
