"""Telling states apart: a value that is equal for two states that will behave the same.

It walks all plain data from the kernel (dataclasses, slots, containers) and the suspended generators of every
thread: which function, at which instruction, with which local variables, and what waits on its stack of
values (the rest of a `for` loop is an iterator there and nowhere else). Objects are numbered in the order
in which they are met, so identity counts and addresses do not.

What it cannot look into raises TypeError: rather no answer than two different states that look alike.
"""

from __future__ import annotations

import enum
import gc
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from userfault.model.content import Content

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel

_ATOMS: Final = frozenset((int, str, bytes, float, bool, type(None), range, Content))
_CONTAINERS: tuple[Iterable[object], ...] = (
    *([], (), range(0), set(), b"", {}, {}.items(), {}.values()),
    *(reversed([]), enumerate(()), zip(), map(len, ())),
)
_ITERATORS: Final = frozenset(type(iter(container)) for container in _CONTAINERS)
_MACHINERY: Final = frozenset((types.CodeType, types.FrameType, types.FunctionType))
_SKIPPED: Final = frozenset(("notes", "handlers", "_next_id", "_contexts"))
_AGAIN: Final = "met before"


def fingerprint(kernel: Kernel, *others: Any) -> int:
    """A number that stands for the state of the machine, and of other plain data (a scenario's own).

    Raises TypeError for data that it cannot look into.
    """
    walk = _Walk()
    walk.add(kernel)
    for other in others:
        walk.add(other)
    return hash(tuple(walk.out))


class _Walk:
    """One walk. `out` is the state as a row of atoms, `seen` numbers the objects, `kept` holds those made on
    the way, so that no other gets the same id."""

    __slots__ = ("kept", "out", "seen")

    def __init__(self) -> None:
        self.out: list[Any] = []
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []

    def add(self, thing: Any) -> None:
        """Append a thing and all that hangs from it."""
        kind = type(thing)
        if kind in _ATOMS:
            self.out.append(thing)
            return
        number = self.seen.get(id(thing))
        if number is not None:
            self.out.append(_AGAIN)
            self.out.append(number)
            return
        self.seen[id(thing)] = len(self.seen)
        how = _HOW.get(kind) or _learn(kind)
        how(self, thing)


_How = Callable[[_Walk, Any], None]


def _row(walk: _Walk, thing: Any) -> None:
    """list, tuple and named tuple."""
    walk.out.append(type(thing).__name__)
    walk.out.append(len(thing))
    for item in thing:
        walk.add(item)


def _set(walk: _Walk, thing: Any) -> None:
    """A set of atoms has no order; in other sets the order counts, which is safe, only less sharp."""
    if all(type(item) in _ATOMS for item in thing):
        walk.out.append(frozenset(thing))
    else:
        _row(walk, thing)


def _dict(walk: _Walk, thing: Any) -> None:
    """Tables of entries in address order: how they came to be does not matter."""
    walk.out.append("dict")
    walk.out.append(len(thing))
    try:
        keys = sorted(thing)
    except TypeError:
        keys = list(thing)
    for key in keys:
        walk.add(key)
        walk.add(thing[key])


def _generator(walk: _Walk, thing: Any) -> None:
    """Its place, the names of its variables, and all that it holds, in the order of its frame."""
    frame = thing.gi_frame
    if frame is None:
        walk.out.append("ended")
        return
    walk.out += (thing.gi_code.co_qualname, frame.f_lasti, *sorted(frame.f_locals))
    for held in gc.get_referents(thing):
        if type(held) not in _MACHINERY:
            walk.add(held)
    walk.out.append("end of the generator")


def _cell(walk: _Walk, thing: Any) -> None:
    try:
        walk.add(thing.cell_contents)
    except ValueError:
        walk.out.append("an empty cell")


def _function(walk: _Walk, thing: Any) -> None:
    walk.out.append(thing.__qualname__)
    for held in (thing.__closure__, thing.__defaults__, thing.__kwdefaults__):
        walk.add(held)


def _method(walk: _Walk, thing: Any) -> None:
    walk.out.append(thing.__func__.__qualname__)
    walk.add(thing.__self__)


def _name(walk: _Walk, thing: Any) -> None:
    """Classes, modules and built-in functions do not change."""
    walk.out.append(getattr(thing, "__qualname__", None) or thing.__name__)


def _member(walk: _Walk, thing: Any) -> None:
    walk.out.append(f"{type(thing).__name__}.{thing.name}")


def _iterator(walk: _Walk, thing: Any) -> None:
    """An iterator says what it walks over and how far it is."""
    reduced = thing.__reduce__()
    walk.kept.append(reduced)
    walk.out.append(type(thing).__name__)
    for part in reduced[1:]:
        walk.add(part)


def _exception(walk: _Walk, thing: Any) -> None:
    walk.out.append(type(thing).__name__)
    walk.add(thing.args)
    walk.add(thing.__dict__)


_HOW: Final[dict[type, _How]] = {
    list: _row,
    tuple: _row,
    set: _set,
    frozenset: _set,
    dict: _dict,
    types.GeneratorType: _generator,
    types.CellType: _cell,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _name,
    types.ModuleType: _name,
    **dict.fromkeys(_ITERATORS, _iterator),
}


def _learn(kind: type) -> _How:
    """How to look into a kind of object that was not met before."""
    how: _How
    if issubclass(kind, type):
        how = _name
    elif issubclass(kind, enum.Enum):
        how = _member
    elif issubclass(kind, tuple):
        how = _row
    elif issubclass(kind, BaseException):
        how = _exception
    else:
        how = _attributes(kind)
    _HOW[kind] = how
    return how


def _attributes(kind: type) -> _How:
    slots = [name for base in kind.__mro__ for name in base.__dict__.get("__slots__", ())]
    names = [name for name in slots if name not in _SKIPPED and not name.startswith("__")]
    has_dict = any("__dict__" in base.__dict__ for base in kind.__mro__)
    if not has_dict and kind.__module__ == "builtins" and kind is not object:
        raise TypeError(f"a state that holds a {kind.__name__} cannot be told from others")

    def how(walk: _Walk, thing: Any) -> None:
        out = walk.out
        out.append(kind.__name__)
        for name in names:
            if hasattr(thing, name):
                out.append(name)
                walk.add(getattr(thing, name))
        if has_dict:
            for name, item in sorted(thing.__dict__.items()):
                if name not in _SKIPPED:
                    out.append(name)
                    walk.add(item)
            out.append("end")

    return how
