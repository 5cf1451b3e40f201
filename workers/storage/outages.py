"""Waiting for a server that is away: behind boto3's own repetitions, up to a patience, with a word to whoever listens."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from botocore.exceptions import ConnectionError as EndpointError
from botocore.exceptions import HTTPClientError, SSLError

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0
"""Between requests: the first, doubled each time, up to the longest. A random part of up to a half is left out, so that a
thousand workers do not come back at once."""

_AWAY = frozenset({429, 500, 502, 503, 504})
_SINCE = "counterweight_since"
_PAUSES = "counterweight_pauses"


class Outages:
    """What this process waits for now. `listener` is told of each outage, once, on whichever thread meets it."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None
        self._lock = threading.Lock()
        self._waiting: dict[str, str] = {}

    @property
    def now(self) -> str:
        """Of the outages that are waited for, for people; empty when there is none."""
        with self._lock:
            return "; ".join(self._waiting.values())

    def begins(self, place: str, cause: str, patience: float) -> None:
        """A place does not answer. Told once until it answers again."""
        text = f"{place} is away ({cause}): it is waited for, up to {patience:.0f} s"
        with self._lock:
            known = place in self._waiting
            self._waiting[place] = text
        if not known and self.listener is not None:
            self.listener(text)

    def ends(self, place: str) -> None:
        """A place answers."""
        if self._waiting:
            with self._lock:
                self._waiting.pop(place, None)


OUTAGES = Outages()
"""Of this process."""


class Patience:
    """A handler of botocore's `needs-retry`, to be registered behind its own: repeats requests while the server is away, for
    `seconds` since the request first failed. Asked of each answer; None: it is final."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(
        self, response: Any, caught_exception: Exception | None, request_dict: Mapping[str, Any], **_: object
    ) -> float | None:
        place = str(request_dict["url"]).partition("?")[0].split("/", 3)[2]
        cause = _cause(response, caught_exception)
        if cause is None:
            OUTAGES.ends(place)
            return None
        context, now = request_dict["context"], time.monotonic()
        since = context.setdefault(_SINCE, now)
        pauses = context[_PAUSES] = context.get(_PAUSES, -1) + 1
        left = self._seconds - (now - since)
        if left <= 0:
            return None
        OUTAGES.begins(place, cause, self._seconds)
        longest = min(PAUSE_SECONDS * 2**pauses, LONGEST_PAUSE_SECONDS)
        return float(min(random.uniform(0.5, 1) * longest, left))


def _cause(response: Any, error: Exception | None) -> str | None:
    """Why the server counts as away; None when it answers."""
    if error is not None:
        away = isinstance(error, EndpointError | HTTPClientError) and not isinstance(error, SSLError)
        return type(error).__name__ if away else None
    status = response[0].status_code
    return f"HTTP status {status}" if status in _AWAY else None
