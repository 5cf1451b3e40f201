"""A block's parameters as they are read: each expert by itself, wherever a source keeps all of them in one tensor."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch

from counterweight.workers.checkpoint import Checkpoint, TensorEntry, reader
from counterweight.workers.errors import CheckpointError
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.family import expert_of, is_expert
from counterweight.workers.models.source import read_parameters
from counterweight.workers.storage.file import FileStore
from tests.models import build, checkpoint, read_config, save_fused

FUSED = ["mixtral", "llama4_text", "gpt_oss"]


@pytest.fixture(params=FUSED)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, BlockBuilder]:
    checkpoint(request.param, tmp_path, torch.bfloat16)
    if request.param == "mixtral":
        save_fused(build("mixtral").bfloat16(), tmp_path)
    return Checkpoint.open(FileStore(tmp_path)), BlockBuilder(read_config(tmp_path))


def test_no_tensor_of_all_experts_is_ever_whole(
    source: tuple[Checkpoint, BlockBuilder], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, builder = source
    slices = builder.layout.sources(1, stored.names)
    fused = {part.source for part in slices.values() if part.expert is not None}
    digests = {part.source: stored.digest(part.source) for part in slices.values()}
    expected = {name: part.of(stored.read(part.source)) for name, part in slices.items()}
    of_one = max(stored.entry(name).length // stored.entry(name).shape[0] for name in fused)
    made: list[int] = []
    allocate = reader.allocate

    def counted(entry: TensorEntry) -> object:
        made.append(entry.dtype.itemsize * prod(entry.shape))
        return allocate(entry)

    monkeypatch.setattr(reader, "allocate", counted)
    found = read_parameters(stored, slices, digests)
    others = max(stored.entry(part.source).length for part in slices.values() if part.expert is None)
    assert max(made) <= max(of_one, others)
    assert list(found) == list(slices)
    assert all(torch.equal(found[name], expected[name]) for name in slices)
    owners: dict[int, set[int]] = {}
    for name, tensor in found.items():
        assert tensor.is_contiguous()
        if is_expert(name):
            owners.setdefault(tensor.untyped_storage().data_ptr(), set()).add(expert_of(name))
    assert all(len(own) == 1 for own in owners.values()), "an expert that is let go frees its memory"


def test_a_tensor_of_all_experts_is_verified_whole(source: tuple[Checkpoint, BlockBuilder]) -> None:
    stored, builder = source
    slices = builder.layout.sources(1, stored.names)
    digests = {part.source: stored.digest(part.source) for part in slices.values()}
    name = next(part.source for part in slices.values() if part.expert is not None)
    with pytest.raises(CheckpointError, match=r"sha256 .* expected .*: the source changed while the job ran"):
        read_parameters(stored, slices, {**digests, name: "0" * 64})
