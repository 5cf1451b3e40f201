"""SIGTERM, which Kubernetes and spot markets send: treated as an interrupt, so that what is open is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Received:
    """terminated: whether a SIGTERM came."""

    terminated: bool = False


@contextmanager
def terminable() -> Iterator[Received]:
    """Raises KeyboardInterrupt where a SIGTERM arrives inside, the one exception that Ray lets through its waits. Other threads
    than the main one get no signals."""
    received = Received()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not received.terminated:  # once: another would end what closes workers and storage half way
            received.terminated = True
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept() -> Iterator[None]:
    """Puts back, at its end, the handler of SIGTERM that a library replaces inside: Ray's prints a stack and aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
