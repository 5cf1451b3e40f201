"""Starts a driver for a job that was submitted: through Ray's own Job Submission, or as a process of this machine."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from counterweight.pipeline.crash import folders
from counterweight.workers.errors import SurroundingsError

DASHBOARD = "RAY_API_SERVER_ADDRESS"
"""Ray's own environment variable for the address of its Job Submission."""


def launch(store: str, id: str, *, dashboard: str | None, python: str | None = None) -> str:
    """Starts a driver that stays until the job is at its end; says where, for people.

    dashboard: http://host:port of Ray's Job Submission; None: a detached process of this machine, with an embedded Ray for each
    job. python: interpreter on the cluster; None: this one. No environment is sent: credentials are the cluster's own. Raises
    SurroundingsError.
    """
    if dashboard is not None:
        return _submitted(dashboard, _command(python or sys.executable, store, id, ("--address", "auto")), id)
    return _detached(_command(sys.executable, store, id), id)


def _command(python: str, store: str, id: str, arguments: Sequence[str] = ()) -> list[str]:
    return [python, "-m", "counterweight.pipeline.cli", "work", "--store", store, "--until", id, *arguments]


def _submitted(dashboard: str, command: Sequence[str], id: str) -> str:
    from ray.job_submission import JobSubmissionClient

    try:
        name: str = JobSubmissionClient(dashboard).submit_job(
            entrypoint=shlex.join(command),
            # Ray refuses a name twice, and a job may need a further driver when its first one died.
            submission_id=f"counterweight-{id}-{secrets.token_hex(3)}",
            metadata={"counterweight_job": id},
        )
    except (RuntimeError, ConnectionError, OSError) as error:
        cause = " ".join(str(error).split())[:500]
        raise SurroundingsError(f"Ray's Job Submission at {dashboard}: {cause}") from error
    return f"Ray job {name} at {dashboard}"


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
