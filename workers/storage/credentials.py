"""Credentials that expire while a job runs."""

from __future__ import annotations

from typing import Any

import botocore.session
from botocore.credentials import Credentials

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})


class Renewal:
    """A handler of botocore's `needs-retry`: where the server says that credentials have expired, reads them anew from the
    standard AWS environment, once for a request, and repeats it with them. Roles and profiles that renew themselves do so
    in botocore; this is for files that something else keeps fresh.

    credentials: those that the client signs with, changed in place; None: it has none.
    """

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials

    def __call__(self, response: Any, request_dict: Any, **_: object) -> float | None:
        own, context = self._credentials, request_dict["context"]
        expired = response is not None and response[1].get("Error", {}).get("Code") in _EXPIRED
        # Those of a subclass renew themselves.
        if own is None or not expired or type(own) is not Credentials or context.get("counterweight_renewed"):
            return None
        context["counterweight_renewed"] = True
        fresh = botocore.session.Session().get_credentials()
        if fresh is None or fresh.secret_key == own.secret_key:
            return None
        own.access_key, own.secret_key, own.token = fresh.access_key, fresh.secret_key, fresh.token
        return 0.0
