"""Ordinary functions as threads of the model.

The model's own programs are generators, so that every step has a name and every state can be told from
others. A fault handler as people write it is a function that calls and waits. It runs here on a thread of
the interpreter that never runs at the same time as anything else: it and the scheduler hand a baton to each
other. So an execution is as deterministic as with generators. But what such a function has in its variables
cannot be seen, so the explorer's exhaustive strategy does not apply; many seeds do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from userfault.model.access import MemoryFault
from userfault.model.errnos import SystemCallError
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls
from userfault.model.thread import Thread as ModelThread

T = TypeVar("T")

Request = Callable[[SystemCalls], Op[Any]]

_current = threading.local()


class Abandoned(BaseException):
    """The simulation is over: unwinds the functions that still wait in it."""


class Fiber:
    """One function, and the thread of the interpreter that runs it."""

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self._function = function
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._its_turn = threading.Semaphore(0)
        self._our_turn = threading.Semaphore(0)
        self._request: Request | None = None
        self._answer: Any = None
        self._raise: BaseException | None = None
        self._abandoned = False
        self.thread: ModelThread | None = None
        self._ended = False
        self._result: Any = None
        self._error: BaseException | None = None

    def program(self, t: SystemCalls) -> Op[Any]:
        """What the model's thread runs: hand the baton over, do what comes back, until the function ends."""
        self.thread = t.thread
        self._thread.start()
        while True:
            self._its_turn.release()
            self._our_turn.acquire()
            if self._ended:
                if self._error is not None:
                    raise self._error
                return self._result
            request, self._request = self._request, None
            assert request is not None
            self._answer = self._raise = None
            try:
                self._answer = yield from request(t)
            except (SystemCallError, MemoryFault) as error:
                self._raise = error

    def call(self, request: Request) -> Any:
        """From inside the function: let the model do an operation, and return what it returned."""
        self._request = request
        self._our_turn.release()
        self._wait_for_turn()
        if self._raise is not None:
            raise self._raise
        return self._answer

    def abandon(self) -> None:
        """End the function where it waits; it must not have the baton."""
        if self._thread.is_alive():
            self._abandoned = True
            self._its_turn.release()
            self._thread.join()

    def _main(self) -> None:
        _current.fiber = self
        try:
            self._wait_for_turn()
            self._result = self._function()
        except Abandoned:
            return
        except BaseException as error:
            self._error = error
        self._ended = True
        self._our_turn.release()

    def _wait_for_turn(self) -> None:
        self._its_turn.acquire()
        if self._abandoned:
            raise Abandoned


def current() -> Fiber | None:
    """The fiber that is calling; None outside of fibers."""
    fiber: Fiber | None = getattr(_current, "fiber", None)
    return fiber
