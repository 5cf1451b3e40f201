"""Blobs known by their content, records created once."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch

from counterweight.workers import workspace as workspace_module
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError
from counterweight.workers.storage import open_store
from counterweight.workers.tensor_blobs import get_tensors, put_tensors
from counterweight.workers.workspace import BLOBS, COMMITS, DELETING, LAPSE, PRUNES, Blob, Record, Workspace
from tests.patience import PATIENCE


class Found(Record):
    """A record of the tests."""

    value: int


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(open_store(tmp_path.as_uri()))


TENSORS = {"b": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "a": torch.ones(3)}


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_tensors_come_back_bit_for_bit(workspace: Workspace) -> None:
    found = get_tensors(workspace, put_tensors(workspace, TENSORS))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_a_blob_is_named_by_its_bytes(workspace: Workspace, tmp_path: Path) -> None:
    blob = put_tensors(workspace, TENSORS)
    data = (tmp_path / blob.key).read_bytes()
    assert blob == Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    assert blob.key == f"{BLOBS}/{blob.sha256}"
    assert workspace.get_bytes(blob) == data


def test_bytes_are_hashed_once_when_they_are_written(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self.digest = sha256()

        def update(self, data: memoryview) -> None:
            hashed.append(len(data))
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", Counted)
    blob = put_tensors(workspace, TENSORS)
    monkeypatch.undo()
    assert sum(hashed) == blob.size
    assert sha256(workspace.get_bytes(blob)).hexdigest() == blob.sha256


def test_the_order_of_tensors_does_not_matter(workspace: Workspace) -> None:
    assert put_tensors(workspace, TENSORS) == put_tensors(workspace, dict(reversed(TENSORS.items())))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def is_young(path: Path) -> bool:
    return time.time() - path.stat().st_mtime < 600


def test_what_is_there_is_made_young_and_not_written_again(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / put_tensors(workspace, TENSORS).key
    before = path.stat().st_ino
    age(path, 7200)
    put_tensors(workspace, TENSORS)
    assert path.stat().st_ino == before
    assert is_young(path)


def test_a_record_that_is_used_is_made_young(workspace: Workspace, tmp_path: Path) -> None:
    workspace.commit("kind", "key", Found(value=1))
    path = tmp_path / COMMITS / "kind" / "key.json"
    age(path, 7200)
    workspace.lookup("kind", "key", Found)
    assert is_young(path)
    age(path, 7200)
    workspace.commit("kind", "key", Found(value=2))
    assert is_young(path)


@pytest.mark.parametrize(("names", "waits"), [(["a/b"], True), (["c", "a/"], True), (["a"], False), (["a/bc"], False)])
def test_what_a_prune_is_about_to_delete_is_waited_for(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, names: list[str], waits: bool
) -> None:
    monkeypatch.setattr(workspace_module, "POLL_SECONDS", 0.01)
    workspace.store.write("a/b", b"")
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(workspace.spared("a/b")))
    with workspace.condemned(names):
        thread.start()
        thread.join(0.3 if waits else PATIENCE)
        assert answers == ([] if waits else [True])
    thread.join()
    assert answers == [not waits]
    assert workspace.spared("a/b")


def test_what_is_gone_is_not_spared(workspace: Workspace) -> None:
    assert not workspace.spared("a/b")


def test_the_list_of_a_prune_that_was_killed_lapses(workspace: Workspace, tmp_path: Path) -> None:
    workspace.store.write("a/b", b"")
    workspace.store.write(f"{PRUNES}/0", b"a/b\n")
    age(tmp_path / PRUNES / "0", LAPSE.total_seconds() + 60)
    assert workspace.spared("a/b")


def test_a_prune_stops_deleting_long_before_its_list_lapses(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 * DELETING <= LAPSE
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with workspace.condemned(["a"]) as in_time:
        assert in_time()
        clock[0] += DELETING.total_seconds()
        assert not in_time()


def test_a_record_that_a_prune_removes_meanwhile_is_committed_anew(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_module, "POLL_SECONDS", 0.01)
    workspace.commit("kind", "key", Found(value=1))
    path = f"{COMMITS}/kind/key.json"
    committed: list[Found] = []
    thread = threading.Thread(target=lambda: committed.append(workspace.commit("kind", "key", Found(value=2))))
    with workspace.condemned([path]):
        thread.start()
        thread.join(0.3)
        assert committed == []
        workspace.store.delete(path)
    thread.join()
    assert committed == [Found(value=2)]
    assert workspace.lookup("kind", "key", Found) == Found(value=2)


def test_half_a_blob_is_written_again(workspace: Workspace, tmp_path: Path) -> None:
    blob = put_tensors(workspace, TENSORS)
    path = tmp_path / blob.key
    path.write_bytes(path.read_bytes()[:-1])
    assert not workspace.has(blob)
    assert put_tensors(workspace, TENSORS) == blob
    assert workspace.has(blob)


def test_other_bytes_are_never_taken(workspace: Workspace, tmp_path: Path) -> None:
    blob = put_tensors(workspace, TENSORS)
    path = tmp_path / blob.key
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=blob.sha256[:16]):
        get_tensors(workspace, blob)


def test_a_discarded_blob_is_gone(workspace: Workspace) -> None:
    blob = put_tensors(workspace, TENSORS)
    workspace.discard(blob)
    assert not workspace.has(blob)
    with pytest.raises(ObjectNotFoundError):
        workspace.get_bytes(blob)
    workspace.discard(blob)


def test_blobs_are_discarded_side_by_side(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(workspace.store, "delete", lambda _: both.wait())
    workspace.discard(*(Blob(sha256=name * 64, size=1) for name in "ab"))


def test_the_first_commit_holds(workspace: Workspace, tmp_path: Path) -> None:
    assert workspace.lookup("kind", "key", Found) is None
    assert workspace.commit("kind", "key", Found(value=1)) == Found(value=1)
    assert workspace.commit("kind", "key", Found(value=2)) == Found(value=1)
    assert workspace.lookup("kind", "key", Found) == Found(value=1)
    assert files(tmp_path) == [f"{COMMITS}/kind/key.json"]


def test_kinds_and_keys_are_apart(workspace: Workspace) -> None:
    workspace.commit("kind", "key", Found(value=1))
    assert workspace.lookup("other", "key", Found) is None
    assert workspace.lookup("kind", "other", Found) is None


def test_many_writers_agree_on_one_record(workspace: Workspace) -> None:
    agreed: list[Found] = []
    start = threading.Barrier(8)

    def race(value: int) -> None:
        start.wait()
        agreed.append(workspace.commit("kind", "key", Found(value=value)))

    threads = [threading.Thread(target=race, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(agreed) == 8
    assert set(agreed) == {workspace.lookup("kind", "key", Found)}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"value": 1, "more": 2}', '{"value": "x"}', "{}", '{"value": NaN}'], ids=repr
)
def test_what_is_no_record_is_refused(workspace: Workspace, tmp_path: Path, text: str) -> None:
    workspace.commit("kind", "key", Found(value=1))
    (tmp_path / COMMITS / "kind" / "key.json").write_text(text)
    with pytest.raises(IntegrityError, match="not a Found"):
        workspace.lookup("kind", "key", Found)


def test_travels_to_another_process(workspace: Workspace) -> None:
    blob = put_tensors(workspace, TENSORS)
    assert pickle.loads(pickle.dumps(workspace)).get_bytes(blob) == workspace.get_bytes(blob)


def test_a_record_is_json_that_people_can_read(workspace: Workspace, tmp_path: Path) -> None:
    workspace.commit("kind", "key", Found(value=1))
    assert json.loads((tmp_path / COMMITS / "kind" / "key.json").read_text()) == {"value": 1}
