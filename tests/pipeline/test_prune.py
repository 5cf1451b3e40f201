"""What a prune removes from an output and what it leaves, on its own and before and after jobs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from counterweight.pipeline.artifact import verify
from counterweight.pipeline.jobs.drivers import DRIVERS
from counterweight.pipeline.prune import KINDS, Collector, Pruned, Tally, blob_names, prune
from counterweight.workers.errors import CounterweightError, IntegrityError, RequestError, StorageError
from counterweight.workers.ledger import LEDGER
from counterweight.workers.storage import ObjectInfo, open_store
from counterweight.workers.storage.file import FileStore
from counterweight.workers.storage.names import TEMPORARY_PREFIX
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.records import HiddenRecord, Timing
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import LAPSE, PRUNES, Blob, Record, Workspace
from tests.pipeline.tiny import Events, LocalPool, files_of, job_of, local_path, run_local, until, write_job
from tests.servers import S3Server, moto_server

AGE = timedelta(days=7)
OLD = AGE + timedelta(hours=1)
YOUNG = AGE - timedelta(hours=1)
ID = "0123456789abcdef"


class Deep(Record):
    """A record of no kind that the pipeline knows, with blobs where a walk has to look for them."""

    parts: dict[str, tuple[dict[str, Blob | None], ...]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "out"
    root.mkdir()
    return root


def put(root: Path, key: str, data: bytes = b"data", *, age: timedelta) -> str:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    set_age(path, age)
    return key


def set_age(path: Path, age: timedelta) -> None:
    written = time.time() - age.total_seconds()
    os.utime(path, (written, written))


def set_all(root: Path, age: timedelta) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            set_age(path, age)


def put_blob(root: Path, number: float, *, age: timedelta) -> Blob:
    blob = put_tensors(Workspace(FileStore(root)), {"x": torch.tensor([number])})
    set_age(root / blob.key, age)
    return blob


def put_record(root: Path, key: str, *blobs: Blob, age: timedelta, kind: str = "kind") -> str:
    Workspace(FileStore(root)).commit(kind, key, Deep(parts={"a": ({"b": None}, *({"b": blob} for blob in blobs))}))
    name = f"_work/commits/{kind}/{key}.json"
    set_age(root / name, age)
    return name


def keys(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def ran(root: Path, age: timedelta = AGE, *, dry_run: bool = False) -> Pruned:
    return prune(root.as_uri(), age, dry_run=dry_run)


def everything(root: Path, age: timedelta) -> dict[str, set[str]]:
    """One or two of each kind that nothing refers to; kind -> keys."""
    record = put_record(root, f"{age}", put_blob(root, 1, age=age), age=age)
    return {
        "unfinished writes": {
            put(root, f"_work/blobs/{TEMPORARY_PREFIX}1", age=age),
            put(root, f"tiny/{ID}/{TEMPORARY_PREFIX}2", age=age),
        },
        "records": {record},
        "blobs": {put_blob(root, 1, age=age).key, put_blob(root, 2, age=age).key},
        "unpublished artifacts": {
            put(root, f"tiny/{ID}/ledger.json", age=age),
            put(root, f"tiny/{ID}/report/report.json", age=age),
        },
        "events": {
            put(root, "_work/events/job/run/00001.jsonl", age=age),
            put(root, "_work/events/job/run/00002.jsonl", age=age),
        },
        "failed reports": {
            put(root, f"_work/failed/tiny-{ID}/report.json", age=age),
            put(root, f"_work/failed/tiny-{ID}/report.html", age=age),
        },
        "probes": {
            put(root, f".counterweight-probe/{ID}{ID}/race-1", age=age),
            put(root, f".counterweight-probe/{'f' * 32}/seen", age=age),
        },
        "drivers": {put(root, f"{DRIVERS}/{ID}.json", age=age)},
        "killed prunes": {put(root, f"{PRUNES}/{ID}{ID}", age=age)},
    }


def test_of_every_kind_what_is_old_goes(root: Path) -> None:
    made = everything(root, OLD)
    assert set(made) == set(KINDS)
    sizes = {kind: sum((root / key).stat().st_size for key in names) for kind, names in made.items()}
    pruned = ran(root)
    assert keys(root) == set()
    assert pruned.removed == {kind: Tally(len(names), sizes[kind]) for kind, names in made.items()}
    assert pruned.total == Tally(sum(map(len, made.values())), sum(sizes.values()))
    assert pruned.left == ()


def test_nothing_that_is_younger_than_the_age_goes(root: Path) -> None:
    made = everything(root, YOUNG)
    before = keys(root) - made["killed prunes"]  # whose lists count for minutes
    assert ran(root).total.objects == 1
    assert keys(root) == before
    assert ran(root, YOUNG - timedelta(hours=1)).total.objects == len(before)
    assert keys(root) == set()


def test_jobs_batches_and_logs_are_known_and_stay_however_old(root: Path) -> None:
    id = ID.replace("-", "0")
    kept = {
        put(root, key, age=OLD)
        for key in (f"_jobs/{id}/job.json", "_jobs/limits.json", f"_logs/{id}/0001/00001.log", "_batches/b/batch.json")
    }
    assert ran(root).left == ()
    assert keys(root) == kept


def test_a_list_that_may_still_be_in_use_stays_even_at_age_0(root: Path) -> None:
    young = put(root, f"{PRUNES}/{ID}{ID}", age=LAPSE - timedelta(minutes=1))
    ran(root, timedelta(0))
    assert keys(root) == {young}


def test_age_0_takes_what_was_written_just_now(root: Path) -> None:
    now = timedelta(milliseconds=20)  # a disk's clock may be a tick behind ours
    put_record(root, "key", put_blob(root, 1, age=now), age=now)
    assert ran(root, timedelta(0)).total.objects == 2
    assert keys(root) == set()


def test_a_dry_run_says_the_same_and_removes_nothing(root: Path) -> None:
    everything(root, OLD)
    before = keys(root)
    dry = ran(root, dry_run=True)
    assert keys(root) == before
    wet = ran(root)
    assert (dry.removed, dry.total, dry.left) == (wet.removed, wet.total, wet.left)
    assert dry.facts() == {**wet.facts(), "dry_run": True}


def test_a_second_prune_finds_nothing(root: Path) -> None:
    everything(root, OLD)
    ran(root)
    assert ran(root).total == Tally()


def test_a_young_record_holds_its_old_blobs_wherever_they_stand_in_it(root: Path) -> None:
    held = [put_blob(root, number, age=OLD) for number in range(3)]
    loose = put_blob(root, 3, age=OLD)
    record = put_record(root, "key", *held, age=YOUNG)
    assert ran(root).removed["blobs"] == Tally(1, loose.size)
    assert keys(root) == {record, *(blob.key for blob in held)}


def test_while_a_record_is_there_its_blobs_are_no_targets_however_old_it_is(root: Path) -> None:
    """What is looked at before blobs are deleted: records go first."""
    blob = put_blob(root, 1, age=OLD)
    record = put_record(root, "key", blob, age=OLD)
    collector = Collector(FileStore(root), AGE)
    assert {target.name for target in collector.survey().targets} == {record, blob.key}
    assert {target.name for target in collector.survey(records_stay=True).targets} == {record}


def test_a_blob_that_an_old_and_a_young_record_name_stays(root: Path) -> None:
    blob = put_blob(root, 1, age=OLD)
    put_record(root, "old", blob, age=OLD)
    young = put_record(root, "young", blob, age=YOUNG, kind="other")
    ran(root)
    assert keys(root) == {young, blob.key}


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"b": {"sha256": "x", "size": 1}}',
    ],
    ids=lambda data: repr(data[:12]),
)
@pytest.mark.parametrize("age", [OLD, YOUNG])
def test_a_record_that_cannot_be_read_stops_everything(root: Path, damaged: bytes, age: timedelta) -> None:
    everything(root, OLD)
    key = put(root, "_work/commits/kind/broken.json", damaged, age=age)
    before = keys(root)
    for dry_run in (True, False):
        with pytest.raises(IntegrityError, match=key):
            ran(root, dry_run=dry_run)
    assert keys(root) == before


def test_what_has_no_known_place_is_left_alone_and_named(root: Path) -> None:
    unknown = {
        put(root, key, age=OLD)
        for key in (
            "notes.txt",
            "_work/notes.txt",
            "_work/blobs/readme",
            f"_work/blobs/{'A' * 64}",
            "_work/commits/kind/readme.txt",
            "_work/events/job/run/notes.txt",
            "_work/failed/tiny/notes.txt",
            "_work/later/x",
            "tiny/notes.txt",
            f"data/{ID}/photo.jpg",  # looks like an artifact's folder, and has nothing of an artifact
        )
    }
    pruned = ran(root, timedelta(0))
    assert keys(root) == unknown
    assert set(pruned.left) == unknown
    assert pruned.total == Tally()


def test_a_record_in_an_unknown_place_stays_and_holds_its_blobs(root: Path) -> None:
    blob = put_blob(root, 1, age=OLD)
    record = put_record(root, "key", blob, age=OLD)
    (root / "_work/commits/kind/below").mkdir()
    moved = (root / record).rename(root / "_work/commits/kind/below/key.json")
    pruned = ran(root)
    assert keys(root) == {moved.relative_to(root).as_posix(), blob.key}
    assert pruned.left == (moved.relative_to(root).as_posix(),)


def test_a_published_artifact_and_its_pointer_are_never_touched(root: Path) -> None:
    folder = {put(root, f"tiny/{ID}/{name}", age=OLD) for name in ("artifact.json", "ledger.json", "other")}
    pointer = put(root, "tiny/latest.json", age=OLD)
    pruned = ran(root, timedelta(0))
    assert keys(root) == {*folder, pointer}
    assert pruned.left == ()


@pytest.mark.parametrize(
    "names",
    [
        [f"tiny/{ID}/ledger.json", f"tiny/{ID}/config.json"],
        ["_work/events/job/run/00001.jsonl", "_work/events/job/run/00002.jsonl"],
        ["_work/failed/tiny/report.json", "_work/failed/tiny/report.html"],
    ],
)
def test_what_belongs_together_is_judged_by_its_newest(root: Path, names: list[str]) -> None:
    put(root, names[0], age=OLD)
    put(root, names[1], age=YOUNG)
    assert ran(root).total == Tally()
    set_age(root / names[1], OLD)
    assert ran(root).total.objects == 2


class Failing(FileStore):
    """Fails, or dies, at its n-th delete; remembers the deleted."""

    def __init__(self, root: Path, at: int, error: BaseException) -> None:
        super().__init__(root)
        self.deleted: list[str] = []
        self._at, self._error = at, error

    def delete(self, key: str) -> None:
        if not key.startswith(PRUNES):
            if len(self.deleted) == self._at:
                raise self._error
            self.deleted.append(key)
        super().delete(key)


@pytest.mark.parametrize("at", range(9))
def test_a_prune_may_be_killed_anywhere(root: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record is ever without its blobs, and the next prune takes the rest."""
    monkeypatch.setattr("counterweight.pipeline.prune.REQUESTS", 1)
    blobs = [put_blob(root, number, age=OLD) for number in range(2)]
    put_record(root, "key", *blobs, age=OLD)
    put_record(root, "other", blobs[0], age=OLD)
    for name in ("ledger.json", "a.json", "z.json", "model-00001-of-00002.safetensors"):
        put(root, f"tiny/{ID}/{name}", age=OLD)
    store = Failing(root, at, StorageError("delete: 503") if at % 2 else KeyboardInterrupt())
    if at < 8:
        with pytest.raises((StorageError, KeyboardInterrupt)):
            Collector(store, AGE).run(dry_run=False)
    else:
        Collector(store, AGE).run(dry_run=False)
    assert len(store.deleted) == at
    left = keys(root)
    if any(key.startswith("_work/commits") for key in left):
        assert {blob.key for blob in blobs} <= left
    assert not any(key.startswith(PRUNES) for key in left)
    after = ran(root)
    assert keys(root) == set()
    assert after.left == ()


def test_two_prunes_at_once(root: Path) -> None:
    everything(root, OLD)
    young = put_record(root, "young", blob := put_blob(root, 7, age=OLD), age=YOUNG)
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(ran, root) for _ in range(4)]:
            future.result()
    assert keys(root) == {young, blob.key}


def test_a_store_that_is_slower_than_a_list_lasts_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_blob(root, 1, age=OLD)
    monkeypatch.setattr("counterweight.workers.workspace.DELETING", timedelta(0))
    before = keys(root)
    with pytest.raises(StorageError, match="too slow"):
        ran(root)
    assert keys(root) == before


class LateClock(FileStore):
    """Its server's clock is a month ahead of ours: so are the times that it gives to objects."""

    def now(self) -> object:  # type: ignore[override]
        return super().now() + timedelta(days=30)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            yield ObjectInfo(key=info.key, size=info.size, modified=info.modified + timedelta(days=30))


def test_the_stores_clock_decides(root: Path) -> None:
    old, young = put_blob(root, 1, age=OLD), put_blob(root, 2, age=YOUNG)
    Collector(LateClock(root), AGE).run(dry_run=False)
    assert keys(root) == {young.key}
    assert old != young


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "hf:a/b"])
def test_a_wrong_uri_is_a_wrong_request(uri: str) -> None:
    with pytest.raises(RequestError, match="storage URI"):
        prune(uri, AGE)


def test_a_place_that_is_not_there_is_a_wrong_request(tmp_path: Path) -> None:
    for name in ("absent", "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(RequestError, match=f"{name}: no such directory"):
            prune((tmp_path / name).as_uri(), AGE)
    assert keys(tmp_path) == {"file"}


def test_a_negative_age_is_refused(root: Path) -> None:
    put_blob(root, 1, age=OLD)
    with pytest.raises(RequestError, match="at least 0"):
        ran(root, timedelta(seconds=-1))
    assert keys(root) != set()


def test_names_of_blobs_are_found_in_keys_and_in_fields_that_are_not_known_yet() -> None:
    one, two, three = "1" * 64, "2" * 64, "3" * 64
    record = f'{{"a": [{{"sha256": "{one}", "size": 1, "more": 2}}], "{two}": "x", "b": [["{three}"]]}}'
    assert blob_names(record.encode(), "uri") == {one, two, three}


# -- with jobs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("prune"), layers=2)


def test_after_a_prune_an_artifact_is_whole_and_a_job_makes_the_same_again(template: Path, tmp_path: Path) -> None:
    job = job_of(template, f"spec.output.uri={tmp_path.as_uri()}")
    first = run_local(job)
    made = files_of(local_path(first.uri))
    set_all(tmp_path, OLD)
    pruned = ran(tmp_path)
    assert pruned.removed["records"].objects > 0
    assert pruned.removed["blobs"].bytes > sum(map(len, made.values())) / 2
    assert pruned.left == ()
    assert {key.split("/")[0] for key in keys(tmp_path)} == {"tiny"}
    verify(first.uri)
    assert run_local(job).existing
    shutil.rmtree(local_path(first.uri))
    again = run_local(job)
    assert (again.uri, again.existing) == (first.uri, False)
    assert files_of(local_path(again.uri)) == made


def half_done(template: Path, output: Path) -> None:
    """A job whose second block cannot be done."""

    def fault(worker: int, task: object) -> BaseException | None:
        return StorageError("503") if getattr(task, "name", "") == "block 1 (block)" else None

    with pytest.raises(CounterweightError):
        run_local(job_of(template, f"spec.output.uri={output.as_uri()}"), LocalPool(fault=fault))


@pytest.mark.parametrize(("age", "reused"), [(YOUNG, 1), (OLD, 0)])
def test_a_half_done_job_resumes_where_its_records_are_young(
    template: Path, tmp_path: Path, age: timedelta, reused: int
) -> None:
    half_done(template, tmp_path)
    set_all(tmp_path, age)
    ran(tmp_path)
    events = Events()
    published = run_local(job_of(template, f"spec.output.uri={tmp_path.as_uri()}"), progress=events)
    assert events.named("plan") == [(2, reused)]
    verify(published.uri)


def test_a_job_that_runs_through_many_prunes_publishes_the_same(template: Path, tmp_path: Path) -> None:
    """Everything that the first job left is old. At each task of the second a prune runs beside it."""
    job = job_of(template, f"spec.output.uri={tmp_path.as_uri()}")
    first = run_local(job)
    made = files_of(local_path(first.uri))
    shutil.rmtree(local_path(first.uri))
    set_all(tmp_path, OLD)

    def beside(worker: int, task: object) -> None:
        ran(tmp_path)

    again = run_local(job, LocalPool(2, fault=beside))
    assert files_of(local_path(again.uri)) == made
    verify(again.uri)


def test_an_artifact_folder_that_a_job_takes_up_again_is_spared(template: Path, tmp_path: Path) -> None:
    """A run was killed while it assembled, weeks ago. A prune that found its folder old meets the next run there."""
    job = job_of(template, f"spec.output.uri={tmp_path.as_uri()}")
    first = run_local(job)
    (local_path(first.uri) / "artifact.json").unlink()
    set_all(local_path(first.uri), OLD)
    met: list[str] = []

    def claimed() -> bool:
        return time.time() - (local_path(first.uri) / LEDGER).stat().st_mtime < 3600

    class Meeting(FileStore):
        """Before its first delete of a prune that has looked twice, the job begins to assemble."""

        def delete(self, key: str) -> None:
            if key.startswith("tiny/") and not met:
                met.append(key)
                threads.submit(lambda: results.append(run_local(job)))
                until(claimed)
            super().delete(key)

    results: list[object] = []
    with ThreadPoolExecutor(1) as threads:
        Collector(Meeting(tmp_path), AGE).run(dry_run=False)
    assert met
    assert len(results) == 1
    verify(first.uri)


# -- on S3 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server.with_bucket("prune-tests")


@pytest.fixture
def place(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    return lambda name: f"s3://prune-tests/{name}"


def test_on_s3_what_nothing_refers_to_goes_by_the_servers_clock(place: Callable[[str], str]) -> None:
    store = open_store(place("out"))
    workspace = Workspace(store)
    task = HiddenRecord(outputs=(put_tensors(workspace, {"x": torch.ones(1)}),), timing=Timing())
    workspace.commit(Embed.kind, "key", task)
    loose = put_tensors(workspace, {"x": torch.zeros(1)})
    store.write(f"tiny/{ID}/ledger.json", b"{}")
    store.write(f"other/{ID}/ledger.json", b"{}")
    store.write(f"other/{ID}/artifact.json", b"{}")
    abandoned = store.open_writer(loose.key)
    abandoned.write(bytes(20 << 20))  # more than a part
    before = [info.key for info in store.list()]
    assert prune(store.uri, timedelta(hours=1), dry_run=True).removed["blobs"] == Tally()
    dry = prune(store.uri, timedelta(0), dry_run=True)
    assert [info.key for info in store.list()] == before
    pruned = prune(store.uri, timedelta(0))
    assert pruned.removed == dry.removed | {"unfinished writes": pruned.removed["unfinished writes"]}
    assert pruned.removed["unfinished writes"].objects == 1
    assert {kind: tally.objects for kind, tally in pruned.removed.items() if tally.objects} == {
        "unfinished writes": 1,
        "records": 1,
        "blobs": 2,
        "unpublished artifacts": 1,
    }
    assert [info.key for info in store.list()] == [f"other/{ID}/artifact.json", f"other/{ID}/ledger.json"]
    abandoned.abort()


def test_a_bucket_that_is_not_there_is_a_wrong_request(place: Callable[[str], str]) -> None:
    place("out")
    with pytest.raises(RequestError, match="NoSuchBucket"):
        prune("s3://no-such-bucket/out", AGE)
