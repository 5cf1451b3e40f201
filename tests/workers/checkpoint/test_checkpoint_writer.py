"""The writer, against the safetensors library: the same bytes, and the same tensors back."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from counterweight.workers.checkpoint import read_safetensors, serialize_safetensors, write_safetensors
from counterweight.workers.checkpoint.buffers import TORCH_DTYPES
from counterweight.workers.checkpoint.dtypes import DTYPES
from counterweight.workers.checkpoint.header import METADATA
from counterweight.workers.checkpoint.writer import safetensors_pieces
from counterweight.workers.errors import CheckpointError, IntegrityError, StorageError
from counterweight.workers.storage import Writer
from counterweight.workers.storage.file import FileStore
from tests.workers.checkpoint.builders import bits, every_dtype, random_tensor

NAMES = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FFFF).filter(str.isprintable), min_size=1, max_size=12
).filter(lambda name: name != METADATA)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    return {
        name: random_tensor(draw(st.sampled_from([TORCH_DTYPES[word] for word in DTYPES])), draw(shapes), seed)
        for seed, name in enumerate(draw(st.sets(NAMES, max_size=6)))
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        (left[name].dtype, left[name].shape, bits(left[name]))
        == (right[name].dtype, right[name].shape, bits(right[name]))
        for name in left
    )


@given(tensor_sets())
def test_the_bytes_are_the_librarys(tensors: dict[str, Tensor]) -> None:
    assert serialize_safetensors(tensors) == save(tensors, metadata={"format": "pt"})
    assert serialize_safetensors(tensors, {}) == save(tensors)


@given(tensor_sets())
def test_both_readers_read_both_writers(tensors: dict[str, Tensor]) -> None:
    ours, theirs = serialize_safetensors(tensors), save(tensors, metadata={"format": "pt"})
    assert same(read_safetensors(theirs), tensors)
    assert same(load(ours), tensors)
    assert same(read_safetensors(ours), tensors)


def test_streaming_writes_the_serialized_bytes_and_their_sha256(tmp_path: Path) -> None:
    store, tensors = FileStore(tmp_path), {**every_dtype(), "empty": torch.empty(0, 3), "scalar": torch.tensor(1)}
    written = write_safetensors(store, "shards/a.safetensors", tensors)
    data = store.read("shards/a.safetensors")
    pieces = [bytes(piece) for piece in safetensors_pieces(tensors)]
    assert data == serialize_safetensors(tensors) == b"".join(pieces)
    assert all(pieces)  # none is empty: an S3 part must not be
    assert (written.size, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_metadata_is_written_sorted_and_read_by_the_library() -> None:
    tensors = {"a": torch.ones(2)}
    one = serialize_safetensors(tensors, {"b": "2", "a": "1"})
    assert one == serialize_safetensors(tensors, {"a": "1", "b": "2"})
    assert b'{"__metadata__":{"a":"1","b":"2"},' in one
    assert same(load(one), tensors)


def test_the_order_of_the_mapping_does_not_matter() -> None:
    tensors = every_dtype()
    assert serialize_safetensors(dict(reversed(tensors.items()))) == serialize_safetensors(tensors)


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.T,
        lambda base: base[:, 1:3],
        lambda base: base[::2],
        lambda base: base[1:],
        lambda base: base[0, 0],
        lambda base: base[0].expand(5, 6),
        lambda base: base[:1, ::6],
        lambda base: torch.complex(base, base).conj().imag,  # carries torch's negative bit
        lambda base: torch.complex(base[:1, :1], base[:1, :1]).conj().imag,  # the same, and contiguous
        lambda base: torch.nn.Parameter(base),
    ],
    ids=[
        "transposed",
        "columns",
        "strided",
        "offset",
        "scalar",
        "expanded",
        "one with a stride",
        "negated",
        "negated-one",
        "parameter",
    ],
)
def test_views_are_written_as_what_they_show(view: object) -> None:
    base = torch.randn(4, 6)
    assert callable(view)
    tensor = view(base)
    read = read_safetensors(serialize_safetensors({"v": tensor}))["v"]
    assert torch.equal(read, tensor)


def test_tensors_that_share_memory_are_each_written_whole() -> None:
    base = torch.randn(3, 3)
    read = read_safetensors(serialize_safetensors({"a": base, "b": base, "c": base[0]}))
    assert torch.equal(read["a"], base)
    assert torch.equal(read["b"], base)
    assert torch.equal(read["c"], base[0])


def test_read_tensors_have_memory_of_their_own() -> None:
    data = serialize_safetensors({"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(4)})
    first, second = read_safetensors(data), read_safetensors(data)
    first["a"].add_(1)
    first["b"].add_(1)
    assert same(second, read_safetensors(data))
    assert all(tensor.data_ptr() % 8 == 0 for tensor in first.values())


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"a\n": torch.zeros(1)}, r"tensor 'a\\n': name"),
        ({METADATA: torch.zeros(1)}, "name"),
        ({"c": torch.zeros(1, dtype=torch.complex64)}, "tensor 'c': dtype torch.complex64"),
        ({"s": torch.eye(3).to_sparse()}, "tensor 's': torch.sparse_coo"),
        ({"m": torch.zeros(1, device="meta")}, "tensor 'm': .* on meta"),
        ({"d": torch.zeros((1,) * 17)}, "tensor 'd': 17 dimensions"),
    ],
    ids=["control", "reserved", "complex", "sparse", "meta", "dimensions"],
)
def test_what_no_reader_would_take_is_refused_before_the_first_byte(
    tmp_path: Path, tensors: dict[str, Tensor], problem: str
) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(CheckpointError, match=problem):
        write_safetensors(store, "a.safetensors", {"good": torch.zeros(1), **tensors})
    assert list(tmp_path.iterdir()) == []


def test_metadata_beyond_the_readers_limit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        serialize_safetensors({}, {"k": "v" * (1 << 20)})


class _Breaking(FileStore):
    """A store whose disk is full after the first tensor."""

    def open_writer(self, key: str, *, durable: bool = True) -> Writer:
        writer, pieces = super().open_writer(key), itertools.count()
        write = writer.write

        def breaking(data: bytes | bytearray | memoryview) -> None:
            if next(pieces) == 2:
                raise StorageError("the disk is full")
            write(data)

        writer.write = breaking  # type: ignore[method-assign]
        return writer


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk is full"):
        write_safetensors(_Breaking(tmp_path), "a.safetensors", {"a": torch.zeros(4), "b": torch.zeros(4)})
    assert list(tmp_path.iterdir()) == []


class _Losing(FileStore):
    """A store that drops its second piece and thinks nothing of it."""

    def open_writer(self, key: str, *, durable: bool = True) -> Writer:
        writer, pieces = super().open_writer(key), itertools.count()
        write = writer.write
        writer.write = lambda data: None if next(pieces) == 1 else write(data)  # type: ignore[method-assign]
        return writer


def test_a_store_that_loses_bytes_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"a.safetensors: \d+ bytes written, expected \d+"):
        write_safetensors(_Losing(tmp_path), "a.safetensors", {"a": torch.zeros(4)})
