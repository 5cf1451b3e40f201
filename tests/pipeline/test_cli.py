"""The command's contract: exit codes, what stands on stdout and on stderr, what is (not) written. Ray is replaced by
workers in this process; `tests/end_to_end` runs the real thing."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from counterweight.pipeline.artifact import verify
from counterweight.pipeline.cli import main, prune
from counterweight.pipeline.policies import STALE
from counterweight.pipeline.pool import PoolSize
from counterweight.pipeline.units import duration
from counterweight.workers.errors import GateError, StorageError
from counterweight.workers.storage.file import FileStore
from tests.models import read_tensors
from tests.patience import cpu_seconds, of_children
from tests.pipeline.tiny import LocalPool, files_of, local_path, write_job


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Command = Callable[..., Ran]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process, its workers too."""
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not to forks
    monkeypatch.setattr("counterweight.pipeline.run.cluster", lambda address, size: nullcontext())
    monkeypatch.setattr("counterweight.pipeline.run.RayPool", lambda size, **_: LocalPool(size.workers))

    def run(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a job, never changed."""
    return write_job(tmp_path_factory.mktemp("template"), layers=2).parent


@pytest.fixture
def job(template: Path, tmp_path: Path) -> Path:
    """A copy of the job, to be spoiled."""
    shutil.copytree(template, tmp_path / "job")
    return tmp_path / "job" / "job.yaml"


@pytest.fixture(scope="module")
def published(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The manifest and the URI of a published artifact."""
    output = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("counterweight.pipeline.run.cluster", lambda address, size: nullcontext())
        patch.setattr("counterweight.pipeline.run.RayPool", lambda size, **_: LocalPool(size.workers))
        assert main(["run", str(template / "job.yaml"), "--output", str(output), "--address", "local"]) == 0
    (document,) = output.glob("tiny/*/artifact.json")
    return template / "job.yaml", document.parent.as_uri()


def refused(ran: Ran, *expected: str, job: Path) -> None:
    """Exit 2, a line per problem that begins with `error:` and says what is expected, and nothing written."""
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert ran.errors
    others = [
        line for line in ran.err.splitlines() if line not in ran.errors and not line.startswith(("stage ", "about "))
    ]
    assert others == []
    for text in expected:
        assert text in ran.err
    output = job.parent / "out"
    assert not output.exists() or not list(output.rglob("*"))


# -- wrong manifests and arguments ----------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("spec.recipe.weigths={bits: 4}", ["spec.recipe.weigths: unknown key", "did you mean weights?"]),
    "bits 9": ("spec.recipe.weights.bits=9", ["spec.recipe.weights.bits: 9: expected 2, 3, 4 or 8"]),
    "--set of an unknown path": ("spec.nothing.here=1", ["spec.nothing: unknown key", "--set spec.nothing.here"]),
    "--set through a scalar": ("metadata.name.first=x", ["--set metadata.name.first: metadata.name is 'tiny'"]),
    "--set without a value": ("spec.recipe.weights.bits", ["expected path=value"]),
    "unknown scheme": ("spec.output.uri=gs://bucket/x", ["spec.output.uri: 'gs://bucket/x'"]),
    "unknown scheme of the model": ("spec.model.uri=ftp://host/model", ["spec.model.uri: 'ftp://host/model'"]),
    "output below a file": ("spec.output.uri=calibration.txt/out", ["spec.output.uri: ", "calibration.txt/out"]),
    "rank above the layer": (
        "spec.recipe.compensation.rank.count=40",
        ["spec.recipe.compensation", "model.layers.0.self_attn.k_proj [32, 64]", "40", "32"],
    ),
    "override that matches nothing": (
        "spec.recipe.overrides=[{match: '*.fc1', weights: {bits: 8}}]",
        ["spec.recipe.overrides.0.match: '*.fc1': matches no linear layer of the model"],
    ),
    "keep that matches nothing": (
        "spec.recipe.keep=[lm_head, '*.out_proj']",
        ["spec.recipe.keep.1: '*.out_proj': matches no linear layer"],
    ),
    "group size that does not divide": (
        "spec.recipe.weights.group_size=128",
        ["spec.recipe.weights.group_size: 128: expected a divisor of 64, the width of model.layers.0.self_attn.q_proj"],
    ),
    "missing model directory": ("spec.model.uri=nowhere", ["nowhere: no such folder"]),
    "missing calibration text": (
        "spec.calibration.source.uri=nowhere.txt",
        ["spec.calibration.source.uri: ", "nowhere.txt: no such file"],
    ),
    "calibration text too short": (
        "spec.calibration.sequences=16",
        ["spec.calibration.source: 500 tokens make 15 windows of 32: expected at least 16"],
    ),
    "validation text too short": (
        "spec.validation.windows=8",
        ["spec.validation.text: 224 tokens make 7 windows of 32: expected at least 8"],
    ),
    "more memory than there is": ("spec.resources.workers=9999", ["spec.resources: 9999 workers of"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_request_is_refused_by_name(command: Command, job: Path, case: str) -> None:
    setting, expected = SETTINGS[case]
    ran = command("run", job, "--set", setting)
    refused(ran, *expected, job=job)


def test_every_problem_of_a_manifest_is_told_at_once(command: Command, job: Path) -> None:
    ran = command("run", job, "--set", "spec.recipe.weights.bits=9", "--set", "spec.resources.workers=0")
    refused(ran, job=job)
    assert len(ran.errors) == 2


def test_a_manifest_that_is_not_there(command: Command, job: Path) -> None:
    refused(command("run", job.parent / "other.yaml"), "other.yaml: cannot be read: No such file", job=job)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "frobnicate"),
        (["run"], "manifest"),
        (["run", "job.yaml", "--frobnicate"], "--frobnicate"),
        (["eval", "x", "--windows", "many"], "--windows"),
    ],
)
def test_a_misused_command_line_is_one_error_without_a_traceback(
    command: Command, arguments: list[str], expected: str
) -> None:
    ran = command(*arguments)
    assert ran.code == 2
    assert len(ran.errors) == 1
    assert expected in ran.errors[0].lower()
    assert ran.out == ""


def test_no_command_at_all_shows_the_help(command: Command) -> None:
    ran = command()
    assert ran.code == 2
    assert ran.errors == []
    assert "Usage" in ran.out + ran.err


# -- wrong models ---------------------------------------------------------------------------------------------------


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = read_tensors(model)
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def with_nan(model: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        tensors["model.norm.weight"][0] = float("inf")

    edit_tensors(model, spoil)


def with_escaping_index(model: Path) -> None:
    names = read_tensors(model)
    (model / "model.safetensors").rename(model.parent / "evil.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../evil.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickle(model: Path) -> None:
    torch.save(read_tensors(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def without_tensor(model: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]

    edit_tensors(model, remove)


def with_latin_text(model: Path) -> None:
    (model.parent / "calibration.txt").write_bytes(b"w1 w2 \xff w3")


def with_large_token(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w7"] = 9000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "unknown architecture": (
        lambda model: edit_config(model, model_type="bloom"),
        ["config.json: model_type: 'bloom': expected one of", "llama"],
    ),
    "NaN": (
        with_nan,
        ["model.layers.1.mlp.up_proj.weight: holds NaN or infinity", "model.norm.weight: holds NaN or infinity"],
    ),
    "missing tensor": (
        without_tensor,
        ["'model.layers.0.mlp.up_proj.weight': missing, expected shape [96, 64]"],
    ),
    "config with more layers": (
        lambda model: edit_config(model, num_hidden_layers=3),
        ["config.json: num_hidden_layers: 3: the checkpoint has tensors of 2 layers"],
    ),
    "config with fewer layers": (
        lambda model: edit_config(model, num_hidden_layers=1),
        ["'model.layers.1.mlp.up_proj.weight': shape [96, 64], expected no such tensor"],
    ),
    "index with ../": (with_escaping_index, ["'../evil.safetensors', expected a .safetensors file in the same"]),
    "only a pickle": (only_pickle, ["'pytorch_model.bin': a pickle, which can run code"]),
    "text not UTF-8": (with_latin_text, ["spec.calibration.source: ", "calibration.txt: not UTF-8 text at byte 6"]),
    "token beyond the vocabulary": (
        with_large_token,
        ["spec.calibration.source: token id 9000: expected ids from 0 to 127"],
    ),
    "no tokenizer": (
        lambda model: (model / "tokenizer.json").unlink(),
        ["spec.calibration.source: the model has no tokenizer.json"],
    ),
    "broken tokenizer": (with_broken_tokenizer, ["tokenizer.json"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model_is_refused_by_name(command: Command, job: Path, case: str) -> None:
    spoil, expected = MODELS[case]
    spoil(job.parent / "model")
    refused(command("run", job), *expected, job=job)


# -- failures that are nobody's request -----------------------------------------------------------------------------


def test_a_failed_gate_publishes_nothing_and_keeps_the_report(command: Command, job: Path) -> None:
    ran = command(
        "run", job, "--set", "spec.validation.gates.kl=1e-9", "--set", "spec.validation.gates.perplexity_ratio=0.5"
    )
    assert ran.code == GateError.exit_code == 3
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert any("spec.validation.gates.kl: " in line and "expected at most 1e-09" in line for line in ran.errors)
    assert any("spec.validation.gates.perplexity_ratio: " in line for line in ran.errors)
    output = job.parent / "out"
    assert not list(output.rglob("artifact.json"))
    assert not list(output.rglob("latest.json"))
    assert not (output / "tiny").exists()
    (report,) = output.glob("_work/failed/*/report.json")
    assert json.loads(report.read_text())["compensated"]["kl"] > 1e-9
    assert report.with_name("report.html").exists()
    assert report.parent.as_uri() in ran.err


def test_a_gate_that_passes_publishes(command: Command, job: Path) -> None:
    ran = command("run", job, "--set", "spec.validation.gates.kl=100")
    assert ran.code == 0


def test_storage_that_refuses_connections_is_exit_4(
    command: Command, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A port of the loopback interface on which nobody listens.
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    ran = command("run", job, "--output", "s3://bucket/prefix")
    assert ran.code == 4, ran.err
    assert len(ran.errors) == 1
    assert "s3://bucket/prefix" in ran.errors[0]
    assert "Traceback" not in ran.err


def test_storage_without_keys_is_a_wrong_request_told_before_anything_is_computed(
    command: Command, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    ran = command("run", job, "--output", "s3://bucket/prefix")
    refused(ran, "spec.output.uri: ", "NoCredentialsError", job=job)


def test_an_interrupt_is_130_and_one_line(command: Command, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("counterweight.pipeline.orchestrator.inventory", interrupted)
    ran = command("run", job)
    assert ran.code == 130
    assert [line for line in ran.err.splitlines() if not line.startswith(("stage ", "about "))] == [
        "interrupted: finished blocks are kept; run the same command again to resume",
    ]


def test_what_is_not_a_job_keeps_no_blocks_when_it_is_interrupted(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("counterweight.pipeline.jobs.commands.jobs_at", interrupted)
    ran = command("status")
    assert (ran.code, ran.err) == (130, "interrupted\n")


# -- what is printed ------------------------------------------------------------------------------------------------


def test_the_last_line_of_stdout_is_the_uri_and_the_rest_is_on_stderr(command: Command, job: Path) -> None:
    ran = command("run", job)
    assert ran.code == 0
    uri = ran.out.splitlines()[-1]
    assert ran.out == f"{uri}\n"
    assert verify(uri).name == "tiny"
    assert "block 1 done (2/2)" in ran.err
    assert "bits per weight" in ran.err


def test_a_second_run_says_that_everything_is_reused(command: Command, published: tuple[Path, str]) -> None:
    manifest, uri = published
    ran = command("run", manifest, "--output", local_path(uri).parent.parent)
    assert ran.code == 0
    assert ran.out == f"{uri}\n"
    assert "all 2 blocks are reused" in ran.err
    assert "block 0 started" not in ran.err


def test_json_of_every_command_parses(command: Command, published: tuple[Path, str], tmp_path: Path) -> None:
    manifest, uri = published
    output = str(local_path(uri).parent.parent)
    run = json.loads(command("run", manifest, "--output", output, "--json").out)
    assert run["uri"] == uri
    assert run["files"]["config.json"]["size"] > 0
    plan = json.loads(command("plan", manifest, "--json").out)
    assert plan["name"] == "tiny"
    assert len(plan["blocks"]) == 2
    checked = json.loads(command("verify", uri, "--json").out)
    assert checked["id"] == run["id"] == uri.rsplit("/", 1)[1]
    assert checked["files"] == len(run["files"])
    pulled = json.loads(command("pull", uri, tmp_path / "pulled", "--json").out)
    assert pulled == {**checked, "destination": str(tmp_path / "pulled")}
    quality = json.loads(command("eval", uri, "--json", "--windows", 2).out)
    assert set(quality) == {"baseline", "quantized", "compensated"}
    kinds = json.loads(command("schema").out)["$defs"]
    for kind in ("CompressionJob", "CompressionBatch"):
        assert kinds[kind]["properties"]["kind"]["const"] == kind


def test_a_run_says_what_it_takes_over(command: Command, job: Path) -> None:
    ran = command("run", job, "--resume", "required")
    assert (ran.code, ran.out) == (2, "")
    assert ran.errors == [
        "error: --resume required: none of 2 blocks can be reused: no block was ever finished in this output"
    ]
    ran = command("run", job, "--resume", "sometimes")
    assert (ran.code, ran.out) == (2, "")
    assert "'sometimes'" in ran.errors[0]
    assert command("run", job, "--resume", "never").code == 0
    assert "reuse" in command("plan", job).out
    ran = command("run", job, "--resume", "never")
    assert ran.code == 2
    assert "is published already" in ran.errors[0]
    assert "block 1 done (2/2)" in command("run", job, "--set", "spec.recipe.weights.bits=3").err
    ran = command("run", job, "--set", "spec.recipe.weights.bits=2")
    assert "note: not reused: blocks 0 to 1: recipe.weights: not the same" in ran.err
    plan = command("plan", job, "--set", "spec.recipe.weights.bits=2").out
    assert (
        "reuse            blocks 0 to 1: finished before, and reused where weights and calibration tokens are" in plan
    )


def test_facts_for_people(command: Command, published: tuple[Path, str], tmp_path: Path) -> None:
    manifest, uri = published
    plan = command("plan", manifest)
    assert plan.code == 0
    assert "quantized        61,440 weights in 2 blocks" in plan.out
    assert re.search(r"artifact +\S+ KiB, \d\.\d\d times smaller than the model; \d\.\d{3} bits per", plan.out)
    assert "fits             yes" in plan.out
    assert re.search(r"arithmetic +\S+ TFLOP \(forward \d+%, statistics \d+%, solve \d+%\)", plan.out)
    assert command("verify", uri).out.startswith("tiny is whole\n")
    pulled = command("pull", uri, tmp_path / "pulled")
    assert pulled.out.splitlines()[-1] == str(tmp_path / "pulled")
    assert "model.safetensors.index.json" in pulled.err
    assert files_of(tmp_path / "pulled") == files_of(local_path(uri))
    evaluated = command("eval", uri, "--windows", 2)
    assert [line.split()[0] for line in evaluated.out.splitlines()[1:]] == ["original", "quantized", "compensated"]


def test_with_a_residual_store_both_figures_and_all_bits_are_told(command: Command, job: Path) -> None:
    recipe = "spec.recipe={weights: {bits: 3}, residual: {channels_per_chunk: 100}}"
    ran = command("run", job, "--set", recipe)
    told = dict(re.split("  +", line, maxsplit=1) for line in ran.err.splitlines() if "  " in line)
    document = verify(ran.out.strip())
    assert document.compensated is not None
    assert document.compensated_prefill is not None
    assert told["compensated, decoding"].startswith(f"perplexity {document.compensated.perplexity:.4f}")
    assert told["compensated, prefill"].startswith(f"perplexity {document.compensated_prefill.perplexity:.4f}")
    total, *parts = [float(number) for number in re.findall(r"[0-9]+\.[0-9]+", told["bits per weight"])]
    assert sum(parts) == pytest.approx(total, abs=0.0005 * len(parts))
    assert f"{document.bits_per_weight.residual:.3f} residual store" in told["bits per weight"]
    evaluated = command("eval", ran.out.strip(), "--windows", 2)
    assert "compensated, prefill" in evaluated.out


def test_an_artifact_may_be_named_by_a_path(
    command: Command, published: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the shell completes it, and as the latest of a name."""
    _, uri = published
    monkeypatch.chdir(local_path(uri).parent.parent)
    assert command("verify", "tiny").code == 0
    assert command("verify", f"./tiny/{uri.rsplit('/', 1)[1]}").code == 0


@pytest.mark.parametrize("arguments", [["verify", "X"], ["pull", "X", "there"], ["eval", "X"]])
def test_an_artifact_that_is_not_there(command: Command, tmp_path: Path, arguments: list[str]) -> None:
    ran = command(*[str(tmp_path / part) if part in ("X", "there") else part for part in arguments])
    assert ran.code == 2
    assert len(ran.errors) == 1
    assert "no artifact.json and no latest.json" in ran.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_is_exit_4_and_lists_every_file(
    command: Command, published: tuple[Path, str], tmp_path: Path
) -> None:
    _, uri = published
    shutil.copytree(local_path(uri), tmp_path / "copy")
    (tmp_path / "copy" / "ledger.json").write_text("{}")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    ran = command("verify", tmp_path / "copy")
    assert ran.code == 4
    assert any("ledger.json: 2 bytes" in line for line in ran.errors)
    assert any("tokenizer.json: missing" in line for line in ran.errors)


# -- options --------------------------------------------------------------------------------------------------------


def test_workers_and_gpus_are_what_the_manifest_asks_for(
    command: Command, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PoolSize] = []

    def pool(size: PoolSize, **_: object) -> LocalPool:
        asked.append(size)
        return LocalPool(size.workers)

    monkeypatch.setattr("counterweight.pipeline.run.RayPool", pool)
    resources = "spec.resources={workers: 3, gpus_per_worker: 1, cpus_per_worker: 2}"
    ran = command("run", job, "--set", resources)
    assert ran.code == 0
    assert asked == [PoolSize(workers=3, cpus=2, gpus=1.0)]
    assert "note: no cuda device on the workers' machines: they compute on the cpu" in ran.err
    (report,) = job.parent.glob("out/tiny/*/report/report.json")
    assert {task["timing"]["device"] for task in json.loads(report.read_text())["tasks"]} == {"cpu"}


@pytest.mark.parametrize("by_option", [True, False])
def test_the_address_reaches_ray(command: Command, job: Path, monkeypatch: pytest.MonkeyPatch, by_option: bool) -> None:
    addresses: list[str | None] = []

    def connect(address: str | None, size: PoolSize) -> nullcontext[None]:
        addresses.append(address)
        return nullcontext()

    monkeypatch.setattr("counterweight.pipeline.run.cluster", connect)
    # More workers than fit here: they run elsewhere. One stands for all of them.
    monkeypatch.setattr("counterweight.pipeline.run.RayPool", lambda size, **_: LocalPool(1))
    address = "ray://10.0.0.1:10001"
    monkeypatch.setenv("RAY_ADDRESS", "local" if by_option else address)
    option = ["--address", address] if by_option else []
    ran = command("run", job, *option, "--set", "spec.resources.workers=9999")
    assert ran.code == 0, ran.err
    assert addresses == [address]


# -- prune ----------------------------------------------------------------------------------------------------------


def old_blob(output: Path, days: float = 8) -> Path:
    """A blob that no record names."""
    path = output / "_work" / "blobs" / ("a" * 64)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(2048))
    written = time.time() - days * 86400
    os.utime(path, (written, written))
    return path


def test_prune_says_what_it_removed_a_line_a_kind_and_the_total_last(command: Command, tmp_path: Path) -> None:
    blob = old_blob(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    dry = command("prune", tmp_path, "--dry-run")
    assert blob.exists()
    assert dry.code == 0
    assert dry.out.startswith(f"would be removed from {tmp_path.as_uri()}\n")
    ran = command("prune", tmp_path)
    assert not blob.exists()
    assert ran.code == 0
    assert ran.out.splitlines()[1:] == dry.out.splitlines()[1:]
    lines = [line.split(maxsplit=1) for line in ran.out.splitlines()[1:]]
    assert ["blobs", "1 objects, 2.00 KiB"] in lines
    assert ["records", "0 objects, 0 B"] in lines
    assert lines[-1] == ["total", "1 objects, 2.00 KiB"]
    assert ran.err == dry.err == "left alone, not of our making: notes.txt\n"


def test_prune_prints_facts(command: Command, tmp_path: Path) -> None:
    old_blob(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    facts = json.loads(command("prune", tmp_path.as_uri(), "--json").out)
    assert facts["removed"]["blobs"] == facts["total"] == {"objects": 1, "bytes": 2048}
    assert facts["left_alone"] == ["notes.txt"]
    assert (facts["uri"], facts["older_than_seconds"], facts["dry_run"]) == (tmp_path.as_uri(), 7 * 86400, False)


def test_prune_names_some_unknown_objects_and_counts_the_rest(command: Command, tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text("x")
    assert command("prune", tmp_path).err.splitlines()[-2:] == [
        "left alone, not of our making: 19.txt",
        "left alone, not of our making: 5 more (all with --json)",
    ]


@pytest.mark.parametrize(
    ("given", "goes"), [((), False), (("--older-than", "5d"), True), (("--older-than", "0"), True)]
)
def test_prune_goes_by_age(command: Command, tmp_path: Path, given: tuple[str, ...], goes: bool) -> None:
    blob = old_blob(tmp_path, days=6)
    assert command("prune", tmp_path, *given).code == 0
    assert blob.exists() != goes


def test_the_age_of_prune_is_that_of_unfinished_writes() -> None:
    assert duration(inspect.signature(prune).parameters["older_than"].default, "") == STALE


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--older-than", "7"], "--older-than: '7': expected a number and s, m, h, d or w"),
        (["--older-than", "-1d"], "--older-than: '-1d'"),
        (["gs://bucket/x"], "gs://bucket/x"),
        (["hf:a/b"], "hf:a/b"),
        (["nowhere"], "nowhere: no such directory"),
    ],
)
def test_a_wrong_prune_is_exit_2(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    blob = old_blob(tmp_path)
    ran = command("prune", *(["."] if arguments[0] == "--older-than" else []), *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.errors) == 1
    assert expected in ran.errors[0]
    assert blob.exists()


def test_a_prune_of_a_damaged_or_failing_store_is_exit_4_in_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = old_blob(tmp_path)
    record = tmp_path / "_work" / "commits" / "block" / "key.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    ran = command("prune", tmp_path)
    assert (ran.code, ran.out, len(ran.errors)) == (4, "", 1)
    assert record.as_uri() in ran.errors[0]
    assert blob.exists()
    record.unlink()

    def fails(store: FileStore, key: str) -> None:
        raise StorageError(f"delete {key}: 503 SlowDown")

    monkeypatch.setattr(FileStore, "delete", fails)
    ran = command("prune", tmp_path)
    assert (ran.code, ran.out, len(ran.errors)) == (4, "", 1)
    assert "503 SlowDown" in ran.errors[0]
    assert "Traceback" not in ran.err


def test_help_comes_at_once() -> None:
    """Well under half a second: nothing heavy is imported. The CPU time is compared, because the machine may be busy."""

    def ask() -> None:
        ran = subprocess.run(
            [sys.executable, "-m", "counterweight.pipeline.cli", "--help"], capture_output=True, text=True, check=True
        )
        assert "pull" in ran.stdout

    assert cpu_seconds(ask, below=0.5, clock=of_children) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from counterweight.pipeline.cli import main; main(['--help']); "
        "print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ran.stdout.splitlines()[-1]
    for name in ("torch", "ray", "transformers", "pydantic", "boto3", "safetensors", "numpy"):
        assert f"'{name}'" not in loaded


def test_a_wrong_manifest_is_refused_before_anything_slow_is_imported(job: Path) -> None:
    code = (
        "import sys; from counterweight.pipeline.cli import main; code = main(sys.argv[1:]); "
        "print(code, 'transformers' in sys.modules, 'ray' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "run", str(job), "--set", "spec.recipe.weights.bits=9"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["2", "False", "False"], ran.stderr
