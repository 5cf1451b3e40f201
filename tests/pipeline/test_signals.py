"""SIGTERM as an interrupt, and a library that puts its own handler in its place."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from counterweight.pipeline.signals import kept, terminable


def terminate() -> None:
    """Sends this process a SIGTERM and waits for it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def test_a_sigterm_interrupts_once() -> None:
    closed = False
    before = signal.getsignal(signal.SIGTERM)
    with terminable() as received:
        with pytest.raises(KeyboardInterrupt):
            terminate()
        os.kill(os.getpid(), signal.SIGTERM)  # while what was open is being closed
        closed = True
    assert closed
    assert received.terminated
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_is_no_sigterm() -> None:
    with terminable() as received, pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert not received.terminated


def test_a_handler_that_a_library_replaces_is_put_back() -> None:
    with terminable() as received:
        with kept():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt):
            terminate()
    assert received.terminated


def test_threads_that_get_no_signals_may_call_it_too() -> None:
    found: list[bool] = []

    def work() -> None:
        with terminable() as received, kept():
            found.append(received.terminated)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
