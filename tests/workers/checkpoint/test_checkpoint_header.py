"""What a header may say: valid headers in every form, and what comes out. Refusals: tests/attacks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from counterweight.workers.checkpoint import serialize_safetensors
from counterweight.workers.checkpoint.buffers import TORCH_DTYPES
from counterweight.workers.checkpoint.dtypes import BF16, DTYPES, F32
from counterweight.workers.checkpoint.header import (
    MAX_NAME_LENGTH,
    Header,
    TensorEntry,
    check_name,
    header_length,
    parse_header,
)
from counterweight.workers.errors import CheckpointError
from tests.workers.checkpoint.builders import every_dtype, field, raw_file


def parsed(data: bytes) -> Header:
    length = header_length(data[:8], file="f", file_size=len(data))
    return parse_header(data[8 : 8 + length], file="f", file_size=len(data))


def test_entry_says_where_the_bytes_lie() -> None:
    data = raw_file({"a": field([2, 3], [0, 24]), "b": field([], [24, 26], "BF16")}, bytes(26))
    start = len(data) - 26
    assert parsed(data).entries == {
        "a": TensorEntry(name="a", dtype=F32, shape=(2, 3), file="f", start=start, length=24),
        "b": TensorEntry(name="b", dtype=BF16, shape=(), file="f", start=start + 24, length=2),
    }


def test_every_dtype_of_the_table_is_read_with_its_size() -> None:
    tensors = every_dtype()
    entries = parsed(serialize_safetensors(tensors)).entries
    assert {name: (entry.dtype, entry.length) for name, entry in entries.items()} == {
        word: (dtype, 15 * TORCH_DTYPES[word].itemsize) for word, dtype in DTYPES.items()
    }


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}',  # any order of fields
        b'{ "a"\t:\n{ "dtype" : "F32",\r"shape" : [ 1 ] , "data_offsets" : [ 0 , 4 ] } }   ',  # white space
        b'{"\\u0061":{"dtype":"\\u004632","shape":[1],"data_offsets":[0,4]}}',  # escapes
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{}}',  # metadata last, empty
    ],
    ids=["order", "space", "escapes", "metadata"],
)
def test_all_spellings_of_one_header_mean_the_same(text: bytes) -> None:
    data = raw_file(text, bytes(4))
    (entry,) = parsed(data).entries.values()
    assert (entry.name, entry.dtype, entry.shape, entry.length) == ("a", F32, (1,), 4)
    assert list(load(data)) == ["a"]  # the library agrees that this is a valid file


def test_metadata_is_text_by_text() -> None:
    data = raw_file({"__metadata__": {"format": "pt", 'weird "{}\\': "é\n"}})
    assert parsed(data).metadata == {"format": "pt", 'weird "{}\\': "é\n"}


def test_tensors_may_stand_in_any_order_and_be_empty() -> None:
    header = {"b": field([1], [4, 8]), "none": field([0, 7], [4, 4]), "a": field([1], [0, 4])}
    entries = parsed(raw_file(header, bytes(8))).entries
    assert list(entries) == ["b", "none", "a"]
    assert (entries["none"].shape, entries["none"].length) == ((0, 7), 0)


def test_no_tensors_and_no_data() -> None:
    assert parsed(raw_file(b"{}      ")).entries == {}


def test_stricter_than_the_library_where_it_says_nothing() -> None:
    """The library lets the last of two equal names win; this is why the header is read here and not there."""
    entry = json.dumps(field([1], [0, 4])).encode()
    data = raw_file(b'{"a":' + entry + b',"a":' + entry + b"}", bytes(4))
    assert list(load(data)) == ["a"]
    with pytest.raises(CheckpointError, match=r"'a' occurs twice"):
        parsed(data)


def test_the_library_refuses_what_the_layout_check_refuses() -> None:
    """Both readers refuse a hole: the check is the format's, not ours."""
    data = raw_file({"a": field([1], [0, 4]), "b": field([1], [8, 12])}, bytes(12))
    with pytest.raises(SafetensorError):
        load(data)
    with pytest.raises(CheckpointError, match=r"'b'.*leaves a hole"):
        parsed(data)


@pytest.mark.parametrize("name", ["a", "model.layers.0.weight", "ärmel 1", "x" * MAX_NAME_LENGTH, '{"\\'])
def test_names_that_are_allowed(name: str) -> None:
    check_name(name, file="f")
    assert list(parsed(serialize_safetensors({name: torch.zeros(1)})).entries) == [name]


@pytest.mark.parametrize(
    "name",
    ["", "a\n", "a\x00", "a\x1b[2J", "x" * (MAX_NAME_LENGTH + 1), "\ud800", "a\u202eb", "__metadata__"],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"^f: tensor .*name"):
        check_name(name, file="f")
