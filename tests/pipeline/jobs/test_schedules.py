"""Schedules: when they fire, through daylight saving, restarts and several instances; what a firing submits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from counterweight.pipeline.cli import main
from counterweight.pipeline.jobs.batch import all_batches
from counterweight.pipeline.jobs.firing import Verdict, due, following, verdicts
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.schedule import SCHEDULES, Schedules
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.manifest import CompressionBatch, SubmittedJob
from counterweight.pipeline.manifest.batch import Overlap
from counterweight.workers.errors import ManifestError, StorageError
from tests.pipeline.jobs.memory import EPOCH, MemoryStore, manifest
from tests.pipeline.manifest_documents import FULL

YEARS = 2
END = EPOCH + timedelta(days=365 * YEARS)

# Of the north and of the south, one that changes by half an hour and at another hour of the day.
ZONES = ("Europe/Zurich", "America/New_York", "Australia/Lord_Howe")


def batch(**spec: Any) -> CompressionBatch:
    document = {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionBatch",
        "metadata": {"name": "nightly"},
        "spec": {"jobs": ["job.yaml"], "schedule": "30 2 * * *", **spec},
    }
    return CompressionBatch.model_validate_json(json.dumps(document))


def instance(store: MemoryStore) -> Schedules:
    """As a process that was just started."""
    return Schedules(JobStore(store))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def put(store: MemoryStore, **spec: Any) -> str:
    made, created = instance(store).submit(batch(**spec), (SubmittedJob(job=manifest()),))
    assert created
    return made.record.id


def finish_all(store: MemoryStore) -> None:
    jobs = JobStore(store)
    for job in jobs.all():
        if not job.state.terminal:
            lease = take(jobs, job.id, "a")
            assert lease is not None
            lease.end(Ended(cause=Cause.DONE, exit_code=0, artifact="file:///x"))


class TestTwoYears:
    """A simulated clock: looks at odd intervals, by two instances that are restarted now and then."""

    def fired(self, store: MemoryStore, id: str) -> list[datetime]:
        two = [instance(store), instance(store)]
        number = 0
        while store.time < END:
            store.advance(60 * (37 + 640 * (number % 3)))  # within the deadline of 24 hours
            for one in two if number % 2 else reversed(two):
                one.tick()
            if number % 50 == 0:
                two[number // 50 % 2] = instance(store)
            number += 1
        return list(two[0].get(id).fired)

    @pytest.mark.parametrize("zone", ZONES)
    def test_every_day_has_one_firing_by_its_own_clock(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, zone: str
    ) -> None:
        """Also the days on which 2:30 does not exist or exists twice. Which days there are is counted without cron."""
        submitted: Counter[datetime] = Counter()
        monkeypatch.setattr(Schedules, "_batch", counted(submitted))
        id = put(store, timeZone=zone, missed_after_seconds=24 * 3600, overlap="allow")
        here = [moment.astimezone(ZoneInfo(zone)) for moment in self.fired(store, id)]
        first, last = EPOCH.astimezone(ZoneInfo(zone)), store.time.astimezone(ZoneInfo(zone))
        days = [first.date() + timedelta(days=n) for n in range((last.date() - first.date()).days + 1)]
        expected = [
            day
            for day in days
            if (day > first.date() or (first.hour, first.minute) < (2, 30))
            and (day < last.date() or (last.hour, last.minute) >= (2, 30))
        ]
        assert [moment.date() for moment in here] == expected
        odd = [moment for moment in here if (moment.hour, moment.minute) != (2, 30)]
        assert len(odd) <= YEARS  # where the change skips the time of day, it fires right behind
        assert all(moment.hour in (2, 3) for moment in odd)
        assert set(submitted.values()) == {1}
        assert len(submitted) == sum(v is Verdict.STARTED for v in instance(store).get(id).fired.values())

    def test_every_hour_is_every_hour_that_passes(self) -> None:
        """Of days that have 23, 24 and 25 hours."""
        for zone in ZONES[:2]:
            moments = due("0 * * * *", zone, EPOCH, END, END - EPOCH)
            assert moments == [EPOCH + timedelta(hours=n + 1) for n in range(24 * 365 * YEARS)]


def counted(submitted: Counter[datetime]) -> Callable[..., None]:
    """In the place of a submission: counts it once for each process that does it first."""

    def submit(schedules: Schedules, record: object, moment: datetime) -> None:
        key = f"submitted/{moment.isoformat()}"
        submitted[moment] += schedules.jobs.store.create(key, b"")

    return submit


class TestFirings:
    def test_submit_a_batch_whose_jobs_are_new_each_time(self, store: MemoryStore) -> None:
        id = put(store)
        store.advance(3 * 3600)
        for _ in range(3):
            instance(store).tick()
            store.advance(24 * 3600)
            finish_all(store)
        jobs = JobStore(store)
        assert len({job.id for job in jobs.all()}) == 3
        assert [found.id.rpartition("-")[2] for found in all_batches(jobs)] == [
            *("202601010230", "202601020230", "202601030230"),
        ]
        assert list(instance(store).get(id).fired.values()) == [Verdict.STARTED] * 3

    def test_nothing_before_its_time(self, store: MemoryStore) -> None:
        put(store)
        store.advance(2.4 * 3600)
        instance(store).tick()
        assert JobStore(store).all() == []

    def test_that_a_dead_instance_decided_are_finished_by_another(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        id = put(store)
        store.advance(3 * 3600)
        real = store.create

        def dies(key: str, data: bytes) -> bool:
            if key.startswith(("_jobs/", "_batches/")):
                raise StorageError("killed")
            return real(key, data)

        with monkeypatch.context() as patch:
            patch.setattr(store, "create", dies)
            with pytest.raises(StorageError):
                instance(store).tick()
        assert list(instance(store).get(id).fired.values()) == [Verdict.STARTED]
        assert JobStore(store).all() == []
        instance(store).tick()
        instance(store).tick()
        assert len(JobStore(store).all()) == len(all_batches(JobStore(store))) == 1

    def test_that_nobody_was_there_for_are_made_up_for_once_within_the_deadline(self, store: MemoryStore) -> None:
        id = put(store, schedule="*/10 * * * *", missed_after_seconds=3600)
        store.advance(24 * 3600 + 300)
        instance(store).tick()
        fired = instance(store).get(id).fired
        assert list(fired.values()) == [Verdict.SUPERSEDED] * 5 + [Verdict.STARTED]
        assert max(fired) == EPOCH + timedelta(hours=24)
        assert len(JobStore(store).all()) == 1

    def test_that_are_too_old_are_missed_for_good(self, store: MemoryStore) -> None:
        id = put(store, missed_after_seconds=3600)
        store.advance(4 * 3600)
        instance(store).tick()
        assert instance(store).get(id).fired == {}

    @pytest.mark.parametrize(
        ("overlap", "second", "first_job"),
        [
            ("skip", Verdict.SKIPPED, State.QUEUED),
            ("allow", Verdict.STARTED, State.QUEUED),
            ("replace", Verdict.STARTED, State.CANCELLED),
        ],
    )
    def test_that_meet_the_one_before(
        self, store: MemoryStore, overlap: str, second: Verdict, first_job: State
    ) -> None:
        id = put(store, overlap=overlap)
        store.advance(3 * 3600)
        for _ in range(2):
            instance(store).tick()
            store.advance(24 * 3600)
        assert list(instance(store).get(id).fired.values()) == [Verdict.STARTED, second]
        jobs = JobStore(store).all()
        assert jobs[0].state is first_job
        assert len(jobs) == (1 if second is Verdict.SKIPPED else 2)

    def test_of_a_schedule_that_was_stopped_are_none(self, store: MemoryStore) -> None:
        id = put(store)
        assert len(instance(store).get(id).next(store.now())) == 3
        assert instance(store).stop(id).next(store.now()) == []
        store.advance(3 * 3600)
        instance(store).tick()
        assert JobStore(store).all() == []

    def test_of_two_instances_at_once_are_one(self, store: MemoryStore) -> None:
        put(store)
        store.advance(3 * 3600)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: instance(store).tick(), range(8)))
        assert len(JobStore(store).all()) == 1
        assert sum(key.startswith(f"{SCHEDULES}/") and "/firings/" in key for key in store.objects) == 1


def test_verdicts() -> None:
    moments = [EPOCH, EPOCH + timedelta(hours=1)]
    assert verdicts([], Overlap.SKIP, False) == []
    assert [v for _, v in verdicts(moments, Overlap.SKIP, True)] == [Verdict.SUPERSEDED, Verdict.SKIPPED]
    assert [v for _, v in verdicts(moments, Overlap.ALLOW, True)] == [Verdict.SUPERSEDED, Verdict.STARTED]


def test_the_next_firings_are_in_the_schedules_zone() -> None:
    assert following("0 2 * * *", "Europe/Zurich", EPOCH, 2) == [
        datetime(2026, 1, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 2, 1, tzinfo=UTC),
    ]


class TestCommands:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("COUNTERWEIGHT_STORE", str(tmp_path / "store"))
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        (tmp_path / "job.yaml").write_text(FULL)
        path = tmp_path / "batch.json"
        path.write_text(batch(timeZone="Europe/Zurich").model_dump_json())
        return path

    def test_submit_show_and_stop_a_schedule(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["submit", str(path), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["created"], said["started"], len(said["next"])) == (True, [], 3)
        for arguments in (["status", said["id"]], ["list", "--schedules"]):
            assert main([*arguments, "--json"]) == 0
            assert said["id"] in capsys.readouterr().out
            assert main(arguments) == 0
            assert "Europe/Zurich" in capsys.readouterr().out
        assert main(["cancel", said["id"]]) == 0
        assert capsys.readouterr().out.split() == [said["id"], "stopped"]
        assert main(["submit", str(path), "--again"]) == 2

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("schedule", "0 25 * * *"),
            ("schedule", "0 0 30 2 *"),
            ("schedule", "* * * * * *"),
            ("schedule", ""),
            ("timeZone", "Europe/Nowhere"),
            ("timeZone", "../../etc/passwd"),
            ("overlap", "maybe"),
            ("missed_after_seconds", 1),
        ],
    )
    def test_a_wrong_schedule_is_refused_by_name(
        self, path: Path, capsys: pytest.CaptureFixture[str], field: str, value: object
    ) -> None:
        assert main(["submit", str(path), "--set", f"spec.{field}={json.dumps(value)}"]) == 2
        said = capsys.readouterr().err
        assert f"spec.{field}" in said
        assert "Traceback" not in said


def test_a_zone_of_the_files_above_is_no_zone() -> None:
    with pytest.raises((ManifestError, ValueError)):
        batch(timeZone="/etc/localtime")
