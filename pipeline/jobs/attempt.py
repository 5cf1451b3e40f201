"""One attempt at a job: `counterweight run` in a process of its own, and what is kept of what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from counterweight.pipeline.child import die_with
from counterweight.pipeline.crash import without_secrets
from counterweight.pipeline.jobs.journal import MAX_LINE
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.redaction import redacted
from counterweight.pipeline.segments import SegmentWriter

GRACE_SECONDS = 30.0
"""That a run may take to close its workers once it was asked to end."""

FLUSH_SECONDS = 2.0
"""Between two writes of a log, for whoever follows it."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended. code: its exit code, negative for a signal. line: what it said last, without credentials. artifact: the
    URI of what it published."""

    code: int
    line: str = ""
    artifact: str | None = None


class Attempt(Protocol):
    """A run that was started."""

    def poll(self) -> Exit | None:
        """How it ended; None while it runs."""

    def terminate(self) -> None:
        """Asks it to end, once; one that takes longer than `GRACE_SECONDS` for it is killed by a later `poll`."""

    def close(self) -> None:
        """Ends it at once, where it still runs, and stores what is left of its log."""


Starter = Callable[[JobRecord, Sequence[JobRecord], SegmentWriter], Attempt]
"""Starts an attempt at a job, which compresses the blocks of others too, and whose log it writes."""


class ProcessAttempt:
    """The real one. It dies with this process: a run whose driver is gone would use the cluster beside the one that follows.

    Its standard streams are files, so that neither waits for the other. Raises OSError where it cannot be started.
    """

    def __init__(
        self, record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter, *, arguments: Sequence[str] = ()
    ) -> None:
        """beside: jobs that are compressed from the same calibration. arguments: further ones of `counterweight run`."""
        self._log = log
        self._folder = tempfile.TemporaryDirectory(prefix="counterweight-job-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        manifest = _written(record, folder / "manifest.json")
        others = [f"--beside={_written(other, folder / f'{other.id}.json')}" for other in beside]
        self._out, self._err = (folder / "stdout").open("w+b"), (folder / "stderr").open("w+b")
        self._taken, self._begun, self._line, self._error = 0, b"", "", ""
        self._asked: float | None = None
        command = [
            sys.executable,
            "-m",
            "counterweight.pipeline.cli",
            "run",
            str(manifest),
            "--json",
            *others,
            *arguments,
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # a signal to this process's group is for this process
            preexec_fn=partial(die_with, os.getpid()),
        )

    def poll(self) -> Exit | None:
        code = self._process.poll()
        self._follow()
        if code is None:
            if self._asked is not None and time.monotonic() - self._asked > GRACE_SECONDS:
                self._process.kill()
            return None
        return Exit(code, (self._error or self._line)[:MAX_LINE], self._artifact() if code == 0 else None)

    def terminate(self) -> None:
        if self._asked is None:
            self._asked = time.monotonic()
            self._process.terminate()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._follow()
        self._log.end()
        self._out.close()
        self._err.close()
        self._folder.cleanup()

    def _follow(self) -> None:
        """Takes what was said since the last look into the log, line by line."""
        said = _read(self._err, self._taken)
        self._taken += len(said)
        *lines, self._begun = (self._begun + said).split(b"\n")
        for line in lines:
            text = without_credentials(line.decode(errors="replace"))
            if text.strip():
                self._line = text
            if text.startswith("error: "):
                self._error = text.removeprefix("error: ")
            self._log.append(f"{text}\n".encode())

    def _artifact(self) -> str | None:
        try:
            document = json.loads(_read(self._out, 0))
        except ValueError:
            return None
        uri = document.get("uri") if isinstance(document, dict) else None
        return redacted(uri) if isinstance(uri, str) else None


def _written(record: JobRecord, path: Path) -> Path:
    path.write_bytes(record.manifest.model_dump_json().encode())
    return path


def _read(file: BinaryIO, start: int) -> bytes:
    """What follows `start`. The file's own position is the child's too, so it is left alone."""
    return os.pread(file.fileno(), max(os.fstat(file.fileno()).st_size - start, 0), start)


def without_credentials(text: str) -> str:
    """A line as others may read it: without what looks like a credential, and without those of this process's environment."""
    return without_secrets(redacted(text), os.environ)
