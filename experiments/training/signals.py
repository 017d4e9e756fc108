"""Ctrl-C and SIGTERM: both end a run where its state can be kept. Without torch."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def handled(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    """Let `handler` answer some signals inside. Outside of the main thread, where none arrives, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def terminable() -> AbstractContextManager[None]:
    """Let SIGTERM end what runs as Ctrl-C does; where a cell trains, both wait for its step (see `stoppable`)."""
    return handled(signal.default_int_handler, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM ask for a stop: inside, the yielded function says whether one has.

    A second Ctrl-C interrupts at once.
    """
    asked = False

    def ask(number, frame) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    with handled(ask, signal.SIGINT, signal.SIGTERM):
        yield lambda: asked
