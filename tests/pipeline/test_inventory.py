from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterweight.pipeline import inventory as module
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.inventory import inventory
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.policies import RetryPolicy
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.errors import CheckpointError
from counterweight.workers.tasks.inspect import Inspect
from tests.models import build, read_tensors, save
from tests.pipeline.tiny import LocalPool


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    root = tmp_path_factory.mktemp("model")
    return save(build("llama"), root, torch.bfloat16, shard_size="40KB")


def run(source: ModelSource, pool: LocalPool) -> dict[str, str]:
    try:
        return inventory(source, Dispatcher(pool, RetryPolicy(), lambda _: None))
    finally:
        pool.close()


def test_the_digests_are_the_tensors(directory: Path) -> None:
    assert len(list(directory.glob("*.safetensors"))) > 2
    found = run(open_model(directory.as_uri()), LocalPool(2))
    assert found == {name: tensor_digest(tensor) for name, tensor in read_tensors(directory).items()}


def test_the_work_is_spread_in_batches_that_lie_together(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(open_model(directory.as_uri()), LocalPool(1))
    monkeypatch.setattr(module, "TASK_BYTES", 30_000)
    source, pool = open_model(directory.as_uri()), LocalPool(2)
    assert run(source, pool) == whole
    batches = [task.names for _, task in pool.calls if isinstance(task, Inspect)]
    assert len(batches) > 3
    entry = source.checkpoint.entry
    names = [name for batch in batches for name in batch]
    assert names == sorted(source.tensors, key=lambda name: (entry(name).file, entry(name).start))
    for batch in batches:
        assert len(batch) == 1 or sum(entry(name).length for name in batch) <= 30_000


def test_every_tensor_that_is_not_finite_is_listed(tmp_path: Path, directory: Path) -> None:
    tensors = read_tensors(directory)
    for number, name in enumerate(sorted(tensors)):
        tensors[name].reshape(-1)[-1] = (float("nan"), float("inf"), float("-inf"))[number % 3]
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        run(open_model(tmp_path.as_uri()), LocalPool(1))
    lines = str(caught.value).splitlines()
    assert len(tensors) == 21
    assert len(lines) == module.SHOWN + 1
    assert lines[-1] == "expected finite weights; 21 tensors are not"
    first = sorted(tensors)[0]
    assert any(line.endswith(f"model.safetensors: {first}: holds NaN or infinity") for line in lines)
