"""Checkpoints that lie. Each is refused with `CheckpointError`, before any tensor is read, and the text names
the thing.

What the stock loaders do with these files was tried: the safetensors library takes duplicate names and NaN;
transformers takes missing and extra tensors, and an index that leads out of its directory.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.workers.checkpoint import Checkpoint, read_safetensors, serialize_safetensors
from counterweight.workers.checkpoint.header import MAX_TENSORS, parse_header
from counterweight.workers.errors import CheckpointError
from tests.workers.checkpoint.builders import INDEX, field, index_of, open_single, raw_file, write_checkpoint

GOOD = serialize_safetensors({"a": torch.arange(4.0)})

ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DUPLICATE = b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}"
ESCAPED_DUPLICATE = DUPLICATE.replace(b',"a"', b',"\\u0061"')


def one(shape: Any, offsets: Any, dtype: Any = "F32", size: int = 16) -> bytes:
    """A file of one tensor 'a'."""
    return raw_file({"a": field(shape, offsets, dtype)}, bytes(size))


def spelled(entry: bytes, size: int = 4) -> bytes:
    """A file of one tensor 'a' whose entry is spelled out."""
    return raw_file(b'{"a":' + entry + b"}", bytes(size))


FILES: dict[str, tuple[bytes, str]] = {
    # the frame
    "empty file": (b"", "0 bytes, expected at least 8"),
    "seven bytes": (b"1234567", "7 bytes, expected at least 8"),
    "header of 2**63": (
        struct.pack("<Q", 2**63) + b"{}",
        "header of 9223372036854775808 bytes, expected at most",
    ),
    "header of 2**64-1": (b"\xff" * 8 + b"{}", "expected at most 100000000"),
    "header beyond the file": (raw_file(b"{}", length=1000), "header of 1000 bytes in a file of 10 bytes"),
    "header of no bytes": (raw_file(b""), "header begins b'', expected '{'"),
    "header cut": (GOOD[:40], "in a file of 40 bytes"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "header of 9766016 bytes in a file of 103"),
    "a zip (torch.save)": (b"PK\x03\x04" + bytes(100), "header of 67324752 bytes in a file of 104"),
    # the JSON
    "not JSON": (raw_file(b"{abc"), "b'abc', expected a name in quotes"),
    "a list": (raw_file(b"[]"), "header begins b'[]'"),
    "leading space": (raw_file(b" {}"), "header begins b' {}'"),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), "header begins"),
    "unclosed": (raw_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', bytes(4)), "',' or '}'"),
    "trailing comma": (raw_file(b'{"__metadata__":{},}'), "b'}', expected a name"),
    "text behind": (raw_file(b"{}x"), "text after the header's object"),
    "second object behind": (raw_file(b"{}{}"), "text after the header's object"),
    "zero bytes behind": (raw_file(b"{}\0\0"), "text after the header's object"),
    "invalid UTF-8": (raw_file(b'{"\xff":1}'), "is not UTF-8"),
    "overlong UTF-8": (raw_file(b'{"\xc0\xaf":1}'), "is not UTF-8"),
    "bad escape": (raw_file(b'{"\\x":1}'), "is not JSON"),
    "raw control character": (raw_file(b'{"a\n":1}'), "expected a name in quotes"),
    "deep nesting": (raw_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "expected an object"),
    "deep nesting in a field": (spelled(b'{"shape":' + b"[" * 1500 + b"]" * 1500 + b"}"), "tensor 'a'"),
    "deep nesting that parses": (spelled(b'{"shape":' + b"[" * 300 + b"]" * 300 + b"}"), "tensor 'a'"),
    "deep objects": (raw_file(b'{"a":' * 10_000 + b"}" * 10_000), "for tensor 'a'"),
    "entry of 5000 bytes": (spelled(b'{"dtype":"' + b"F" * 5000 + b'"}'), "for tensor 'a'"),
    # names
    "duplicate name": (raw_file(DUPLICATE, bytes(4)), "tensor 'a' occurs twice"),
    "duplicate name, escaped": (raw_file(ESCAPED_DUPLICATE, bytes(4)), "tensor 'a' occurs twice"),
    "empty name": (raw_file({"": field([1], [0, 4])}, bytes(4)), "name of 0 characters"),
    "name with a control": (raw_file({"a\x1b[2J": field([1], [0, 4])}, bytes(4)), r"'a\x1b[2J': name"),
    "name with a surrogate": (raw_file(b'{"\\ud800":{}}'), r"'\ud800': name"),
    "name of 600": (raw_file({"n" * 600: field([1], [0, 4])}, bytes(4)), "name of 600 characters"),
    "name of 10 MB": (raw_file(b'{"' + b"n" * 10_000_000 + b'":{}}'), "a string of 10000002 bytes"),
    # metadata
    "metadata twice": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "__metadata__ occurs twice"),
    "metadata key twice": (raw_file(b'{"__metadata__":{"k":"1","k":"2"}}'), "key 'k' occurs twice"),
    "metadata a list": (raw_file({"__metadata__": []}), "expected an object"),
    "metadata a number": (raw_file({"__metadata__": {"k": 1}}), "b' 1}}', expected a string"),
    "metadata of 2 MB": (raw_file({"__metadata__": {"k": "v" * 2_000_000}}), "a string of 2000002 bytes"),
    "metadata of 2 MB in all": (
        raw_file({"__metadata__": {str(key): "v" * 1000 for key in range(2000)}}),
        "__metadata__ of more than 1048576 bytes",
    ),
    # fields
    "entry a number": (spelled(b"1"), "b'1}', expected an object"),
    "entry null": (spelled(b"null"), "expected an object"),
    "no dtype": (
        raw_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "fields ['shape', 'data_offs",
    ),
    "a field more": (raw_file({"a": {**field([1], [0, 4]), "x": 1}}, bytes(4)), "each once"),
    "a field twice": (
        spelled(b'{"dtype":"F32","shape":[1],"data_offsets":[0,4],"shape":[1]}'),
        "fields ['dtype', 'shape', 'data_offsets', 'shape']",
    ),
    "unknown dtype": (one([4], [0, 16], "F33"), "dtype 'F33', expected one of I64, F64"),
    "float8": (one([16], [0, 16], "F8_E4M3"), "dtype 'F8_E4M3'"),
    "dtype a list": (one([4], [0, 16], ["F32"]), "dtype ['F32']"),
    "dtype null": (one([4], [0, 16], None), "dtype None"),
    "shape a number": (one(4, [0, 16]), "shape 4, expected a list"),
    "shape of booleans": (one([True, True], [0, 4], size=4), "shape [True, True], expected a list of whole"),
    "shape of floats": (one([4.0], [0, 16]), "shape ['4.0']"),
    "shape of exponents": (spelled(b'{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}'), "shape ['4e0']"),
    "shape of text": (one(["4"], [0, 16]), "shape ['4']"),
    "shape NaN": (one([float("nan")], [0, 16]), "shape ['NaN']"),
    "shape negative": (one([-1, -4], [0, 16]), "shape ['-1', '-4']"),
    "shape minus zero": (spelled(b'{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}', 0), "shape ['-0']"),
    "shape with leading zero": (spelled(b'{"dtype":"U8","shape":[04],"data_offsets":[0,4]}'), "is not JSON"),
    "shape of lists": (one([[4]], [0, 16]), "shape [[4]]"),
    "shape of 17 dimensions": (one([1] * 17, [0, 4], size=4), "shape of 17 dimensions"),
    "shape beyond the data": (
        one([5], [0, 16]),
        "shape [5] of F32 takes 20 bytes, but data_offsets [0, 16] hold 16",
    ),
    "shape below the data": (one([3], [0, 16]), "takes 12 bytes"),
    "shape overflows": (one([2**40, 2**40], [0, 16]), "beyond 2**63 bytes"),
    "shape wraps to 16 bytes": (one([2**62 + 1, 4], [0, 16]), "beyond 2**63 bytes"),
    "shape empty but overflowing": (one([0, 2**40, 2**40], [0, 0], size=0), "beyond 2**63 bytes"),
    "shape of 4000 digits": (one([10**3999], [0, 16]), "expected a list of whole numbers"),
    # offsets
    "offsets negative": (one([4], [-4, 12]), "data_offsets ['-4', 12]"),
    "offsets of floats": (one([4], [0.0, 16.0]), "data_offsets ['0.0', '16.0']"),
    "offsets of booleans": (one([1], [False, True], "U8", 1), "data_offsets [False, True]"),
    "offsets reversed": (one([4], [16, 0]), "data_offsets [16, 0], expected [begin, end]"),
    "one offset": (one([4], [16]), "data_offsets [16], expected [begin, end]"),
    "three offsets": (one([4], [0, 8, 16]), "data_offsets [0, 8, 16]"),
    "offsets null": (one([4], None), "data_offsets None"),
    "offsets beyond 2**63": (one([4], [2**63, 2**63 + 16]), "begins at data byte 9223372036854775808"),
    "offsets beyond the file": (one([4], [16, 32]), "leaves a hole"),
    # the layout
    "truncated data": (one([4], [0, 16], size=15), "15 bytes of tensor data, but the tensors take 16"),
    "trailing bytes": (one([4], [0, 16], size=20), "20 bytes of tensor data, but the tensors take 16"),
    "data without tensors": (raw_file(b"{}", bytes(8)), "8 bytes of tensor data, but the tensors take 0"),
    "overlap": (
        raw_file({"a": field([4], [0, 16]), "b": field([4], [8, 24])}, bytes(24)),
        "tensor 'b': begins at data byte 8, expected 16: overlaps 'a'",
    ),
    "same bytes twice": (
        raw_file({"a": field([4], [0, 16]), "b": field([4], [0, 16])}, bytes(16)),
        "tensor 'b': begins at data byte 0, expected 16: overlaps 'a'",
    ),
    "hole": (
        raw_file({"a": field([1], [0, 4]), "b": field([1], [8, 12])}, bytes(12)),
        "tensor 'b': begins at data byte 8, expected 4: leaves a hole",
    ),
    "hole in front": (one([4], [4, 20], size=20), "tensor 'a': begins at data byte 4, expected 0"),
    "empty tensor far out": (
        raw_file({"a": field([1], [0, 4]), "e": field([0], [9, 9])}, bytes(4)),
        "tensor 'e': begins at data byte 9",
    ),
    "empty tensor inside another": (
        raw_file({"a": field([4], [0, 16]), "e": field([0], [8, 8])}, bytes(16)),
        "tensor 'e': begins at data byte 8, expected 16: overlaps 'a'",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, problem = FILES[case]
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(data, file="some.safetensors")
    assert str(caught.value).startswith("some.safetensors: ")
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError) as caught:
        open_single(tmp_path, data)
    assert str(caught.value).startswith(f"{tmp_path.as_uri()}: model.safetensors: ")
    assert problem in str(caught.value)


def test_the_good_file_is_not_refused(tmp_path: Path) -> None:
    """The control: what the cases are mutations of is accepted by the same two ways in."""
    assert torch.equal(read_safetensors(GOOD)["a"], torch.arange(4.0))
    assert torch.equal(open_single(tmp_path, GOOD).read("a"), torch.arange(4.0))


def test_too_many_tensors_in_one_file_are_refused() -> None:
    header = json.dumps({"a": field([0], [0, 0]), "b": field([0], [0, 0])}).encode()
    size = 8 + len(header)
    assert len(parse_header(header, file="f", file_size=size, already=MAX_TENSORS - 2).entries) == 2
    with pytest.raises(CheckpointError, match=f"f: more than {MAX_TENSORS} tensors in all"):
        parse_header(header, file="f", file_size=size, already=MAX_TENSORS - 1)


def test_too_many_tensors_in_all_files_are_refused(tmp_path: Path) -> None:
    entry, half = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', MAX_TENSORS // 2
    headers = [b",".join(b'"%d":%b' % (n, entry) for n in range(at, at + half + at // half)) for at in (0, half)]
    shards = {name: raw_file(b"{" + header + b"}") for name, header in zip(SHARDS, headers, strict=True)}
    with pytest.raises(CheckpointError, match=rf"model-2.safetensors: more than {MAX_TENSORS} tensors in all"):
        Checkpoint.open(write_checkpoint(tmp_path, shards, index=index_of(SHARDS)))


def test_headers_too_long_in_all_are_refused(tmp_path: Path) -> None:
    for name in SHARDS:  # files of holes: only the lengths are ever read
        with (tmp_path / name).open("wb") as file:
            file.write((60_000_000).to_bytes(8, "little"))
            file.truncate(60_000_008)
    with pytest.raises(CheckpointError, match="headers of 120000000 bytes in all, expected at most 100000000"):
        Checkpoint.open(write_checkpoint(tmp_path, {}, index=index_of(SHARDS)))


def test_a_boolean_that_is_neither(tmp_path: Path) -> None:
    data = raw_file({"mask": field([2], [0, 2], "BOOL")}, b"\x01\x02")
    with pytest.raises(CheckpointError, match=r"f: tensor 'mask': a BOOL of 2"):
        read_safetensors(data, file="f")
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'mask': a BOOL of 2"):
        open_single(tmp_path, data).read("mask")


def test_nan_inside_is_seen(tmp_path: Path) -> None:
    checkpoint = open_single(tmp_path, raw_file({"a": field([1], [0, 4])}, struct.pack("<f", float("nan"))))
    assert not checkpoint.inspect(["a"])["a"].finite


SHARDS = {
    "model-1.safetensors": {"a": torch.ones(2), "b": torch.ones(3)},
    "model-2.safetensors": {"c": torch.ones(4)},
}
MAP: dict[str, Any] = index_of(SHARDS)["weight_map"]

INDEXES: dict[str, tuple[Any, list[str]]] = {
    "parent directory": ({**MAP, "a": "../evil.safetensors"}, ["weight_map: 'a': '../evil.safetensors'"]),
    "parent inside": ({**MAP, "a": "x/../../evil.safetensors"}, ["'a': 'x/../../evil.safetensors'"]),
    "absolute": ({**MAP, "a": "/etc/evil.safetensors"}, ["'a': '/etc/evil.safetensors'"]),
    "URL": (
        {**MAP, "a": "https://evil.example/m.safetensors"},
        ["'a': 'https://evil.example/m.safetensors'"],
    ),
    "URI without slashes": ({**MAP, "a": "file:evil.safetensors"}, ["'a': 'file:evil.safetensors'"]),
    "backslash": ({**MAP, "a": "..\\evil.safetensors"}, [r"'a': '..\\evil.safetensors'"]),
    "drive": ({**MAP, "a": "C:evil.safetensors"}, ["'a': 'C:evil.safetensors'"]),
    "nested directory": ({**MAP, "a": "sub/evil.safetensors"}, ["'a': 'sub/evil.safetensors'"]),
    "NUL": (
        {**MAP, "a": "model-1.safetensors\0.safetensors"},
        [r"'a': 'model-1.safetensors\x00.safetensors'"],
    ),
    "line feed": ({**MAP, "a": "model-1.safetensors\n"}, [r"'a': 'model-1.safetensors\n'"]),
    "hidden": ({**MAP, "a": ".safetensors"}, ["'a': '.safetensors'"]),
    "pickle": ({**MAP, "a": "pytorch_model.bin"}, ["'a': 'pytorch_model.bin'"]),
    "empty name": ({**MAP, "a": ""}, ["'a': ''"]),
    "number": ({**MAP, "a": 1}, ["weight_map: 'a': 1"]),
    "null": ({**MAP, "a": None}, ["weight_map: 'a': None"]),
    "several wrong": ({**MAP, "a": "../x", "c": "/y"}, ["2 problems", "'a': '../x'", "'c': '/y'"]),
    "missing shard": ({**MAP, "a": "model-3.safetensors"}, ["model-3.safetensors: not found"]),
    "missing shards": (
        {**MAP, "a": "model-3.safetensors", "b": "model-4.safetensors"},
        ["2 problems", "model-3.safetensors: not found", "model-4.safetensors: not found"],
    ),
    "not in its shard": (
        {**MAP, "ghost": "model-1.safetensors"},
        ["model-1.safetensors: tensor 'ghost': named by model.safetensors.index.json, but not in the file"],
    ),
    "in another shard": ({**MAP, "a": "model-2.safetensors"}, ["model-2.safetensors: tensor 'a': named by"]),
    "not in the index": (
        {"a": MAP["a"], "c": MAP["c"]},
        ["model-1.safetensors: tensor 'b': in the file, but not named by model.safetensors.index.json"],
    ),
    "everything at once": (
        {"a": "model-2.safetensors", "c": "model-1.safetensors", "d": "model-1.safetensors"},
        ["4 problems", "'a'", "'b'", "'c'", "'d'"],
    ),
    "weight_map a list": ([], ["weight_map: [], expected an object tensor -> file"]),
    "weight_map empty": ({}, ["weight_map: {}"]),
    "too many shards": ({f"t{i}": f"m{i}.safetensors" for i in range(5000)}, ["weight_map names 5000 files"]),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    # What the index might lead to is there, so that nothing is refused merely because it is missing.
    root = tmp_path / "checkpoint"
    for place in (tmp_path, root, root / "sub", root / "x"):
        write_checkpoint(place, {"evil.safetensors": {"a": torch.zeros(2)}})
    weight_map, problems = INDEXES[case]
    store = write_checkpoint(root, SHARDS, index={"weight_map": weight_map})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(store)
    assert str(caught.value).startswith(f"{root.as_uri()}: ")
    for problem in problems:
        assert problem in str(caught.value)


RAW_INDEXES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not strict JSON"),
    "not JSON": (b"{weight_map}", "not strict JSON"),
    "a list": (b"[]", "a JSON list, expected an object"),
    "no weight_map": (b'{"metadata":{}}', "weight_map: None"),
    "invalid UTF-8": (b'{"weight_map":{"\xff":"m.safetensors"}}', "byte 16 is not UTF-8"),
    "tensor twice": (b'{"weight_map":{"a":"m.safetensors","a":"n.safetensors"}}', "key 'a' occurs twice"),
    "weight_map twice": (b'{"weight_map":{},"weight_map":{}}', "key 'weight_map' occurs twice"),
    "deep nesting": (b'{"metadata":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
    "many values": (b'{"metadata":[' + b"[]," * 300_000 + b"[]]}", "JSON values, expected at most"),
}


@pytest.mark.parametrize("case", RAW_INDEXES)
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, case: str) -> None:
    data, problem = RAW_INDEXES[case]
    with pytest.raises(CheckpointError, match=rf": {INDEX}: ") as caught:
        Checkpoint.open(write_checkpoint(tmp_path, SHARDS, index=data))
    assert problem in str(caught.value)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = {"model-1.safetensors": {"a": torch.ones(2)}, "model-2.safetensors": {"a": torch.zeros(2)}}
    index = {"weight_map": {"a": "model-1.safetensors", "x": "model-2.safetensors"}}
    with pytest.raises(CheckpointError, match=r"'a': in both model-1.safetensors and model-2.safetensors"):
        Checkpoint.open(write_checkpoint(tmp_path, shards, index=index))


def test_all_broken_shards_are_named(tmp_path: Path) -> None:
    shards = {name: GOOD[: 90 + number] for number, name in enumerate(SHARDS)}
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*model-1.safetensors: .*model-2.safetensors: "):
        Checkpoint.open(write_checkpoint(tmp_path, shards, index=index_of(SHARDS)))


def test_single_file_and_index_contradict_each_other(tmp_path: Path) -> None:
    shards = {**SHARDS, "model.safetensors": {"a": torch.zeros(2)}}
    with pytest.raises(CheckpointError, match=r"model.safetensors beside model.safetensors.index.json"):
        Checkpoint.open(write_checkpoint(tmp_path, shards, index=index_of(SHARDS)))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth", "m.ckpt"]
)
def test_a_pickle_is_refused_as_what_it_is(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{name}': a pickle.*expected model.safetensors"):
        Checkpoint.open(write_checkpoint(tmp_path, {name: b"\x80\x04"}))


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        Checkpoint.open(write_checkpoint(tmp_path, {"README.md": b"hello"}))


CONFIGS: dict[str, tuple[Any, str]] = {
    "remote code": ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map: {'AutoModel': 'evil.Evil'}"),
    "remote code, nested": ({"text_config": {"auto_map": {"A": "e.E"}}}, "auto_map: {'A': 'e.E'}"),
    "remote code in a list": ({"parts": [{"auto_map": {"A": "e.E"}}]}, "auto_map: {'A': 'e.E'}"),
    "already quantized": ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    "already compressed": ({"compression_config": {"format": "x"}}, "already quantized"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "redirects the weights"),
    "both": ({"auto_map": {"A": "e.E"}, "quantization_config": {}}, "2 problems"),
    "a list": ([], "a JSON list, expected an object"),
    "a number": (b"3", "a JSON int"),
    "empty": (b"", "not strict JSON"),
    "NaN": (b'{"rms_norm_eps": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"rms_norm_eps": -Infinity}', "-Infinity is no JSON number"),
    "beyond float64": (b'{"rms_norm_eps": 1e999}', "number '1e999' is beyond float64"),
    "a number of 5000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not strict JSON"),
    "key twice": (b'{"hidden_size": 1, "hidden_size": 2}', "key 'hidden_size' occurs twice"),
    "invalid UTF-8": (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    "deep nesting": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    "many values": (b'{"a":[' + b"0," * 200_000 + b"0]}", "JSON values, expected at most"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_asks_for_too_much_is_refused(tmp_path: Path, case: str) -> None:
    config, problem = CONFIGS[case]
    store = write_checkpoint(tmp_path, {"model.safetensors": GOOD}, config=config)
    with pytest.raises(CheckpointError, match=rf"{tmp_path.as_uri()}: config.json: ") as caught:
        Checkpoint.open(store)
    assert problem in str(caught.value)


@pytest.mark.parametrize("key", ["auto_map", "transformers_weights", "compression_config"])
def test_an_artifacts_config_may_be_quantized_and_nothing_else(tmp_path: Path, key: str) -> None:
    config: dict[str, Any] = {"quantization_config": {"quant_method": "compressed-tensors"}}
    store = write_checkpoint(tmp_path, {"model.safetensors": GOOD}, config=config)
    assert Checkpoint.open(store, quantized=True).names == ("a",)
    store = write_checkpoint(tmp_path, {"model.safetensors": GOOD}, config={**config, key: {"x": "y"}})
    with pytest.raises(CheckpointError, match=rf"config.json: {key}: ") as caught:
        Checkpoint.open(store, quantized=True)
    assert "quantization_config" not in str(caught.value)


def test_a_deep_value_under_a_refused_key_is_still_a_clear_error(tmp_path: Path) -> None:
    config = b'{"auto_map":' + b"[" * 900 + b"]" * 900 + b"}"
    store = write_checkpoint(tmp_path, {"model.safetensors": GOOD}, config=config)
    with pytest.raises(CheckpointError, match=r"config.json: "):
        Checkpoint.open(store)


def test_no_config_is_no_checkpoint(tmp_path: Path) -> None:
    store = write_checkpoint(tmp_path, {"model.safetensors": GOOD})
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not found"):
        Checkpoint.open(store)
