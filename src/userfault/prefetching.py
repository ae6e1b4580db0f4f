"""Futures of prefetches: `Region.prefetch` returns at once, and a thread of its own sees when all is there.

The thread asks and never waits: a prefetch that a hung store keeps from its end keeps no other one, and an
interpreter that exits finds the thread in no call of the compiled part.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import Protocol

__all__ = ["Ticket", "future_of"]

_PAUSE = 0.001
"""Seconds between two looks."""


class Ticket(Protocol):
    """Work of the engine under way."""

    def done(self) -> bool:
        """True if nothing of it is under way any more."""

    def result(self) -> None:
        """Raises the error of the first part that could not be had."""


class _Watch:
    """The tickets that are under way, and the thread that looks at them while there are some."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: list[tuple[Ticket, Future[None]]] = []
        self.thread: threading.Thread | None = None

    def add(self, ticket: Ticket, future: Future[None]) -> None:
        with self.lock:
            self.waiting.append((ticket, future))
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name="userfault-prefetch", daemon=True)
                self.thread.start()

    def run(self) -> None:
        pause = threading.Event()
        while True:
            with self.lock:
                ended = [pair for pair in self.waiting if pair[0].done()]
                self.waiting = [pair for pair in self.waiting if pair not in ended]
                last = not self.waiting
                if last:
                    self.thread = None
            for ticket, future in ended:
                _settle(ticket, future)
            if last:
                return
            pause.wait(_PAUSE)


_watch = _Watch()


def _forked() -> None:
    # The thread, and whatever it waited for, stayed in the parent.
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_forked)


def _settle(ticket: Ticket, future: Future[None]) -> None:
    try:
        ticket.result()
    except Exception as error:  # it belongs to whoever asks the future
        future.set_exception(error)
    else:
        future.set_result(None)


def future_of(ticket: Ticket) -> Future[None]:
    """A future that is done when the ticket is. It cannot be cancelled: what is under way comes."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    if ticket.done():
        _settle(ticket, future)
    else:
        _watch.add(ticket, future)
    return future
