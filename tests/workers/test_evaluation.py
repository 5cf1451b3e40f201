"""Validation against transformers and against formulas in float64; and how it is spread over workers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from counterweight import load_model
from counterweight.pipeline.artifact import REPORT, REPORT_PAGE
from counterweight.workers.errors import CheckpointError, CounterweightError, IntegrityError
from counterweight.workers.ledger import LEDGER
from counterweight.workers.metrics import METRICS
from counterweight.workers.storage import sha256_hex
from counterweight.workers.tasks.evaluate import (
    BASELINE,
    COMPENSATED,
    PREFILL,
    QUANTIZED,
    Evaluate,
    EvaluateRecord,
    WindowMetrics,
)
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.worker import Worker
from tests.inprocess import local, run_job
from tests.models import checkpoint, token_ids
from tests.workers.specs import Site

RTN = {"bits": 3, "group_size": 32, "quantizer": {"kind": "rtn"}}
RECIPES: dict[str, dict[str, Any]] = {
    "compensated": {"weights": RTN, "compensation": {"kind": "svd", "rank": {"count": 8}}},
    "plain": {"weights": RTN},
    "store": {"weights": RTN, "residual": {"channels_per_chunk": 100}},
}
WINDOWS, LENGTH = 7, 24


@dataclass(frozen=True)
class Made:
    """A source, and the artifacts made of it by recipe."""

    source: Path
    artifacts: dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("evaluation")
    checkpoint("llama", root / "model", torch.bfloat16)
    artifacts = {name: local(run_job(root / "model", root / name, recipe)) for name, recipe in RECIPES.items()}
    return Made(root / "model", artifacts)


@pytest.fixture
def worker() -> Iterator[Worker]:
    opened = Worker("cpu", 2)
    yield opened
    opened.close()


def evaluate_spec(made: Made, work: Path, ids: Tensor, *, artifact: str = "compensated") -> Evaluate:
    site = Site(source=made.source, work=work)
    root = made.artifacts[artifact]
    return Evaluate(
        setting=site.setting,
        tensors=site.digests,
        artifact=root.as_uri(),
        ledger=sha256_hex((root / LEDGER).read_bytes()),
        tokens=site.put_tokens(ids),
        start=0,
        stop=len(ids),
    )


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.double(), -1)


def expected_metrics(reference: Tensor, own: Tensor, ids: Tensor) -> list[WindowMetrics]:
    """In float64, from log-probabilities [windows, length, vocabulary]."""
    nll = -own[:, :-1].gather(2, ids[:, 1:, None])[..., 0].mean(1)
    divergence = (reference.exp() * (reference - own)).sum(-1)
    kl = divergence.mean(1)
    kl_p99 = torch.tensor(numpy.quantile(divergence.numpy(), 0.99, axis=1))
    agreement = (own.argmax(-1) == reference.argmax(-1)).double().mean(1)
    return [
        {"perplexity": float(n), "kl": max(float(k), 0.0), "kl_p99": float(high), "top1_agreement": float(a)}
        for n, k, high, a in zip(nll, kl, kl_p99, agreement, strict=True)
    ]


def assert_close(found: Sequence[WindowMetrics], expected: Sequence[WindowMetrics]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {metric.name for metric in METRICS if not metric.sparse}
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-7)
        assert one["kl_p99"] == pytest.approx(other["kl_p99"], rel=1e-4, abs=1e-6)
        assert one["top1_agreement"] == pytest.approx(other["top1_agreement"])


@pytest.fixture(scope="module")
def found(made: Made, tmp_path_factory: pytest.TempPathFactory) -> EvaluateRecord:
    worker = Worker("cpu", 1)
    return worker.run(evaluate_spec(made, tmp_path_factory.mktemp("work"), token_ids(WINDOWS, LENGTH)))


def test_the_baseline_is_what_transformers_measures(made: Made, found: EvaluateRecord) -> None:
    ids = token_ids(WINDOWS, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(made.source, dtype=torch.float32).eval()
    with torch.no_grad():
        perplexity = exp(sum(float(model(row[None], labels=row[None]).loss) for row in ids) / WINDOWS)
    ours = exp(sum(window["perplexity"] for window in found.windows[BASELINE]) / WINDOWS)
    assert ours == pytest.approx(perplexity, rel=1e-5)
    reference = log_probabilities(model, ids)
    assert_close(found.windows[BASELINE], expected_metrics(reference, reference, ids))


@pytest.mark.parametrize("variant", [QUANTIZED, COMPENSATED])
def test_each_variant_is_measured_as_it_is_loaded(made: Made, found: EvaluateRecord, variant: str) -> None:
    ids = token_ids(WINDOWS, LENGTH)
    reference = log_probabilities(AutoModelForCausalLM.from_pretrained(made.source, dtype=torch.float32).eval(), ids)
    uri = made.artifacts["compensated"].as_uri()
    own = load_model(uri, dtype=torch.float32, compensated=variant == COMPENSATED)
    assert_close(found.windows[variant], expected_metrics(reference, log_probabilities(own, ids), ids))


def test_the_baseline_is_no_distance_from_itself(found: EvaluateRecord) -> None:
    assert {(window["kl"], window["top1_agreement"]) for window in found.windows[BASELINE]} == {(0.0, 1.0)}


def test_divergence_is_never_negative_and_compensation_lowers_it(found: EvaluateRecord) -> None:
    means = {}
    for variant, windows in found.windows.items():
        assert all(window["kl"] >= 0 and 0 <= window["top1_agreement"] <= 1 for window in windows)
        means[variant] = sum(window["kl"] for window in windows)
    assert 0 < means[COMPENSATED] < means[QUANTIZED]


def parts_of(worker: Worker, spec: Evaluate, bounds: Sequence[int]) -> dict[str, list[WindowMetrics]]:
    """What several specs find, put together."""
    merged: dict[str, list[WindowMetrics]] = {}
    for start, stop in pairwise([spec.start, *bounds, spec.stop]):
        for variant, windows in worker.run(spec.model_copy(update={"start": start, "stop": stop})).windows.items():
            merged.setdefault(variant, []).extend(windows)
    return merged


def test_a_window_does_not_depend_on_its_share(made: Made, worker: Worker, tmp_path: Path) -> None:
    batch = shard_sequences(1024)
    spec = evaluate_spec(made, tmp_path, token_ids(2 * batch + 1, 1024))
    whole = worker.run(spec).windows
    assert parts_of(worker, spec, [batch, 2 * batch]) == {variant: list(windows) for variant, windows in whole.items()}
    for variant, windows in parts_of(
        worker, spec, [batch - 1]
    ).items():  # a batch is cut: up to the last bits of float32
        assert_close(windows, whole[variant])


def test_the_number_of_workers_changes_no_figure(tmp_path: Path) -> None:
    """Experts see a handful of tokens, and the bits of so small a product depend on how many: batches stay whole."""
    checkpoint("mixtral", tmp_path / "model", torch.bfloat16, num_local_experts=8)
    documents = []
    for workers in (1, 10):
        validation = {"windows": 20, "sequence_length": 16}
        published = run_job(
            tmp_path / "model", tmp_path / str(workers), RECIPES["plain"], validation=validation, workers=workers
        )
        documents.append(published.document)
    one, ten = documents
    assert one.id == ten.id
    assert (one.baseline, one.quantized) == (ten.baseline, ten.quantized)
    reports = {REPORT, REPORT_PAGE}
    assert {path: entry for path, entry in one.files.items() if path not in reports} == {
        path: entry for path, entry in ten.files.items() if path not in reports
    }


def test_threads_change_no_bit(made: Made, worker: Worker, tmp_path: Path) -> None:
    ids = token_ids(shard_sequences(1024) + 2, 1024)
    alone = Worker("cpu", 1).run(evaluate_spec(made, tmp_path / "alone", ids))
    assert worker.run(evaluate_spec(made, tmp_path / "two", ids)).windows == alone.windows


def test_what_is_one_model_is_measured_once(made: Made, worker: Worker, tmp_path: Path) -> None:
    """Without compensation, the compensated model; with a residual store and no branch, the model in prefill."""
    plain = worker.run(evaluate_spec(made, tmp_path, token_ids(2, LENGTH), artifact="plain")).windows
    assert set(plain) == {BASELINE, QUANTIZED, COMPENSATED}
    assert plain[COMPENSATED] == plain[QUANTIZED]
    store = worker.run(evaluate_spec(made, tmp_path, token_ids(2, LENGTH), artifact="store")).windows
    assert set(store) == {BASELINE, QUANTIZED, COMPENSATED, PREFILL}
    assert store[PREFILL] == store[QUANTIZED]
    assert store[COMPENSATED] != store[QUANTIZED]


def test_a_finished_evaluation_is_looked_up(made: Made, worker: Worker, tmp_path: Path) -> None:
    spec = evaluate_spec(made, tmp_path, token_ids(2, LENGTH))
    done = worker.run(spec)
    elsewhere = spec.model_copy(update={"artifact": (tmp_path / "nothing here").as_uri()})
    assert worker.run(elsewhere) == done


def test_another_ledger_than_the_keys_is_refused(made: Made, worker: Worker, tmp_path: Path) -> None:
    """Otherwise a record would be found under the key of an artifact that it was not measured on."""
    spec = evaluate_spec(made, tmp_path, token_ids(2, LENGTH))
    with pytest.raises(IntegrityError, match=LEDGER):
        worker.run(spec.model_copy(update={"artifact": made.artifacts["plain"].as_uri()}))


@pytest.mark.parametrize(("written", "kind"), [(False, CheckpointError), (True, IntegrityError)])
def test_an_artifact_that_the_job_wrote_is_damaged_and_not_wrong(
    made: Made, worker: Worker, tmp_path: Path, written: bool, kind: type[CounterweightError]
) -> None:
    shutil.copytree(made.artifacts["plain"], tmp_path / "artifact")
    (tmp_path / "artifact" / "config.json").write_text("{")
    spec = evaluate_spec(made, tmp_path, token_ids(2, LENGTH), artifact="plain")
    changed = {"artifact": (tmp_path / "artifact").as_uri(), "written": written}
    with pytest.raises(CounterweightError, match=r"config\.json") as caught:
        worker.run(spec.model_copy(update=changed))
    assert type(caught.value) is kind


def test_a_tensor_of_an_artifact_that_rotted_is_damage(made: Made, worker: Worker, tmp_path: Path) -> None:
    shutil.copytree(made.artifacts["plain"], tmp_path / "artifact")
    path = next((tmp_path / "artifact").glob("model-00001-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    spec = evaluate_spec(made, tmp_path, token_ids(2, LENGTH), artifact="plain")
    with pytest.raises(IntegrityError, match=r"sha256 .*: not the bytes that were written"):
        worker.run(spec.model_copy(update={"artifact": (tmp_path / "artifact").as_uri()}))


def test_what_is_measured_determines_the_key(made: Made, tmp_path: Path) -> None:
    spec = evaluate_spec(made, tmp_path, token_ids(2, LENGTH))
    setting = spec.setting
    changed = [
        spec,
        spec.model_copy(update={"tokens": evaluate_spec(made, tmp_path, token_ids(2, LENGTH, seed=1)).tokens}),
        spec.model_copy(update={"stop": 1}),
        spec.model_copy(update={"start": 1}),
        spec.model_copy(update={"ledger": "0" * 64}),
        spec.model_copy(update={"tensors": {**spec.tensors, "model.norm.weight": "0" * 64}}),
    ]
    assert len({one.key() for one in changed}) == len(changed)
    # It is always measured in float32.
    bfloat16 = setting.model_copy(update={"compute_dtype": "bfloat16"})
    assert spec.model_copy(update={"setting": bfloat16}).key() == spec.key()
