"""A proxy in front of an HTTP server that breaks chosen requests in chosen ways.

with FaultProxy(server.endpoint) as proxy:
    proxy.inject(Fault.TRUNCATED, "GET", times=1)
    ...
    assert proxy.count("GET") == 2
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from tests.patience import PATIENCE


class Fault(enum.Enum):
    """What happens to a request, or to the answer of the server behind."""

    UNAVAILABLE = enum.auto()  # answered with 503 SlowDown; the server never hears of it
    EXPIRED = enum.auto()  # answered with 400, as AWS does where credentials have expired; the server never hears of it
    CONFLICT = enum.auto()  # answered with 409, as AWS does where writers meet; the server never hears of it
    RESET = enum.auto()  # the connection is reset; the server never hears of it
    LOST_REPLY = enum.auto()  # the server did it, and the client never hears of it
    TRUNCATED = enum.auto()  # the connection ends after half of the answer's body
    STALLED = enum.auto()  # half of the answer's body, and then nothing
    WHOLE = enum.auto()  # the server is not told of the Range (one that checks signatures of it will refuse)
    FLIPPED = enum.auto()  # the last bit of the answer's body is wrong
    SLOW = enum.auto()  # the answer comes two seconds late


_REFUSALS = {
    Fault.UNAVAILABLE: ("503 Slow Down", "SlowDown"),
    Fault.EXPIRED: ("400 Bad Request", "ExpiredToken"),
    Fault.CONFLICT: ("409 Conflict", "ConditionalRequestConflict"),
}


@dataclass(slots=True)
class _Rule:
    fault: Fault
    method: str
    containing: str
    remaining: int
    skipped: int


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of the loopback interface where nobody listens, and that the kernel gives to nobody else meanwhile; who asks for
    this one (`FaultProxy` with a port) gets it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


HOLD_SECONDS = 20.0
"""That requests are held at most: less than the read timeout of clients."""


class FaultProxy:
    """Listens on a free port of the loopback interface while its block runs; one thread per connection."""

    def __init__(self, endpoint: str, port: int = 0) -> None:
        self._port = port
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        assert parts.port is not None
        self._upstream = (parts.hostname, parts.port)
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []
        self._closed = threading.Event()
        self._at_once = 0
        self._hold: tuple[int, str, str] | None = None
        self._arrived = threading.Condition(self._lock)
        self.requests: list[str] = []  # "METHOD target" of each, in order
        self.ranges: list[str | None] = []  # the Range of each GET, in order
        self.broken = 0  # requests that met a fault
        self.signed: list[str] = []  # the Authorization of each
        self.most_at_once = 0  # of the requests that hold_until names

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def reset(self) -> None:
        """Forgets every request and fault so far."""
        with self._lock:
            self._rules, self._hold, self.requests, self.ranges, self.most_at_once = [], None, [], [], 0

    def inject(self, fault: Fault, method: str, *, times: int, containing: str = "", skipped: int = 0) -> None:
        """Breaks the next `times` requests of `method` whose target contains a text, when so many have passed."""
        with self._lock:
            self._rules.append(_Rule(fault, method, containing, times, skipped))

    def hold_until(self, number: int, method: str, *, containing: str) -> None:
        """Keeps the first requests of this kind waiting until so many are under way, or are let go."""
        with self._lock:
            self._hold = (number, method, containing)

    def let_go(self) -> None:
        """Of those that are held."""
        with self._arrived:
            self._hold = None
            self._arrived.notify_all()

    @property
    def held(self) -> int:
        """How many requests that `hold_until` names are under way."""
        with self._lock:
            return self._at_once

    def count(self, method: str, containing: str = "") -> int:
        """How many requests have come."""
        with self._lock:
            return sum(r.startswith(f"{method} ") and containing in r for r in self.requests)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a close alone would wait for one more connection
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head, body = _read_request(client)
            if head:
                self.signed.append(_fields(head).get(b"authorization", b"").decode())
                method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
                fault = self._fault(method, target, _fields(head).get(b"range"))
                self._answer(client, fault, head, body, self._held(method, target))

    @contextlib.contextmanager
    def _held(self, method: str, target: str) -> Iterator[None]:
        with self._lock:
            hold = self._hold
        if hold is None or hold[1] != method or hold[2] not in target:
            yield
            return
        number = hold[0]
        with self._arrived:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self._arrived.notify_all()
            self._arrived.wait_for(lambda: self._hold is None or self.most_at_once >= number, timeout=HOLD_SECONDS)
        try:
            yield
        finally:
            with self._arrived:
                self._at_once -= 1

    def _fault(self, method: str, target: str, span: bytes | None) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {target}")
            if method == "GET":
                self.ranges.append(span.decode() if span is not None else None)
            for rule in self._rules:
                if rule.remaining and rule.method == method and rule.containing in target:
                    if rule.skipped:
                        rule.skipped -= 1
                        continue
                    rule.remaining -= 1
                    self.broken += 1
                    return rule.fault
        return None

    def _answer(
        self,
        client: socket.socket,
        fault: Fault | None,
        head: bytes,
        body: bytes,
        under_way: contextlib.AbstractContextManager[None],
    ) -> None:
        if fault in _REFUSALS:
            status, code = _REFUSALS[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{status}.</Message></Error>"
            client.sendall(_closing(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}".encode()) + text.encode())
            return
        if fault is Fault.RESET:
            _reset(client)
            return
        if fault is Fault.WHOLE:
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"range:"))
        # A client that has its answer may send its next request at once: this one is over before that.
        with under_way:
            reply_head, reply_body = self._forward(head, body)
        if fault is Fault.LOST_REPLY:
            _reset(client)
            return
        if fault is Fault.SLOW:
            self._closed.wait(2)
        half = len(reply_body) // 2
        if fault is Fault.TRUNCATED:
            reply_body = reply_body[:half]
        elif fault is Fault.FLIPPED:
            reply_body = reply_body[:-1] + bytes([reply_body[-1] ^ 1])
        elif fault is Fault.STALLED:
            client.sendall(reply_head + reply_body[:half])
            self._closed.wait(30)
            return
        client.sendall(reply_head + reply_body)

    def _forward(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        with socket.create_connection(self._upstream, timeout=PATIENCE) as server:
            server.sendall(_closing(head) + body)
            answer = bytearray()
            while piece := server.recv(1 << 20):
                answer += piece
        reply, _, reply_body = bytes(answer).partition(b"\r\n\r\n")
        return _closing(reply), reply_body


def _read_request(client: socket.socket) -> tuple[bytes, bytes]:
    received = bytearray()
    while b"\r\n\r\n" not in received:
        piece = client.recv(1 << 20)
        if not piece:
            return b"", b""
        received += piece
    head, _, rest = bytes(received).partition(b"\r\n\r\n")
    fields = _fields(head)
    if b"expect" in fields:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray(rest)
    while len(body) < int(fields.get(b"content-length", 0)):
        body += client.recv(1 << 20)
    return head, bytes(body)


def _fields(head: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.lower(): value.strip() for name, _, value in lines}


def _closing(head: bytes) -> bytes:
    """The head with one request per connection on both sides, which is all that the proxy understands."""
    lines = head.split(b"\r\n")
    kept = [line for line in lines if line.split(b":")[0].lower() not in (b"connection", b"expect")]
    return b"\r\n".join([*kept, b"Connection: close", b"", b""])


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
