"""Telling states apart: a value that is equal for two states that will behave the same.

It walks all plain data from the kernel (dataclasses, slots, containers) and the suspended generators of every
thread: which function, at which instruction, with which local variables, and what waits on its stack of
values (the rest of a `for` loop is an iterator there and nowhere else). Objects are numbered in the order
in which they are met, so identity counts and addresses do not.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from userfault.model.content import Content

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel

_ATOMS = (int, str, bytes, float, bool, type(None), Content)
_CONTAINERS: tuple[Iterable[object], ...] = (
    *([], (), range(0), set(), b"", {}, {}.items(), {}.values()),
    *(reversed([]), enumerate(()), zip()),
)
_ITERATORS: Final = tuple(type(iter(container)) for container in _CONTAINERS)
_MACHINERY: Final = (types.CodeType, types.FrameType, types.FunctionType, types.CellType, types.GeneratorType)
_SKIPPED = frozenset(("notes", "handlers", "_next_id", "_contexts"))


def fingerprint(kernel: Kernel, *others: Any) -> int:
    """A number that stands for the state of the machine, and of other plain data (a scenario's own)."""
    return hash(_Walk().value((kernel, others)))


class _Walk:
    """One walk; `seen` numbers the objects."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def value(self, thing: Any) -> Any:
        """The thing as nested tuples of atoms."""
        if isinstance(thing, _ATOMS):
            return thing
        if isinstance(thing, types.FunctionType | types.BuiltinFunctionType | type | types.ModuleType):
            return self._function(thing)
        number = self.seen.get(id(thing))
        if number is not None:
            return ("again", number)
        self.seen[id(thing)] = len(self.seen)
        if isinstance(thing, types.GeneratorType):
            return self._generator(thing)
        if isinstance(thing, _ITERATORS):
            return self._iterator(thing)
        if isinstance(thing, types.MethodType):
            return ("method", thing.__func__.__qualname__, self.value(thing.__self__))
        if isinstance(thing, dict):
            return tuple((self.value(key), self.value(item)) for key, item in self._sorted(thing))
        if isinstance(thing, list | tuple):
            return tuple(map(self.value, thing))
        if isinstance(thing, set | frozenset):
            return frozenset(map(self.value, thing))
        return (type(thing).__name__, *self._slots(thing))

    def _function(self, thing: Any) -> Any:
        cells = getattr(thing, "__closure__", None) or ()
        inside = tuple(self.value(cell.cell_contents) for cell in cells)
        return ("code", getattr(thing, "__qualname__", repr(thing)), inside)

    def _sorted(self, thing: dict[Any, Any]) -> list[tuple[Any, Any]]:
        """Tables of entries in address order: how they came to be does not matter."""
        if all(isinstance(key, int | str) for key in thing):
            return sorted(thing.items(), key=lambda item: (isinstance(item[0], str), item[0]))
        return list(thing.items())

    def _generator(self, thing: types.GeneratorType[Any, Any, Any]) -> Any:
        frame = thing.gi_frame
        if frame is None:
            return ("ended",)
        inner = thing.gi_yieldfrom
        variables = frame.f_locals
        return (
            thing.gi_code.co_qualname,
            frame.f_lasti,
            tuple((name, self.value(variables[name])) for name in sorted(variables)),
            tuple(self._rest(thing, {id(variable) for variable in variables.values()})),
            None if inner is None else self.value(inner),
        )

    def _rest(self, thing: types.GeneratorType[Any, Any, Any], variables: set[int]) -> list[Any]:
        """What a generator holds besides its variables: values on its stack, in their order."""
        return [
            self.value(held)
            for held in gc.get_referents(thing)
            if id(held) not in variables and not isinstance(held, _MACHINERY) and type(held) is not str
        ]

    def _iterator(self, thing: Any) -> Any:
        """An iterator over a container says what it walks over and how far it is."""
        return (type(thing).__name__, *map(self.value, thing.__reduce__()[1:]))

    def _slots(self, thing: Any) -> list[Any]:
        names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        if hasattr(thing, "__dict__"):
            names += sorted(thing.__dict__)
        return [
            (name, self.value(getattr(thing, name)))
            for name in names
            if name not in _SKIPPED and not name.startswith("__") and hasattr(thing, name)
        ]
