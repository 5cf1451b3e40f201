"""Block-scaled sources: decoded as by hand, one tensor to every reader, refused where they are not whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from counterweight.workers.checkpoint import Checkpoint, reader, tensor_digest
from counterweight.workers.checkpoint.block_scaled import MAX_BLOCK, BlockScaling
from counterweight.workers.checkpoint.dtypes import BF16
from counterweight.workers.errors import CheckpointError
from counterweight.workers.storage.file import FileStore
from tests.models import block_scaled, decoded_by_hand
from tests.workers.checkpoint.builders import RecordingStore, bits, write_checkpoint

SCHEME: Mapping[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [24, 16],
}
BLOCK = (24, 16)
NAME = "model.layers.0.mlp.down_proj.weight"
SCALE = f"{NAME}_scale_inv"


def stored(out: int = 50, width: int = 41, block: tuple[int, int] = BLOCK) -> dict[str, Tensor]:
    """A block-scaled weight whose edges cut blocks, and a plain tensor."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    codes, scale = block_scaled(weight, block)
    return {NAME: codes, SCALE: scale, "norm.weight": torch.ones(7)}


def written(root: Path, tensors: Mapping[str, Tensor], scheme: Any = SCHEME) -> FileStore:
    config = {"model_type": "llama"} if scheme is None else {"model_type": "llama", "quantization_config": scheme}
    return write_checkpoint(root, {"model.safetensors": save(dict(tensors))}, config=config)


@pytest.mark.parametrize("block", [(24, 16), (128, 128), (1, 1), (50, 41), (1, 41), (7, 3)])
def test_weights_are_decoded_as_by_hand(block: tuple[int, int], tmp_path: Path) -> None:
    tensors = stored(block=block)
    checkpoint = Checkpoint.open(written(tmp_path, tensors, {**SCHEME, "weight_block_size": list(block)}))
    expected = decoded_by_hand(tensors[NAME], tensors[SCALE], block)
    assert checkpoint.names == (NAME, "norm.weight")
    assert checkpoint.parts == {SCALE: f"scales of {NAME}, decoded with it"}
    assert (checkpoint.entry(NAME).dtype, checkpoint.entry(NAME).shape) == (BF16, (50, 41))
    read = checkpoint.read_many([NAME, "norm.weight"])
    assert bits(read[NAME]) == bits(expected)
    assert read[NAME].dtype == torch.bfloat16
    assert torch.equal(read["norm.weight"], torch.ones(7))
    checkpoint.expect({NAME: (50, 41), "norm.weight": (7,)})


def test_every_code_is_what_its_bits_say(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(16, 16)
    numbers = (codes & 0x7F) != 0x7F
    codes = torch.where(numbers, codes, torch.zeros_like(codes)).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.375]])
    checkpoint = Checkpoint.open(written(tmp_path, {NAME: codes, SCALE: scale}))
    assert torch.equal(checkpoint.read(NAME), decoded_by_hand(codes, scale, BLOCK))


def test_the_config_says_no_more_that_it_is_quantized(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(written(tmp_path, stored()))
    assert checkpoint.config == {"model_type": "llama"}


def test_the_digest_is_that_of_the_decoded_weight_and_covers_the_scales(tmp_path: Path) -> None:
    tensors = stored()
    checkpoint = Checkpoint.open(written(tmp_path / "a", tensors))
    digest = checkpoint.digest(NAME)
    assert digest == tensor_digest(decoded_by_hand(tensors[NAME], tensors[SCALE], BLOCK))
    assert torch.equal(checkpoint.read(NAME, sha256=digest), checkpoint.read(NAME))
    tensors[SCALE][1, 1] *= 2
    changed = Checkpoint.open(written(tmp_path / "b", tensors))
    assert changed.digest(NAME) != digest
    with pytest.raises(CheckpointError, match="the source changed while the job ran"):
        changed.read(NAME, sha256=digest)


@pytest.mark.parametrize(
    ("place", "value"),
    [(NAME, torch.nan), (SCALE, torch.nan), (SCALE, torch.inf), (SCALE, -torch.inf), (SCALE, 3e38)],
)
def test_what_is_not_finite_is_found(place: str, value: float, tmp_path: Path) -> None:
    tensors = stored()
    tensors[place].view(torch.uint8)[0, 0] = 0x7F if place == NAME else 0
    if place == SCALE:
        tensors[SCALE][0, 0] = value
    found = Checkpoint.open(written(tmp_path, tensors)).inspect([NAME, "norm.weight"])
    assert not found[NAME].finite
    assert found["norm.weight"].finite
    tensors = stored()
    assert Checkpoint.open(written(tmp_path / "good", tensors)).inspect([NAME])[NAME].finite


def test_codes_are_held_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many weights, no more codes are in memory than a batch has: each range is read when the batch before is decoded."""
    tensors: dict[str, Tensor] = {}
    for index in range(6):
        codes, scale = block_scaled(torch.randn(48, 32), BLOCK)
        tensors |= {f"{index}.weight": codes, f"{index}.weight_scale_inv": scale}
    written(tmp_path, tensors)
    store = RecordingStore(tmp_path)
    checkpoint = Checkpoint.open(store)
    monkeypatch.setattr(reader, "BATCH_BYTES", 2 * 48 * 32)
    store.ranges.clear()
    names = [f"{index}.weight" for index in range(6)]
    read = checkpoint.read_many(names)
    assert all(
        torch.equal(read[name], decoded_by_hand(tensors[name], tensors[f"{name}_scale_inv"], BLOCK)) for name in names
    )
    assert sum(length > 1000 for _, _, length in store.ranges) == 3
    assert max(length for _, _, length in store.ranges) == 2 * 48 * 32


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        ({"quant_method": "fp8"}, "weight_block_size: None, expected two whole numbers from 1 to 1024"),
        ({**SCHEME, "weight_block_size": None}, "weight_block_size: None"),
        ({**SCHEME, "weight_block_size": [24]}, r"weight_block_size: \[24\]"),
        ({**SCHEME, "weight_block_size": [24, 16, 1]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": [0, 16]}, r"weight_block_size: \[0, 16\]"),
        ({**SCHEME, "weight_block_size": [-24, 16]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": [True, True]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": [24.0, 16]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": ["24", 16]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": [MAX_BLOCK + 1, 16]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": [10**18, 10**18]}, "weight_block_size"),
        ({**SCHEME, "weight_block_size": {"0": 24}}, "weight_block_size"),
        ({**SCHEME, "fmt": "e5m2"}, "fmt: 'e5m2', expected None or 'e4m3'"),
        ({**SCHEME, "activation_scheme": "static"}, "activation_scheme: 'static'"),
        ({**SCHEME, "scale_fmt": "x"}, "scale_fmt: 'x'"),
        ({**SCHEME, "per_channel": True}, "per_channel: True: unknown"),
        ({**SCHEME, "fmt": [], "activation_scheme": {}}, "2 problems"),
        ({"quant_method": "gptq"}, "already quantized"),
        ("fp8", "already quantized"),
        (None, "dtype 'F8_E4M3', expected one of I64"),
    ],
    ids=str,
)
def test_a_source_that_does_not_say_how_to_decode_it_is_refused(scheme: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint.open(written(tmp_path, stored(), scheme))


def test_an_artifact_cannot_be_block_scaled(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype 'F8_E4M3'"):
        Checkpoint.open(written(tmp_path, stored()), quantized=True)


def test_a_nested_config_cannot_say_it(tmp_path: Path) -> None:
    config = {"model_type": "llama", "text_config": {"quantization_config": SCHEME}, "quantization_config": SCHEME}
    store = write_checkpoint(tmp_path, {"model.safetensors": save(stored())}, config=config)
    with pytest.raises(CheckpointError, match="already quantized"):
        Checkpoint.open(store)


SCALES: dict[str, tuple[Tensor | None, str]] = {
    "missing": (None, "F8_E4M3 without scales, expected them as '.*down_proj.weight_scale_inv'"),
    "a row too few": (torch.ones(2, 3), r"F32 of shape \[2, 3\], expected F32 of \[3, 3\]"),
    "a column too many": (torch.ones(3, 4), r"expected F32 of \[3, 3\]"),
    "flat": (torch.ones(9), r"expected F32 of \[3, 3\]"),
    "a scalar": (torch.tensor(1.0), r"shape \[\]"),
    "transposed blocks": (torch.ones(4, 2), r"expected F32 of \[3, 3\]"),
    "bfloat16": (torch.ones(3, 3, dtype=torch.bfloat16), "BF16 of shape"),
    "float64": (torch.ones(3, 3, dtype=torch.float64), "F64 of shape"),
    "integers": (torch.ones(3, 3, dtype=torch.int32), "I32 of shape"),
    "codes": (torch.ones(3, 3).to(torch.float8_e4m3fn), "F8_E4M3 of shape"),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales_that_do_not_fit_are_refused_before_anything_is_read(case: str, tmp_path: Path) -> None:
    scale, problem = SCALES[case]
    tensors = stored()
    del tensors[SCALE]
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint.open(written(tmp_path, tensors if scale is None else {**tensors, SCALE: scale}))


@pytest.mark.parametrize("shape", [(16,), (2, 24, 16), ()])
def test_only_matrices_are_block_scaled(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {NAME: torch.ones(shape).to(torch.float8_e4m3fn), SCALE: torch.ones(1, 1)}
    with pytest.raises(CheckpointError, match="expected a matrix"):
        Checkpoint.open(written(tmp_path, tensors))


def test_scales_of_no_codes_are_tensors_like_any_other(tmp_path: Path) -> None:
    """Which no architecture expects."""
    tensors = {**stored(), "norm.weight_scale_inv": torch.ones(1, 1)}
    checkpoint = Checkpoint.open(written(tmp_path, tensors))
    assert "norm.weight_scale_inv" in checkpoint.names
    with pytest.raises(CheckpointError, match=r"'norm.weight_scale_inv': .*expected no such tensor"):
        checkpoint.expect({NAME: (50, 41), "norm.weight": (7,)})


def test_other_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    tensors = {NAME: torch.ones(24, 16).to(torch.float8_e5m2), SCALE: torch.ones(1, 1)}
    with pytest.raises(CheckpointError, match=r"dtype 'F8_E5M2', expected one of .*F8_E4M3"):
        Checkpoint.open(written(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(0, 16), (24, 0), (0, 0)])
def test_an_empty_weight_is_empty(shape: tuple[int, int], tmp_path: Path) -> None:
    grid = tuple(-(-size // step) for size, step in zip(shape, BLOCK, strict=True))
    tensors = {NAME: torch.empty(shape).to(torch.float8_e4m3fn), SCALE: torch.empty(grid)}
    assert Checkpoint.open(written(tmp_path, tensors)).read(NAME).shape == shape


def test_no_scheme_is_none() -> None:
    assert BlockScaling.of({}) is None
    assert BlockScaling.of({"quantization_config": None}) is None
    published = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert BlockScaling.of({"quantization_config": published}) == BlockScaling(rows=128, columns=128)
