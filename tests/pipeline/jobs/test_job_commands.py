"""The commands about jobs: what they print, refuse and leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.cli import main
from counterweight.pipeline.jobs import launch as launching
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.states import Cause
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.jobs.submit import submit_job
from counterweight.workers.errors import ManifestError, RequestError
from counterweight.workers.storage.file import FileStore
from tests.pipeline.jobs.memory import manifest

MANIFEST = """\
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {name: tiny}
spec:
  model: {uri: model}
  calibration: {source: {uri: calibration.txt}, sequences: 12, sequence_length: 32}
  recipe: {weights: {bits: 4, group_size: 32}}
  output: {uri: out}
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ran]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COUNTERWEIGHT_STORE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture
def id(command: Command, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job in a store that the environment names."""
    monkeypatch.setenv("COUNTERWEIGHT_STORE", str(tmp_path / "store"))
    ran = command("submit", path, "--no-drive")
    assert ran.code == 0, ran.err
    return ran.out.splitlines()[-1]


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(FileStore(tmp_path / "store"))


class TestSubmit:
    def test_twice_is_one_job_and_again_is_another(self, command: Command, path: Path) -> None:
        first = command("submit", path, "--no-drive", "--json").json
        second = command("submit", path, "--no-drive", "--json").json
        assert (first["created"], second["created"]) == (True, False)
        assert first["id"] == second["id"]
        other = command("submit", path, "--no-drive", "--again", "--json").json
        third = command("submit", path, "--no-drive", "--again", "--json").json
        assert [other["id"], third["id"]] == [f"{first['id']}-1", f"{first['id']}-2"]

    def test_another_manifest_is_another_job(self, command: Command, path: Path) -> None:
        ids = {
            command("submit", path, "--no-drive", "--json", *options).json["id"]
            for options in (
                (),
                ("--set", "spec.recipe.weights.bits=3"),
                ("--output", "elsewhere", "--store", path.parent),
            )
        }
        assert len(ids) == 3

    def test_the_store_is_the_jobs_output_where_none_is_named(self, command: Command, path: Path) -> None:
        said = command("submit", path, "--no-drive", "--json").json
        assert said["store"] == (path.parent / "out").as_uri()
        assert (path.parent / "out" / "_jobs" / said["id"] / "job.json").exists()

    def test_a_wrong_manifest_is_refused_and_leaves_nothing(self, command: Command, path: Path) -> None:
        ran = command("submit", path, "--set", "spec.recipe.weights.bits=9")
        assert (ran.code, ran.out) == (2, "")
        assert "spec.recipe.weights.bits: 9: expected" in ran.err
        assert not (path.parent / "out").exists()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [(("--tenant", "a b"), "tenant"), (("--priority", "101"), "--priority"), (("--store", "gs://x"), "gs://x")],
    )
    def test_a_wrong_option_is_refused(
        self, command: Command, path: Path, options: tuple[str, ...], expected: str
    ) -> None:
        ran = command("submit", path, "--no-drive", *options)
        assert (ran.code, ran.out) == (2, "")
        assert expected in ran.err
        assert "Traceback" not in ran.err

    @pytest.mark.parametrize(
        ("override", "field"),
        [
            ("spec.model.uri=s3://bucket/x?X-Amz-Signature=0123abcd", "spec.model.uri"),
            ("metadata.labels={link: 'https://me:hush@host/x'}", "metadata.labels.link"),
            ("metadata.labels={token: hf_0123456789abcdef}", "metadata.labels.token"),
        ],
    )
    def test_a_manifest_with_a_credential_is_refused(
        self, command: Command, path: Path, override: str, field: str
    ) -> None:
        ran = command("submit", path, "--no-drive", "--set", override)
        assert ran.code == 2
        assert f"{field}: holds what looks like a credential" in ran.err
        assert "hush" not in ran.err
        assert not (path.parent / "out").exists()

    def test_a_driver_is_started_for_what_nobody_drives(
        self, command: Command, path: Path, monkeypatch: pytest.MonkeyPatch, jobs: JobStore, tmp_path: Path
    ) -> None:
        started: list[tuple[str, str]] = []
        monkeypatch.setattr(
            launching, "launch", lambda store, id, **_: started.append((store, id)) or f"process {len(started)}"
        )
        monkeypatch.setenv("COUNTERWEIGHT_STORE", str(tmp_path / "store"))
        said = command("submit", path, "--json").json
        assert said["started"] == ["process 1"]
        assert started == [((tmp_path / "store").as_uri(), said["id"])]
        lease = take(jobs, said["id"], "a")
        assert lease is not None
        assert command("submit", path, "--json").json["started"] == []
        lease.end(Ended(cause=Cause.DONE, exit_code=0, artifact="file:///x"))
        assert command("submit", path, "--json").json["started"] == []


class TestWatching:
    def test_a_job_is_told_with_its_history(self, command: Command, id: str, jobs: JobStore) -> None:
        lease = take(jobs, id, "host:1")
        assert lease is not None
        said = command("status", id, "--json").json
        assert (said["state"], said["driver"], said["driver_lives"], said["attempts"]) == ("running", "host:1", True, 1)
        lease.end(Ended(cause=Cause.GATE, exit_code=3, line="kl 0.2: expected at most 0.1"))
        said = command("status", id, "--json").json
        assert (said["state"], said["cause"], said["exit_code"]) == ("failed", "gate", 3)
        assert [entry["kind"] for entry in said["journal"]] == ["leased", "ended"]
        assert "kl 0.2: expected at most 0.1" in command("status", id).out

    def test_a_job_that_is_done_has_no_last_line_to_tell(self, command: Command, id: str, jobs: JobStore) -> None:
        lease = take(jobs, id, "host:1")
        assert lease is not None
        lease.end(Ended(cause=Cause.DONE, exit_code=0, artifact="file:///x"))
        said = [line.strip() for line in command("status", id).out.splitlines()]
        assert any(line.startswith("artifact") for line in said)
        assert "line" not in said

    def test_without_an_id_the_queue_is_told(self, command: Command, id: str) -> None:
        said = command("status", "--json").json
        assert (said["jobs"], said["queue"], said["startable"]) == ({"queued": 1}, [id], [id])
        command("limits", "--concurrency", "0")
        assert command("status", "--json").json["startable"] == []
        assert id in command("status").out

    def test_a_list_can_be_narrowed(self, command: Command, path: Path, id: str) -> None:
        other = command("submit", path, "--no-drive", "--again", "--tenant", "b").out.strip()
        assert [job["id"] for job in command("list", "--json").json] == [id, other]
        assert [job["id"] for job in command("list", "--tenant", "b", "--json").json] == [other]
        command("cancel", other)
        assert [job["id"] for job in command("list", "--state", "cancelled", "--json").json] == [other]
        assert id in command("list").out
        assert "expected queued" in command("list", "--state", "gone").err

    def test_an_empty_store_is_no_error(self, command: Command, tmp_path: Path) -> None:
        ran = command("list", "--store", tmp_path / "none")
        assert (ran.code, len(ran.out.splitlines())) == (0, 1)
        assert command("status", "--store", tmp_path / "none").code == 0

    def test_logs_are_told_attempt_by_attempt(self, command: Command, id: str, jobs: JobStore) -> None:
        jobs.store.write(f"{jobs.log_prefix(id, 1)}/00001.log", b"one\ntwo\n")
        jobs.store.write(f"{jobs.log_prefix(id, 3)}/00001.log", b"three\n")
        assert command("logs", id).out.splitlines() == ["one", "two", "three"]
        lines = [json.loads(line) for line in command("logs", id, "--json").out.splitlines()]
        assert lines[2] == {"attempt": 3, "line": "three"}

    def test_following_ends_with_the_job_and_misses_nothing(
        self, command: Command, id: str, jobs: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key, said = f"{jobs.log_prefix(id, 1)}/00001.log", b""

        def sleep(seconds: float) -> None:
            nonlocal said
            said += b"a line\n"
            jobs.store.write(key, said)
            if said.count(b"\n") == 3:
                main(["cancel", id])

        monkeypatch.setattr("counterweight.pipeline.jobs.commands.time.sleep", sleep)
        assert command("logs", id, "-f").out.splitlines() == ["a line", "a line", f"{id}  cancelled", "a line"]

    @pytest.mark.parametrize("name", ["status", "logs", "cancel"])
    def test_a_job_that_is_not_there_is_exit_2(self, command: Command, id: str, name: str) -> None:
        for wrong in ("0" * 16, "../x", ""):
            ran = command(name, wrong)
            assert (ran.code, ran.out) == (2, "")

    @pytest.mark.parametrize("name", ["status", "list", "limits", "work"])
    def test_no_store_is_exit_2(self, command: Command, name: str) -> None:
        ran = command(name)
        assert ran.code == 2
        assert "expected --store URI or COUNTERWEIGHT_STORE" in ran.err

    def test_a_store_that_is_away_is_exit_4_at_once(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_REGION", "us-east-1"),
            ("COUNTERWEIGHT_OUTAGE_SECONDS", "600"),
        ):
            monkeypatch.setenv(name, value)
        ran = command("list", "--store", "s3://bucket/x")
        assert (ran.code, ran.out) == (4, "")
        assert "Traceback" not in ran.err


def test_cancelling_says_how_the_job_stands(command: Command, id: str) -> None:
    assert command("cancel", id).out.split() == [id, "cancelled"]
    assert [job["state"] for job in command("cancel", id, "--json").json] == ["cancelled"]


def test_limits_are_kept_in_the_store(command: Command, id: str) -> None:
    shown = command("limits")
    assert "any number" in shown.out + shown.err
    command("limits", "--concurrency", "4", "--per-tenant", "2", "--tenant", "a=1")
    assert command("limits", "--json").json == {
        "version": 1,
        "concurrency": 4,
        "per_tenant": 2,
        "tenants": {"a": 1},
    }
    assert command("limits", "--concurrency", "-1", "--json").json["concurrency"] is None


def test_work_until_a_job_is_at_its_end_ends_with_its_exit_code(command: Command, id: str, tmp_path: Path) -> None:
    """The job's model is not there, which `run` says by itself."""
    ran = command("work", "--until", id)
    assert ran.code == 2, ran.err
    said = command("status", id, "--json").json
    assert (said["state"], said["cause"], said["attempts"]) == ("failed", "request", 1)
    assert "model" in said["line"]
    assert said["line"] in command("logs", id).out
    assert command("work", "--idle").code == 0


def test_a_store_without_an_atomic_create_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    monkeypatch.setattr(store, "create", lambda key, data: store.write(key, data) is None)
    with pytest.raises(RequestError, match="refused"):
        submit_job(JobStore(store), manifest())


def test_a_credential_in_a_manifest_is_named_by_its_field_alone() -> None:
    with pytest.raises(ManifestError) as caught:
        submit_job(JobStore(FileStore(Path("/nonexistent"))), manifest(spec__model__uri="s3://b/k?token=hush"))
    assert "hush" not in str(caught.value)


def test_commands_about_jobs_import_neither_torch_nor_ray(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST)
    script = (
        "import sys; from counterweight.pipeline.cli import main\n"
        f"store = ['--store', {str(tmp_path / 'store')!r}]\n"
        f"assert main(['submit', {str(path)!r}, '--no-drive', *store]) == 0\n"
        "import io, contextlib; out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out): assert main(['list', '--json', *store]) == 0\n"
        "import json; (job,) = json.loads(out.getvalue())\n"
        "for name in ('status', 'logs', 'cancel'): assert main([name, job['id'], *store]) == 0\n"
        "assert main(['limits', *store]) == 0\n"
        "import counterweight.pipeline.jobs.drive\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name in ("torch", "ray", "transformers", "boto3", "safetensors"):
        assert f"'{name}'" not in ran.stdout.splitlines()[-1]
