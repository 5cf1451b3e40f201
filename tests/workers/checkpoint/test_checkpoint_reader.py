"""Opening, reading, digesting and checking checkpoints. Hostile ones: tests/attacks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from counterweight.workers.checkpoint import Checkpoint, tensor_digest
from counterweight.workers.checkpoint.dtypes import BF16
from counterweight.workers.checkpoint.ranges import MAX_READ
from counterweight.workers.errors import CheckpointError, IntegrityError, ObjectNotFoundError
from counterweight.workers.storage import open_store
from tests.patience import PATIENCE
from tests.workers.checkpoint.builders import (
    INDEX,
    RecordingStore,
    bits,
    every_dtype,
    index_of,
    open_single,
    random_tensor,
    write_checkpoint,
)

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)},
    "model-00002-of-00002.safetensors": {"c": torch.full((3,), 7.0, dtype=torch.bfloat16)},
}
TENSORS = {name: tensor for held in SHARDS.values() for name, tensor in held.items()}


@pytest.fixture
def sharded(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path, SHARDS, index=index_of(SHARDS)))


def test_names_entries_and_config(sharded: Checkpoint) -> None:
    assert sharded.names == ("a", "b", "c")
    assert sharded.config == {"model_type": "llama"}
    entry = sharded.entry("c")
    assert (entry.file, entry.shape, entry.dtype) == (
        "model-00002-of-00002.safetensors",
        (3,),
        BF16,
    )
    with pytest.raises(CheckpointError, match=r"no tensor 'zzz'"):
        sharded.entry("zzz")


def test_opens_by_uri(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a b", {"model.safetensors": {"x": torch.ones(1)}})
    assert Checkpoint.open(open_store((tmp_path / "a b").as_uri())).names == ("x",)


def test_every_dtype_is_read_exactly(tmp_path: Path) -> None:
    tensors = every_dtype()
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.empty(0, 3)
    checkpoint = open_single(tmp_path, tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert {name: bits(read) for name, read in checkpoint.read_many(tensors).items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": {"w": torch.zeros(1 << 20)}})
    store = RecordingStore(tmp_path)
    checkpoint = Checkpoint.open(store)
    entry = checkpoint.entry("w")
    assert all(start + length <= entry.start for key, start, length in store.ranges if key == entry.file)
    assert checkpoint.bytes_read == sum(length for _, _, length in store.ranges) < 1000


def test_bytes_read_counts_what_the_store_was_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHARDS, index=index_of(SHARDS))
    store = RecordingStore(tmp_path)
    checkpoint = Checkpoint.open(store)
    checkpoint.read("a")
    checkpoint.read_many(["b", "c"])
    checkpoint.inspect(["a", "c"])
    assert checkpoint.bytes_read == sum(length for _, _, length in store.ranges)


def test_neighbours_share_a_request_and_others_are_left_out(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(10)}
    write_checkpoint(tmp_path, {"model.safetensors": tensors})
    store = RecordingStore(tmp_path)
    checkpoint = Checkpoint.open(store)
    store.ranges.clear()
    read = checkpoint.read_many(["t3", "t4", "t5", "t3"])
    assert list(read) == ["t3", "t4", "t5"]
    assert store.ranges == [("model.safetensors", checkpoint.entry("t3").start, 96)]


def test_large_tensors_are_read_in_bounded_pieces(tmp_path: Path) -> None:
    large = random_tensor(torch.float32, (MAX_READ // 4 + 1000,))
    write_checkpoint(tmp_path, {"model.safetensors": {"large": large, "small": torch.ones(3)}})
    store = RecordingStore(tmp_path)
    checkpoint = Checkpoint.open(store)
    assert torch.equal(checkpoint.read("large"), large)
    assert checkpoint.digest("large") == tensor_digest(large)
    assert max(length for _, _, length in store.ranges) == MAX_READ


def test_tensors_have_memory_of_their_own(sharded: Checkpoint) -> None:
    first, second = sharded.read_many(["a", "b"]), sharded.read_many(["a", "b"])
    first["a"].zero_()
    assert torch.equal(second["a"], TENSORS["a"])
    assert torch.equal(first["b"], TENSORS["b"])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in first.values())


def test_a_pickled_checkpoint_reads_the_same(sharded: Checkpoint) -> None:
    copy = pickle.loads(pickle.dumps(sharded))
    assert copy.names == sharded.names
    assert torch.equal(copy.read("a"), TENSORS["a"])


def test_inspection_is_by_name_and_equal_to_the_digest_in_memory(sharded: Checkpoint) -> None:
    found = sharded.inspect(["c", "a", "b"])
    assert list(found) == ["c", "a", "b"]
    assert {name: digest.sha256 for name, digest in found.items()} == {
        name: tensor_digest(TENSORS[name]) for name in found
    }
    assert sharded.digest("b") == found["b"].sha256


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tensors_that_are_not_finite_are_all_named(tmp_path: Path, bad: float) -> None:
    tensors = {
        "good": torch.ones(9),
        "one": torch.ones(9, dtype=torch.bfloat16),
        "two": torch.ones(9).double(),
    }
    tensors["one"][4] = bad
    tensors["two"][8] = bad
    checkpoint = open_single(tmp_path, tensors)
    assert [digest.finite for digest in checkpoint.inspect(tensors).values()] == [True, False, False]


def test_a_recorded_digest_is_verified(sharded: Checkpoint) -> None:
    digests = {name: found.sha256 for name, found in sharded.inspect(["a", "b"]).items()}
    assert torch.equal(sharded.read("a", sha256=digests["a"]), TENSORS["a"])
    assert torch.equal(sharded.read_many(["a", "b"], sha256=digests)["b"], TENSORS["b"])
    with pytest.raises(CheckpointError, match=r"no sha256 recorded for tensor 'c'"):
        sharded.read_many(["a", "c"], sha256=digests)


def test_a_tensor_is_verified_while_others_are_read(sharded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file is given out when the digest of a tensor of the first is asked for, and not before."""
    expected = {name: sharded.digest(name) for name in TENSORS}
    store, asked = sharded._store, Event()
    read = store.read_range

    def late(key: str, start: int, length: int) -> bytes:
        assert key == next(iter(SHARDS)) or asked.wait(PATIENCE), "the digest waits for the other file"
        return read(key, start, length)

    def digest(tensor: Tensor) -> str:
        asked.set()
        return tensor_digest(tensor)

    monkeypatch.setattr(store, "read_range", late)
    monkeypatch.setattr("counterweight.workers.checkpoint.reader.tensor_digest", digest)
    assert sharded.read_many(TENSORS, sha256=expected).keys() == TENSORS.keys()


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    checkpoint = open_single(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    digests = {name: found.sha256 for name, found in checkpoint.inspect(["a", "b"]).items()}
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 0x40  # in b; the format itself has no checksum
    (tmp_path / "model.safetensors").write_bytes(data)
    assert torch.equal(checkpoint.read("a", sha256=digests["a"]), torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"'b': sha256 .*the source changed while the job ran"):
        checkpoint.read_many(["a", "b"], sha256=digests)


class _Flipper:
    """Turns one bit of each of the first `times` answers, another one each time."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0

    def __call__(self, data: bytes) -> bytes:
        self.calls += 1
        if self.calls > self.times:
            return data
        broken = bytearray(data)
        broken[0] ^= self.calls
        return bytes(broken)


def _behind(flipper: _Flipper, root: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    write_checkpoint(root, {"model.safetensors": tensors})
    store = RecordingStore(root)
    checkpoint = Checkpoint.open(store)
    store.tamper = flipper
    return checkpoint


def test_a_bit_that_turned_on_the_way_is_read_again(tmp_path: Path) -> None:
    tensor, flipper = torch.arange(4.0), _Flipper(times=1)
    checkpoint = _behind(flipper, tmp_path, {"a": tensor})
    assert torch.equal(checkpoint.read("a", sha256=tensor_digest(tensor)), tensor)
    assert flipper.calls == 2


def test_storage_that_answers_differently_each_time_is_not_the_sources_fault(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    checkpoint = _behind(_Flipper(times=9), tmp_path, {"a": tensor})
    with pytest.raises(IntegrityError, match=r"model.safetensors: tensor 'a'.*two reads gave different bytes"):
        checkpoint.read("a", sha256=tensor_digest(tensor))


def test_a_shard_that_vanished_is_a_storage_error(sharded: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ObjectNotFoundError):
        sharded.read("c")


def test_expected_tensors_are_accepted(sharded: Checkpoint) -> None:
    sharded.expect({"a": (2, 3), "b": (2,), "c": (3,)})
    sharded.expect({"a": [2, 3], "b": [2], "c": [3], "tied": (9,)}, optional=["tied"])
    sharded.expect({"a": (2, 3), "b": (2,)}, optional={"c"})


def test_every_difference_is_listed_at_once(tmp_path: Path) -> None:
    checkpoint = open_single(
        tmp_path,
        {"shape": torch.ones(2, 3), "dtype": torch.ones(2, dtype=torch.int32), "extra": torch.ones(1)},
    )
    with pytest.raises(CheckpointError) as caught:
        checkpoint.expect({"shape": (3, 2), "dtype": (2,), "missing": (4,)})
    lines = str(caught.value).splitlines()
    assert "4 problems" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "tensor 'missing': missing, expected shape [4]",
        "model.safetensors: tensor 'dtype': dtype I32, expected F64, F32, F16 or BF16",
        "model.safetensors: tensor 'extra': shape [1], expected no such tensor",
        "model.safetensors: tensor 'shape': shape [2, 3], expected [3, 2]",
    ]


def test_an_optional_tensor_that_is_there_must_have_its_shape(sharded: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"'c': shape \[3\], expected \[4\]"):
        sharded.expect({"a": (2, 3), "b": (2,), "c": (4,)}, optional=["c"])


def test_a_long_list_is_cut_and_counted(sharded: Checkpoint) -> None:
    expected = {f"missing{i}": (1,) for i in range(40)}
    with pytest.raises(CheckpointError) as caught:
        sharded.expect(expected)
    lines = str(caught.value).splitlines()
    assert "43 problems" in lines[0]
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 23 more"


def test_an_index_that_names_the_single_file_is_no_contradiction(tmp_path: Path) -> None:
    shards = {"model.safetensors": {"x": torch.ones(1)}}
    assert Checkpoint.open(write_checkpoint(tmp_path, shards, index=index_of(shards))).names == ("x",)


def test_other_files_beside_the_index_are_left_alone(tmp_path: Path) -> None:
    store = write_checkpoint(tmp_path, {**SHARDS, "consolidated.safetensors": b"not ours"}, index=index_of(SHARDS))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not ours")
    assert Checkpoint.open(store).names == ("a", "b", "c")


def test_null_is_as_good_as_absent_in_the_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": None, "auto_map": None, "x": [1.5, {"y": None}]}
    store = write_checkpoint(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, config=config)
    assert Checkpoint.open(store).config == config


def test_a_saved_transformers_model_opens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = Checkpoint.open(open_store(tmp_path.as_uri()))
    assert len(json.loads((tmp_path / INDEX).read_text())["weight_map"]) == len(checkpoint.names)
    state = model.state_dict()
    checkpoint.expect({name: tuple(tensor.shape) for name, tensor in state.items()})
    read = checkpoint.read_many(checkpoint.names)
    assert all(torch.equal(read[name], state[name]) for name in state)
