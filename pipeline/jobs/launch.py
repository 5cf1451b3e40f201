"""Starts a driver for a job that was submitted: through Ray's own Job Submission, or as a process of this machine."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from counterweight.pipeline.crash import folders
from counterweight.pipeline.redaction import redacted
from counterweight.workers.errors import RequestError, SurroundingsError

ANSWER_SECONDS = 60.0
"""That Ray may take to accept a job; it took up to two."""

MAX_CAUSE = 500
"""Characters of what Ray says when it does not: it sends tracebacks."""


def launch(store: str, id: str, *, dashboard: str | None, python: str | None = None) -> str:
    """Starts a driver that stays until the job is at its end; says where, for people.

    dashboard: http://host:port of Ray's Job Submission; None: a detached process of this machine. python: interpreter on the
    cluster; None: this one. No environment is sent: credentials are the cluster's own. Raises RequestError, SurroundingsError.
    """
    if dashboard is not None:
        return _submitted(dashboard, _command(python or sys.executable, store, id, ("--address", "auto")), id)
    return _detached(_command(sys.executable, store, id), id)


def _command(python: str, store: str, id: str, arguments: Sequence[str] = ()) -> list[str]:
    return [python, "-m", "counterweight.pipeline.cli", "work", "--store", store, "--until", id, *arguments]


def _submitted(dashboard: str, command: Sequence[str], id: str) -> str:
    """Through the REST API of Ray's Job Submission; Ray's own client for it wants the whole of `ray[default]`."""
    asked = {
        "entrypoint": shlex.join(command),
        # Ray refuses a name twice, and a job may need a further driver when its first one died.
        "submission_id": f"counterweight-{id}-{secrets.token_hex(3)}",
        "metadata": {"counterweight_job": id},
    }
    place = redacted(dashboard)
    if not dashboard.startswith(("http://", "https://")):
        raise RequestError(f"address of Ray's Job Submission: {place!r}: expected http://host:port")
    request = urllib.request.Request(
        f"{dashboard.rstrip('/')}/api/jobs/",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json", **_authorization()},
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            name = json.load(answer)["submission_id"]
    except urllib.error.HTTPError as error:
        said = error.read(4096).decode(errors="replace")
        raise _failed(place, f"{error.code} {said}") from error
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise _failed(place, f"{type(error).__name__}: {error}") from error
    return f"Ray job {name} at {place}"


def _failed(place: str, cause: str) -> SurroundingsError:
    line = redacted(" ".join(cause.split()))[:MAX_CAUSE]
    return SurroundingsError(
        f"Ray's Job Submission at {place}: {line}; the job is queued: submit it again to start a driver"
    )


def _authorization() -> dict[str, str]:
    """Ray's own token, from where Ray looks for it, for clusters that ask for one."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        try:
            token = path.read_text().strip()
        except OSError:  # the cluster says so when it wants one
            return {}
    return {"Authorization": f"Bearer {token}"}


def _detached(command: Sequence[str], id: str) -> str:
    descriptor, path = _log(id)
    with open(descriptor, "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ)
        )
    return f"process {process.pid} of this machine, which writes to {path}"


def _log(id: str) -> tuple[int, str]:
    """A file for what the driver itself says."""
    problem = "no folder for it"
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(prefix=f"drive-{id}-", suffix=".log", dir=folder)
        except OSError as error:
            problem = str(error)
    raise SurroundingsError(f"the driver's log: {problem}")
