"""Sources in MXFP4: decoded as by hand and as transformers decodes them, refused where they are not whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from counterweight.workers.checkpoint import Checkpoint, reader, tensor_digest
from counterweight.workers.checkpoint.decoding import decode
from counterweight.workers.checkpoint.dtypes import BF16
from counterweight.workers.checkpoint.mxfp4 import Mxfp4
from counterweight.workers.errors import CheckpointError
from counterweight.workers.storage.file import FileStore
from tests.workers.checkpoint.builders import bits, write_checkpoint

SCHEME = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
NAME = "model.layers.0.mlp.experts.down_proj"


def stored(experts: int = 3, out: int = 5, groups: int = 2) -> dict[str, Tensor]:
    """All experts of a projection of widths 32 * groups to out, and a plain tensor."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (experts, out, groups, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 140, (experts, out, groups), generator=draw, dtype=torch.uint8)
    return {f"{NAME}_blocks": codes, f"{NAME}_scales": scales, "norm.weight": torch.ones(7)}


def written(root: Path, tensors: dict[str, Tensor], scheme: Any = SCHEME) -> FileStore:
    config = {"model_type": "gpt_oss", "quantization_config": scheme}
    return write_checkpoint(root, {"model.safetensors": save(tensors)}, config=config)


def by_hand(code: int, scale: int) -> float:
    """Sign, exponent and mantissa of a code, times the scale."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(math.ldexp(magnitude, scale - 127), -1 if code & 8 else 1)


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 251])
def test_every_code_is_what_its_bits_say(scale: int) -> None:
    """256 bytes in sixteen blocks: the lower four bits first, and the matrix transposed."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(1, 4, 4, 16)
    found = decode(Mxfp4(), codes, torch.full((1, 4, 4), scale, dtype=torch.uint8))
    values = [by_hand(code, scale) for byte in range(256) for code in (byte & 15, byte >> 4)]
    expected = torch.tensor(values, dtype=torch.float64).reshape(4, 128).T
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0].double(), expected)
    assert torch.equal(found[0].signbit(), expected.signbit())


@pytest.mark.parametrize("scale", [255, 254])
def test_what_stands_for_no_finite_number_comes_out_as_none(scale: int) -> None:
    codes = torch.full((1, 1, 1, 16), 0x77, dtype=torch.uint8)  # 6: 6 * 2^127 is beyond bfloat16
    found = decode(Mxfp4(), codes, torch.full((1, 1, 1), scale, dtype=torch.uint8))
    assert not found.isfinite().any()


def test_weights_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    tensors = stored()
    checkpoint = Checkpoint.open(written(tmp_path, tensors))
    assert checkpoint.names == (NAME, "norm.weight")
    assert checkpoint.parts == {
        f"{NAME}_blocks": f"codes of {NAME}, decoded with it",
        f"{NAME}_scales": f"scales of {NAME}, decoded with it",
    }
    assert checkpoint.config == {"model_type": "gpt_oss"}
    assert (checkpoint.entry(NAME).dtype, checkpoint.entry(NAME).shape) == (BF16, (3, 64, 5))
    checkpoint.expect({NAME: (3, 64, 5), "norm.weight": (7,)})
    expected = convert_moe_packed_tensors(tensors[f"{NAME}_blocks"], tensors[f"{NAME}_scales"])
    read = checkpoint.read_many([NAME, "norm.weight"])
    assert bits(read[NAME]) == bits(expected)
    assert checkpoint.digest(NAME) == tensor_digest(expected)
    assert torch.equal(read["norm.weight"], torch.ones(7))


def test_matrices_are_decoded_one_by_one(tmp_path: Path) -> None:
    tensors = stored()
    checkpoint = Checkpoint.open(written(tmp_path, tensors))
    expected = convert_moe_packed_tensors(tensors[f"{NAME}_blocks"], tensors[f"{NAME}_scales"])
    parts = checkpoint.read_apart([NAME], sha256={NAME: tensor_digest(expected)})[NAME]
    assert [bits(part) for part in parts] == [bits(whole) for whole in expected]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)


def test_a_batch_holds_so_many_bytes_of_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a batch, the same weights come out."""
    tensors = {name.replace("0", str(index)): part for index in range(3) for name, part in stored().items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    store = written(tmp_path, tensors)
    names = [NAME.replace("0", str(index)) for index in range(3)]
    together = Checkpoint.open(store).read_many(names)
    monkeypatch.setattr(reader, "BATCH_BYTES", 1)
    apart = Checkpoint.open(store).read_many(names)
    assert all(torch.equal(together[name], apart[name]) for name in names)


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (without(f"{NAME}_scales"), "without scales, expected them as"),
    "blocks of another size": (
        put(f"{NAME}_blocks", torch.zeros(3, 5, 4, 8, dtype=torch.uint8)),
        "expected [experts, out, in / 32, 16]",
    ),
    "flat blocks": (put(f"{NAME}_blocks", torch.zeros(3, 5, 32, dtype=torch.uint8)), "expected [experts, out, in / 32"),
    "scales of another shape": (
        put(f"{NAME}_scales", torch.zeros(3, 5, 3, dtype=torch.uint8)),
        "U8 of shape [3, 5, 3], expected U8 of [3, 5, 2]",
    ),
    "scales of another dtype": (put(f"{NAME}_scales", torch.zeros(3, 5, 2)), "F32 of shape [3, 5, 2]"),
    "both": (put(NAME, torch.zeros(3, 64, 5)), f"expected no '{NAME}' beside it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_are_not_whole_are_refused(case: str, tmp_path: Path) -> None:
    change, problem = BROKEN[case]
    tensors = stored()
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(written(tmp_path, tensors))
    assert problem in str(caught.value)


def test_scales_alone_are_a_tensor_that_nobody_expects(tmp_path: Path) -> None:
    tensors = stored()
    del tensors[f"{NAME}_blocks"]
    with pytest.raises(CheckpointError, match=rf"{NAME}_scales': shape .* expected no such tensor"):
        Checkpoint.open(written(tmp_path, tensors)).expect({"norm.weight": (7,)})


def test_a_config_that_says_more_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config of mxfp4: block_size: 16: unknown"):
        Checkpoint.open(written(tmp_path, stored(), {**SCHEME, "block_size": 16}))


def test_an_artifact_cannot_be_in_mxfp4(tmp_path: Path) -> None:
    assert f"{NAME}_blocks" in Checkpoint.open(written(tmp_path, stored()), quantized=True).names
