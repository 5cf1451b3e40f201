"""Random damage to valid files: refused, or read exactly as the damaged file says; nothing else is ever
raised."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from counterweight.workers.checkpoint import read_safetensors, serialize_safetensors, tensor_digest
from counterweight.workers.checkpoint.strict_json import parse_object
from counterweight.workers.errors import CheckpointError
from tests.workers.checkpoint.builders import bits, every_dtype

TENSORS = {f"layer.{word}": tensor for word, tensor in every_dtype(rows=2).items()}
FILE = serialize_safetensors(TENSORS)
HEADER_END = 8 + int.from_bytes(FILE[:8], "little")
DIGESTS = {name: tensor_digest(tensor) for name, tensor in TENSORS.items()}

# What a header is made of, and what looks almost like it.
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"-1",
    b"0",
    b"1e9",
    b"true",
    b"null",
    b"NaN",
    b'"F32"',
    b"\xff",
]


@st.composite
def damaged(draw: st.DrawFn, end: int) -> bytes:
    """The file with one to four replacements, insertions, deletions or moves before byte `end`."""
    data = bytearray(FILE)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, end))
        stop = begin + draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["byte", "token", "delete", "copy"]))
        if kind == "byte":
            data[begin : begin + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "token":
            data[begin:stop] = draw(st.sampled_from(TOKENS))
        elif kind == "delete":
            del data[begin:stop]
        else:
            data[begin:begin] = data[begin : stop + 20]
    return bytes(data)


def sized(data: bytes) -> bytes:
    """The same file with a header length that fits what damage did to the header's size."""
    length = HEADER_END - 8 + len(data) - len(FILE)
    return max(length, 0).to_bytes(8, "little") + data[8:]


@settings(max_examples=400, deadline=None)
@given(damaged(end=HEADER_END), st.booleans())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(data: bytes, resize: bool) -> None:
    data = sized(data) if resize else data
    try:
        read = read_safetensors(data)
    except CheckpointError:
        return
    reference = load(data)  # whatever we accept, the library must accept too, and mean the same
    assert {name: (tensor.dtype, tensor.shape, bits(tensor)) for name, tensor in read.items()} == {
        name: (tensor.dtype, tensor.shape, bits(tensor)) for name, tensor in reference.items()
    }


@settings(max_examples=300, deadline=None)
@given(damaged(end=len(FILE)), st.booleans())
def test_damage_anywhere_never_passes_for_the_recorded_tensors(data: bytes, resize: bool) -> None:
    """Only if every tensor's bytes, dtype and shape survived do all names have their recorded digests."""
    data = sized(data) if resize else data
    try:
        read = read_safetensors(data)
    except CheckpointError:
        return
    intact = {name: tensor for name, tensor in read.items() if tensor_digest(tensor) == DIGESTS.get(name)}
    for name, tensor in intact.items():
        assert (tensor.dtype, tensor.shape, bits(tensor)) == (
            TENSORS[name].dtype,
            TENSORS[name].shape,
            bits(TENSORS[name]),
        )
    if read.keys() == TENSORS.keys() and len(data) == len(FILE) and data[HEADER_END:] != FILE[HEADER_END:]:
        assert intact.keys() != TENSORS.keys()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (
        noise,
        len(noise).to_bytes(8, "little") + noise,
        (len(noise) // 2).to_bytes(8, "little") + noise,
    ):
        try:
            assert read_safetensors(data) == {} or load(data)
        except CheckpointError:
            continue


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.binary(max_size=3), st.integers(0, 100))
def test_strict_json_gives_what_json_gives_or_refuses(value: object, noise: bytes, position: int) -> None:
    data = json.dumps({"a": value}).encode()
    assert parse_object(data, file="f", max_values=1000) == {"a": value}
    broken = data[:position] + noise + data[position:]
    try:
        parsed = parse_object(broken, file="f", max_values=1000)
    except CheckpointError:
        return
    assert parsed == json.loads(broken)
