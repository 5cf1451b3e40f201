"""A prune and a job at once: every order of their requests that changes hands two or three times, one request at a time."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.prune import Collector
from counterweight.workers import workspace as workspace_module
from counterweight.workers.storage import ObjectInfo, open_store
from counterweight.workers.storage.file import FileStore
from counterweight.workers.tensor_blobs import get_tensors, put_tensors
from counterweight.workers.workspace import COMMITS, Blob, Record, Workspace
from tests.patience import PATIENCE

AGE = timedelta(days=7)
TENSORS = {"a": torch.arange(4.0)}
POLLS = 40
"""Requests after which a job that gets no further is taken to wait for the prune."""


class Result(Record):
    """What the job's task found."""

    checkpoint: Blob

    @property
    def stored(self) -> tuple[Blob, ...]:
        return (self.checkpoint,)


class Actor:
    """Something that runs in a thread of its own, a request to the store at a time."""

    def __init__(self, root: Path, act: Callable[[FileStore], Any]) -> None:
        self._changed = threading.Condition()
        self._permits = self._waiting = 0
        self._done = False
        self.requests = 0
        self.result: Any = None
        self.error: BaseException | None = None
        self._store = Stepping(root, self._gate)
        self._act = act
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._act(self._store)
        except BaseException as error:  # noqa: BLE001 - told by `finish`
            self.error = error
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def _gate(self) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits > 0, PATIENCE)
            self._permits -= 1
            self._waiting -= 1
            self.requests += 1

    def advance(self, requests: int) -> None:
        """Lets it make some requests; returns before its next."""
        with self._changed:
            self._permits = requests
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._done or (self._permits == 0 and self._waiting > 0), PATIENCE)
            self._permits = 0

    def finish(self) -> Any:
        """To the end; what it gave back."""
        self.advance(1_000_000)
        if self.error is not None:
            raise self.error
        return self.result


class Stepping(FileStore):
    """Asks before each request."""

    def __init__(self, root: Path, gate: Callable[[], None]) -> None:
        super().__init__(root)
        self._gate = gate

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._gate()
        return iter(list(super().list(prefix)))

    def _read(self, key: str) -> bytes:
        self._gate()
        return super()._read(key)

    def size(self, key: str) -> int:
        self._gate()
        return super().size(key)

    def touch(self, key: str, older_than: timedelta) -> bool:
        self._gate()
        return super().touch(key, older_than)

    def create(self, key: str, data: bytes) -> bool:
        self._gate()
        return super().create(key, data)

    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Any:
        self._gate()
        return super().open_writer(key, durable=durable, sha256=sha256)

    def delete(self, key: str) -> None:
        self._gate()
        super().delete(key)


def job(store: FileStore) -> Result:
    """As `DurableTask.run`."""
    workspace = Workspace(store)
    found = workspace.lookup("block", "key", Result)
    if found is None or not all(workspace.has(blob) for blob in found.stored):
        blob = put_tensors(workspace, TENSORS)
        found = workspace.commit("block", "key", Result(checkpoint=blob))
    return found


def collect(store: FileStore) -> None:
    Collector(store, AGE).run(dry_run=False)


def blob_alone(workspace: Workspace) -> None:
    """A task was killed between its blob and its record, weeks ago."""
    put_tensors(workspace, TENSORS)


def record_and_blob(workspace: Workspace) -> None:
    """The work was done weeks ago."""
    workspace.commit("block", "key", Result(checkpoint=put_tensors(workspace, TENSORS)))


def another_record(workspace: Workspace) -> None:
    """Another task has found the same bytes."""
    workspace.commit("block", "other", Result(checkpoint=put_tensors(workspace, TENSORS)))


def record_alone(workspace: Workspace) -> None:
    """The blob was discarded."""
    record_and_blob(workspace)
    workspace.discard(put_tensors(workspace, TENSORS))


def check(root: Path) -> None:
    """The record is there and so are its blobs."""
    workspace = Workspace(open_store(root.as_uri()))
    assert (root / COMMITS / "block" / "key.json").exists()
    found = workspace.lookup("block", "key", Result)
    assert found is not None
    assert get_tensors(workspace, found.checkpoint).keys() == TENSORS.keys()


@pytest.mark.parametrize("before", [blob_alone, record_and_blob, another_record, record_alone])
def test_what_a_job_has_committed_is_whole_whatever_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[Workspace], None]
) -> None:
    monkeypatch.setattr(workspace_module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def fresh(name: str) -> Path:
        root = tmp_path / name
        shutil.rmtree(root, ignore_errors=True)
        before(Workspace(FileStore(root)))
        long_ago = time.time() - 2 * AGE.total_seconds()
        for path in root.rglob("*"):
            os.utime(path, (long_ago, long_ago))
        return root

    def length(act: Callable[[FileStore], Any]) -> int:
        actor = Actor(fresh("alone"), act)
        actor.finish()
        return actor.requests

    of_prune, of_job = length(collect), length(job)
    assert of_prune > 4
    assert of_job > 1
    for pruned in range(of_prune + 1):
        for worked in range(of_job + 1):
            root = fresh("between")  # prune, job, prune, job
            pruning, working = Actor(root, collect), Actor(root, job)
            pruning.advance(pruned)
            working.advance(worked)
            pruning.finish()
            working.finish()
            check(root)
            root = fresh("around")  # job, prune, job as far as it gets, prune, job
            working, pruning = Actor(root, job), Actor(root, collect)
            working.advance(worked)
            pruning.advance(pruned)
            working.advance(POLLS)
            pruning.finish()
            working.finish()
            check(root)
