"""moto as a server on a free port of the loopback interface, one request at a time: several at once look whether a key is taken
and then write, so that two of them create it. Run as a script of its own; it tells its address on stderr."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.wsgi import ClosingIterator

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class OneAtATime:
    """A WSGI application whose requests do not overlap."""

    def __init__(self, application: WSGIApplication) -> None:
        self._application, self._lock = application, threading.Lock()

    def __call__(self, environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with self._lock:
            answer = self._application(environment, start_response)
            return ClosingIterator(list(answer), getattr(answer, "close", None))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
