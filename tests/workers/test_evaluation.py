"""Validation against transformers and against formulas in float64; and how it is spread over workers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from counterweight import load_model
from counterweight.pipeline.artifact import REPORT, REPORT_PAGE
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.dtypes import ModelDtype
from counterweight.workers.errors import CheckpointError, CounterweightError, IntegrityError, RequestError
from counterweight.workers.ledger import LEDGER
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.metrics import METRICS
from counterweight.workers.storage import sha256_hex
from counterweight.workers.storage.file import FileStore
from counterweight.workers.storage.traffic import METER
from counterweight.workers.tasks import evaluate
from counterweight.workers.tasks.evaluate import (
    BASELINE,
    COMPENSATED,
    HEAD_TOKENS,
    PREFILL,
    QUANTIZED,
    Evaluate,
    EvaluateRecord,
    WindowMetrics,
)
from counterweight.workers.tasks.original import Original
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


def original_spec(made: Made, work: Path, ids: Tensor, dtype: ModelDtype = "float32") -> Original:
    site = Site(source=made.source, work=work)
    return Original(
        setting=site.setting,
        tensors=site.digests,
        tokens=site.put_tokens(ids),
        start=0,
        stop=len(ids),
        dtype=dtype,
    )


def judged(worker: Worker, made: Made, original: Original, *, artifact: str = "compensated") -> Evaluate:
    """What is to be run when the original has."""
    root = made.artifacts[artifact]
    return Evaluate(
        original=original,
        found=worker.run(original),
        artifact=root.as_uri(),
        ledger=sha256_hex((root / LEDGER).read_bytes()),
    )


def evaluate_spec(worker: Worker, made: Made, work: Path, ids: Tensor, *, artifact: str = "compensated") -> Evaluate:
    return judged(worker, made, original_spec(made, work, ids), artifact=artifact)


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.double(), -1)


def expected_metrics(reference: Tensor, own: Tensor, ids: Tensor) -> list[WindowMetrics]:
    """In float64, from log-probabilities [windows, length, vocabulary]."""
    nll = -own[:, :-1].gather(2, ids[:, 1:, None])[..., 0].mean(1)
    divergence = (reference.exp() * (reference - own)).sum(-1)
    kl = divergence.mean(1)
    kl_p99 = torch.tensor(numpy.quantile(divergence.numpy(), 0.99, axis=1))
    late = divergence[:, -(ids.shape[1] // 4) :].mean(1)
    agreement = (own.argmax(-1) == reference.argmax(-1)).double().mean(1)
    return [
        {
            "perplexity": float(n),
            "kl": max(float(k), 0.0),
            "kl_p99": float(high),
            "kl_last_quarter": max(float(last), 0.0),
            "top1_agreement": float(a),
        }
        for n, k, high, last, a in zip(nll, kl, kl_p99, late, agreement, strict=True)
    ]


def assert_close(found: Sequence[WindowMetrics], expected: Sequence[WindowMetrics]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {metric.name for metric in METRICS if not metric.sparse}
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-7)
        assert one["kl_p99"] == pytest.approx(other["kl_p99"], rel=1e-4, abs=1e-6)
        assert one["kl_last_quarter"] == pytest.approx(other["kl_last_quarter"], rel=1e-4, abs=1e-6)
        assert one["top1_agreement"] == pytest.approx(other["top1_agreement"])


@pytest.fixture(scope="module")
def found(made: Made, tmp_path_factory: pytest.TempPathFactory) -> EvaluateRecord:
    worker = Worker("cpu", 1)
    return worker.run(evaluate_spec(worker, made, tmp_path_factory.mktemp("work"), token_ids(WINDOWS, LENGTH)))


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
    own_log_probabilities = log_probabilities(own, ids)
    assert_close(found.windows[variant], expected_metrics(reference, own_log_probabilities, ids))
    divergence = (reference.exp() * (reference - own_log_probabilities)).sum(-1)  # [windows, LENGTH]
    parts = [divergence[:, start:stop].mean(1) for start, stop in pairwise([0, 1, 2, 4, 8, 16, LENGTH])]
    for along, expected in zip(found.profiles[variant], torch.stack(parts, 1), strict=True):
        assert along["kl_by_position"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_a_window_whose_logits_are_in_memory_part_by_part(made: Made, worker: Worker, tmp_path: Path) -> None:
    ids = token_ids(2, HEAD_TOKENS + 44)
    windows = worker.run(evaluate_spec(worker, made, tmp_path, ids)).windows
    reference = log_probabilities(AutoModelForCausalLM.from_pretrained(made.source, dtype=torch.float32).eval(), ids)
    own = load_model(made.artifacts["compensated"].as_uri(), dtype=torch.float32)
    assert_close(windows[BASELINE], expected_metrics(reference, reference, ids))
    assert_close(windows[COMPENSATED], expected_metrics(reference, log_probabilities(own, ids), ids))


def test_the_baseline_is_no_distance_from_itself(found: EvaluateRecord) -> None:
    assert {(window["kl"], window["top1_agreement"]) for window in found.windows[BASELINE]} == {(0.0, 1.0)}


def test_divergence_is_never_negative_and_compensation_lowers_it(found: EvaluateRecord) -> None:
    means = {}
    for variant, windows in found.windows.items():
        assert all(window["kl"] >= 0 and 0 <= window["top1_agreement"] <= 1 for window in windows)
        means[variant] = sum(window["kl"] for window in windows)
    assert 0 < means[COMPENSATED] < means[QUANTIZED]


def parts_of(worker: Worker, made: Made, whole: Original, bounds: Sequence[int]) -> dict[str, list[WindowMetrics]]:
    """What several workers find, put together."""
    merged: dict[str, list[WindowMetrics]] = {}
    for start, stop in pairwise([whole.start, *bounds, whole.stop]):
        spec = judged(worker, made, whole.model_copy(update={"start": start, "stop": stop}))
        for variant, windows in worker.run(spec).windows.items():
            merged.setdefault(variant, []).extend(windows)
    return merged


def test_a_window_does_not_depend_on_its_share(made: Made, worker: Worker, tmp_path: Path) -> None:
    batch = shard_sequences(1024)
    original = original_spec(made, tmp_path, token_ids(2 * batch + 1, 1024))
    whole = worker.run(judged(worker, made, original)).windows
    parts = parts_of(worker, made, original, [batch, 2 * batch])
    assert parts == {variant: list(windows) for variant, windows in whole.items()}
    # A batch is cut: up to the last bits of float32.
    for variant, windows in parts_of(worker, made, original, [batch - 1]).items():
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
    one = Worker("cpu", 1)
    alone = one.run(evaluate_spec(one, made, tmp_path / "alone", ids))
    assert worker.run(evaluate_spec(worker, made, tmp_path / "two", ids)).windows == alone.windows


def test_what_is_one_model_is_measured_once(made: Made, worker: Worker, tmp_path: Path) -> None:
    """Without compensation, the compensated model; with a residual store and no branch, the model in prefill."""
    plain = worker.run(evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH), artifact="plain")).windows
    assert set(plain) == {BASELINE, QUANTIZED, COMPENSATED}
    assert plain[COMPENSATED] == plain[QUANTIZED]
    store = worker.run(evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH), artifact="store")).windows
    assert set(store) == {BASELINE, QUANTIZED, COMPENSATED, PREFILL}
    assert store[PREFILL] == store[QUANTIZED]
    assert store[COMPENSATED] != store[QUANTIZED]


def test_workers_of_one_machine_read_an_artifact_once(
    made: Made, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory stands for a remote store. What another worker has read of it, and nothing else, is read no second time."""
    root = made.artifacts["compensated"]

    def remote(_: str) -> FileStore:
        store = FileStore(root)
        store.uri = "s3://bucket/artifact"
        return store

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(evaluate, "open_store", remote)
    apart, shared = (
        evaluate_spec(worker, made, tmp_path / str(shared), token_ids(2, LENGTH)).model_copy(update={"shared": shared})
        for shared in (False, True)
    )
    other = CompressedModel.open(remote(""))
    with other.shared(shared.ledger):
        before = METER.now.read
        for index in range(other.builder.blocks):
            other.block(index, torch.device("cpu"), torch.float32)
        blocks = METER.now.read - before
        records = worker.run(apart)
        both = METER.now.read - before
        assert worker.run(shared).windows == records.windows
        assert METER.now.read - before - both == both - 2 * blocks
    assert blocks > 0


def test_a_finished_evaluation_is_looked_up(made: Made, worker: Worker, tmp_path: Path) -> None:
    spec = evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH))
    done = worker.run(spec)
    elsewhere = spec.model_copy(update={"artifact": (tmp_path / "nothing here").as_uri()})
    assert worker.run(elsewhere) == done


def test_another_ledger_than_the_keys_is_refused(made: Made, worker: Worker, tmp_path: Path) -> None:
    """Otherwise a record would be found under the key of an artifact that it was not measured on."""
    spec = evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH))
    with pytest.raises(IntegrityError, match=LEDGER):
        worker.run(spec.model_copy(update={"artifact": made.artifacts["plain"].as_uri()}))


@pytest.mark.parametrize(("written", "kind"), [(False, CheckpointError), (True, IntegrityError)])
def test_an_artifact_that_the_job_wrote_is_damaged_and_not_wrong(
    made: Made, worker: Worker, tmp_path: Path, written: bool, kind: type[CounterweightError]
) -> None:
    shutil.copytree(made.artifacts["plain"], tmp_path / "artifact")
    (tmp_path / "artifact" / "config.json").write_text("{")
    spec = evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH), artifact="plain")
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
    spec = evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH), artifact="plain")
    with pytest.raises(IntegrityError, match=r"sha256 .*: not the bytes that were written"):
        worker.run(spec.model_copy(update={"artifact": (tmp_path / "artifact").as_uri()}))


def test_what_is_measured_determines_the_key(made: Made, worker: Worker, tmp_path: Path) -> None:
    spec = evaluate_spec(worker, made, tmp_path, token_ids(2, LENGTH))
    original = spec.original
    other = original_spec(made, tmp_path, token_ids(2, LENGTH, seed=1))
    changes: list[dict[str, object]] = [
        {},
        {"tokens": other.tokens},
        {"stop": 1},
        {"start": 1},
        {"dtype": "bfloat16"},
        {"tensors": {**original.tensors, "model.norm.weight": "0" * 64}},
    ]
    changed = [spec.model_copy(update={"original": original.model_copy(update=change)}) for change in changes]
    changed.append(spec.model_copy(update={"ledger": "0" * 64}))
    assert len({one.key() for one in changed}) == len(changed)
    # Neither in the calibration's dtype nor in the recipe's coordinates.
    setting = original.setting.model_copy(update={"compute_dtype": "bfloat16", "rotation": Rotation()})
    assert original.model_copy(update={"setting": setting}).key() == original.key()


def test_the_original_runs_once_for_all_recipes(made: Made, worker: Worker, tmp_path: Path) -> None:
    """Its key knows nothing of an artifact; without its weights at hand the second recipe finds what the first has made."""
    original = original_spec(made, tmp_path, token_ids(2, LENGTH))
    first = worker.run(original)
    gone = original.model_copy(update={"setting": original.setting.model_copy(update={"source": "file:///nothing"})})
    assert worker.run(gone) == first
    assert judged(worker, made, original, artifact="plain").found == first


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_a_model_is_judged_in_the_dtype_that_is_asked_for(
    made: Made, worker: Worker, found: EvaluateRecord, tmp_path: Path, dtype: ModelDtype, near: float
) -> None:
    """As transformers has it in that dtype, and as it is in float32, to what the dtype resolves."""
    ids = token_ids(WINDOWS, LENGTH)
    spec = judged(worker, made, original_spec(made, tmp_path, ids, dtype))
    windows = worker.run(spec).windows
    model = AutoModelForCausalLM.from_pretrained(made.source, dtype=getattr(torch, dtype)).eval()
    reference = log_probabilities(model, ids)
    for one, other in zip(windows[BASELINE], expected_metrics(reference, reference, ids), strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=near)
    for variant, exact in found.windows.items():
        for one, other in zip(windows[variant], exact, strict=True):
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=near)
            assert one["perplexity"] != other["perplexity"]


def test_weights_beyond_float16_do_not_pass_in_float16(made: Made, worker: Worker, tmp_path: Path) -> None:
    """What a server in float16 would answer with NaN; in float32 it is a number."""
    source = tmp_path / "large"
    shutil.copytree(made.source, source)
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, path)
    large = Made(source, made.artifacts)
    for dtype in ("float32", "float16"):
        spec = judged(worker, large, original_spec(large, tmp_path / dtype, token_ids(2, LENGTH), dtype))
        if dtype == "float32":
            worker.run(spec)
        else:
            with pytest.raises(RequestError, match="expected finite logits"):
                worker.run(spec)


def test_routers_are_compared_across_tasks(worker: Worker, tmp_path: Path) -> None:
    """What the original's routers chose is read back from the store: agreement beside transformers' own choices."""
    checkpoint("mixtral", tmp_path / "model", torch.bfloat16, num_local_experts=9)
    artifact = local(run_job(tmp_path / "model", tmp_path / "plain", RECIPES["plain"]))
    made, ids = Made(tmp_path / "model", {"plain": artifact}), token_ids(3, LENGTH)
    record = worker.run(evaluate_spec(worker, made, tmp_path / "work", ids, artifact="plain"))

    def chosen(model: Any) -> list[Tensor]:
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        return [each.topk(2).indices.sort().values.unflatten(0, ids.shape) for each in logits]

    original = chosen(AutoModelForCausalLM.from_pretrained(made.source, dtype=torch.float32).eval())
    own = chosen(load_model(artifact.as_uri(), dtype=torch.float32))
    for block, (before, after) in enumerate(zip(original, own, strict=True)):
        shares = (before == after).all(-1).double().mean(-1)
        assert record.routers[QUANTIZED][block] == pytest.approx(shares.tolist())
        assert record.routers[BASELINE][block] == (1.0,) * len(ids)
    assert min(min(found) for found in record.routers[QUANTIZED].values()) < 1
