"""A rotated model computes what it computed before, in coordinates without outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from counterweight.kernels.hadamard import Hadamard, hadamard_matrix
from counterweight.workers.errors import UnsupportedModelError
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.source import head_of
from counterweight.workers.transforms import (
    residual_hadamard,
    residual_rotation,
    rotate_block,
    rotate_embedding,
    rotate_head,
)
from tests.models import CASES, LM_HEAD, NORM, checkpoint, read_config, read_tensors, token_ids

CPU = torch.device("cpu")
ALL = Rotation(online_output=True)
WITHOUT_RESIDUAL = Rotation(residual=False, online_output=True)


@dataclass(frozen=True)
class Model:
    """A checkpoint on its way through the builder: block parameters by index, and what lies around the blocks."""

    builder: BlockBuilder
    blocks: tuple[dict[str, Tensor], ...]
    embedding: Tensor
    head: Mapping[str, Tensor]
    online: tuple[dict[str, Hadamard], ...]

    def block(self, index: int) -> Block:
        """Block `index`, its online transforms in hooks."""
        block = self.builder.block(index, self.blocks[index], CPU, torch.float32)
        for name, transform in self.online[index].items():

            def transformed(
                _: nn.Module, arguments: tuple[Tensor, ...], transform: Hadamard = transform
            ) -> tuple[Tensor, ...]:
                return (transform.apply(arguments[0]),)

            block.linear(name).register_forward_pre_hook(transformed)
        return block

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """Hidden states [sequences, length, hidden] before each block and after the last."""
        states: list[Tensor] = [self.builder.embedding(self.embedding, CPU, torch.float32)(ids)]
        for index in range(len(self.blocks)):
            states.append(self.block(index).run(states[-1]))
        return [state.detach() for state in states]

    def logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.builder.head(self.head, CPU, torch.float32)(self.hidden(ids)[-1])
        return logits

    def rotated(self, options: Rotation) -> Model:
        results = [rotate(self.builder, parameters, options) for parameters in self.blocks]
        embedding, head = self.embedding, dict(self.head)
        if options.residual:
            rotation = residual_hadamard(self.builder.hidden_size, options)
            embedding = rotate_embedding(embedding, rotation)
            offset = self.builder.family.norm_offset
            names = self.builder.names
            rotated = rotate_head(head[names.norm], head[names.head], rotation, norm_offset=offset)
            head = dict(zip((names.norm, names.head), rotated, strict=True))
        blocks, online = (tuple(part) for part in zip(*results, strict=True))
        return Model(builder=self.builder, blocks=blocks, embedding=embedding, head=head, online=online)


def rotate(
    builder: BlockBuilder, parameters: Mapping[str, Tensor], options: Rotation, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Hadamard]]:
    config = builder.config
    heads = {"heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads}
    return rotate_block(config.model_type, parameters, options, **{**heads, **changes})


def opened(case: str, directory: Path, **changes: Any) -> Model:
    checkpoint(case, directory, **changes)
    tensors = read_tensors(directory)
    builder = BlockBuilder(read_config(directory), tensors)
    blocks = tuple(
        {name: part.of(tensors[part.source]).clone() for name, part in builder.layout.sources(index, tensors).items()}
        for index in range(builder.blocks)
    )
    head = head_of(tensors, builder.names)
    return Model(builder, blocks, tensors[builder.names.embedding], head, tuple({} for _ in blocks))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """To 1e-4 of the scale."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.square().mean().sqrt()))


def rotatable(case: str) -> bool:
    return not CASES[case].family.startswith("gemma")


def possible(case: str) -> Rotation:
    """All that can be rotated in a model of this case."""
    gated = CASES[case].family.startswith(("qwen3_next", "qwen3_5"))
    return Rotation(residual=rotatable(case), heads=not gated, online_output=True)


@pytest.mark.parametrize("case", CASES)
def test_a_rotated_model_has_the_same_logits(case: str, tmp_path: Path) -> None:
    model = opened(case, tmp_path)
    ids = token_ids(2, 32)
    rotated = model.rotated(possible(case))
    assert_same(rotated.logits(ids), model.logits(ids))
    for before, after in zip(model.blocks, rotated.blocks, strict=True):
        assert {name: (tensor.shape, torch.float32) for name, tensor in before.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
        }


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 48, "intermediate_size": 172},  # 12 * 4, and 43 blocks of 4
        {"hidden_size": 84, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14},
        {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 97},
    ],
    ids=str,
)
def test_widths_that_are_no_powers_of_two(change: dict[str, Any], tmp_path: Path) -> None:
    model = opened("llama-tied-biased", tmp_path, **change)
    ids = token_ids(2, 16)
    assert_same(model.rotated(ALL).logits(ids), model.logits(ids))


@pytest.mark.parametrize("case", [case for case in CASES if rotatable(case)])
def test_the_residual_stream_is_rotated(case: str, tmp_path: Path) -> None:
    model = opened(case, tmp_path)
    ids, q = token_ids(1, 16), residual_rotation(64, ALL).float()
    pairs = list(zip(model.rotated(possible(case)).hidden(ids), model.hidden(ids), strict=True))
    assert len(pairs) == model.builder.blocks + 1
    for rotated, original in pairs:
        assert_same(rotated @ q.T, original)
        assert (rotated - original).square().mean() > 0.5 * original.square().mean()


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text"])
def test_a_residual_stream_behind_norms_is_refused(case: str, tmp_path: Path) -> None:
    model = opened(case, tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"expected false for {case}.*post_feedforward_layernorm scale"):
        rotate(model.builder, model.blocks[0], ALL)


def test_values_behind_a_gate_are_refused(tmp_path: Path) -> None:
    model = opened("qwen3_next", tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"rotation.heads: true: expected false for qwen3_next.*a gate"):
        rotate(model.builder, model.blocks[0], ALL)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UnsupportedModelError, match="'gpt2': expected one of deepseek_v2, deepseek_v3, gemma2, gemma3, gemma3_text"
    ):
        rotate_block("gpt2", {}, ALL, heads=1, key_value_heads=1)


def test_attention_of_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    for heads, key_value_heads in ((5, 1), (4, 3)):
        with pytest.raises(ValueError, match=f"expected those of {heads} heads and {key_value_heads} key-value heads"):
            rotate(model.builder, model.blocks[0], ALL, heads=heads, key_value_heads=key_value_heads)


ATTENTION_INPUTS = {f"self_attn.{name}_proj.weight" for name in "qkv"}
CHANGED: Mapping[str, set[str]] = {
    "residual": {
        *ATTENTION_INPUTS,
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    },
    "heads": {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"},
    "online_down": {"mlp.down_proj.weight"},
    "online_output": {"self_attn.o_proj.weight"},
}
ONLINE: Mapping[str, dict[str, Hadamard]] = {
    "residual": {},
    "heads": {},
    "online_down": {"mlp.down_proj": Hadamard(size=96)},
    "online_output": {"self_attn.o_proj": Hadamard(size=4, inner=16)},
}


def only(option: str, **changes: Any) -> Rotation:
    return Rotation.model_validate({name: name == option for name in CHANGED} | changes)


@pytest.mark.parametrize("option", CHANGED)
def test_each_option_changes_its_own_parameters_and_no_others(option: str, tmp_path: Path) -> None:
    model = opened("llama-tied-biased", tmp_path)
    rotated, online = rotate(model.builder, model.blocks[0], only(option))
    assert {name for name, tensor in model.blocks[0].items() if not torch.equal(rotated[name], tensor)} == CHANGED[
        option
    ]
    assert online == ONLINE[option]
    ids = token_ids(1, 16)
    assert_same(model.rotated(only(option)).logits(ids), model.logits(ids))


def test_the_weights_are_those_of_the_formulas(tmp_path: Path) -> None:
    """Written out with dense matrices for one block with grouped heads and biases."""
    model = opened("llama-tied-biased", tmp_path)
    old = {name: tensor.double() for name, tensor in model.blocks[0].items()}
    new, _ = rotate(model.builder, model.blocks[0], ALL)
    q = residual_rotation(64, ALL)
    head = Hadamard(size=16, seed=ALL.seed).dense()
    per_head, per_group = torch.block_diag(*[head] * 4), torch.block_diag(*[head] * 2)
    across = torch.kron(hadamard_matrix(4), torch.eye(16, dtype=torch.float64))
    first, second = torch.diag(old["input_layernorm.weight"]), torch.diag(old["post_attention_layernorm.weight"])
    expected = {
        "self_attn.q_proj.weight": old["self_attn.q_proj.weight"] @ first @ q,
        "self_attn.q_proj.bias": old["self_attn.q_proj.bias"],
        "self_attn.k_proj.weight": old["self_attn.k_proj.weight"] @ first @ q,
        "self_attn.k_proj.bias": old["self_attn.k_proj.bias"],
        "self_attn.v_proj.weight": per_group.T @ old["self_attn.v_proj.weight"] @ first @ q,
        "self_attn.v_proj.bias": old["self_attn.v_proj.bias"] @ per_group,
        "self_attn.o_proj.weight": q.T @ old["self_attn.o_proj.weight"] @ per_head @ across,
        "self_attn.o_proj.bias": old["self_attn.o_proj.bias"] @ q,
        "mlp.gate_proj.weight": old["mlp.gate_proj.weight"] @ second @ q,
        "mlp.gate_proj.bias": old["mlp.gate_proj.bias"],
        "mlp.up_proj.weight": old["mlp.up_proj.weight"] @ second @ q,
        "mlp.up_proj.bias": old["mlp.up_proj.bias"],
        "mlp.down_proj.weight": q.T @ old["mlp.down_proj.weight"] @ hadamard_matrix(96),
        "mlp.down_proj.bias": old["mlp.down_proj.bias"] @ q,
        "input_layernorm.weight": torch.ones(64),
        "post_attention_layernorm.weight": torch.ones(64),
    }
    assert new.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(new[name], tensor.float(), rtol=1e-6, atol=1e-6, msg=name)


def test_every_expert_has_its_own_online_transform(tmp_path: Path) -> None:
    model = opened("qwen3_moe", tmp_path)
    _, sparse = rotate(model.builder, model.blocks[0], Rotation())
    assert sparse == {f"mlp.experts.{expert}.down_proj": Hadamard(size=32) for expert in range(4)}
    _, dense = rotate(model.builder, model.blocks[1], Rotation())
    assert dense == {"mlp.down_proj": Hadamard(size=96)}


def test_the_dtype_is_that_which_was_asked_for(tmp_path: Path) -> None:
    model = opened("qwen3", tmp_path)
    exact, _ = rotate(model.builder, model.blocks[0], ALL, dtype=torch.float64)
    stored, _ = rotate(model.builder, model.blocks[0], ALL, dtype=torch.bfloat16)
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in exact.items())
    q = residual_rotation(64, ALL)
    assert rotate_embedding(model.embedding, q, dtype=torch.float64).dtype is torch.float64
    assert {part.dtype for part in rotate_head(model.head[NORM], model.embedding, q, dtype=torch.bfloat16)} == {
        torch.bfloat16
    }


def test_products_are_computed_in_float64(tmp_path: Path) -> None:
    """Rotating back leaves the weights as they were, far closer than float32 arithmetic would."""
    model = opened("llama", tmp_path)
    rotated, _ = rotate(model.builder, model.blocks[0], only("residual"), dtype=torch.float64)
    q = residual_rotation(64, only("residual"))
    back = q @ rotated["mlp.down_proj.weight"]
    torch.testing.assert_close(back, model.blocks[0]["mlp.down_proj.weight"].double(), rtol=0, atol=1e-13)


def test_a_rotation_may_be_given_as_a_matrix(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    fast, dense = residual_hadamard(64, ALL), residual_rotation(64, ALL)
    torch.testing.assert_close(rotate_embedding(model.embedding, fast), rotate_embedding(model.embedding, dense))
    for by_transform, by_matrix in zip(
        rotate_head(model.head[NORM], model.head[LM_HEAD], fast),
        rotate_head(model.head[NORM], model.head[LM_HEAD], dense),
        strict=True,
    ):
        torch.testing.assert_close(by_transform, by_matrix)


@pytest.mark.parametrize("option", ["residual", "heads"])
def test_random_signs_come_from_the_seed(option: str, tmp_path: Path) -> None:
    model = opened("llama", tmp_path)

    def weight(**changes: Any) -> Tensor:
        rotated, _ = rotate(model.builder, model.blocks[0], only(option, **changes))
        return rotated["self_attn.o_proj.weight"]

    assert torch.equal(weight(seed=1), weight(seed=1))
    assert not torch.equal(weight(seed=1), weight(seed=2))
    assert not torch.equal(weight(random=False), weight())
    with pytest.raises(ValidationError, match="seed: 1: expected 0 unless random"):
        weight(random=False, seed=1)


def test_the_residual_rotation_is_orthogonal_with_signs_before_a_hadamard_matrix() -> None:
    q = residual_rotation(96, Rotation(seed=5))
    torch.testing.assert_close(q @ q.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-13)
    signs = (q / hadamard_matrix(96))[:, :1]
    assert set(signs.round(decimals=9).flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(q, signs * hadamard_matrix(96), rtol=0, atol=1e-13)
    torch.testing.assert_close(residual_rotation(96, Rotation(random=False)), hadamard_matrix(96), rtol=0, atol=1e-13)


def plant_in_stream(model: Model) -> None:
    model.embedding[:, 5] *= 100


def plant_in_head(model: Model) -> None:
    model.blocks[0]["self_attn.v_proj.weight"][5] *= 100


def plant_in_all_heads(model: Model) -> None:
    """One whole head is large: only mixing heads helps."""
    model.blocks[0]["self_attn.v_proj.weight"][16:32] *= 100


def plant_in_product(model: Model) -> None:
    model.blocks[0]["mlp.up_proj.weight"][5] *= 100


@pytest.mark.parametrize(
    ("option", "plant", "linear", "factor"),
    [
        ("residual", plant_in_stream, "self_attn.q_proj", 2.0),
        ("heads", plant_in_head, "self_attn.o_proj", 2.0),
        ("online_output", plant_in_all_heads, "self_attn.o_proj", 1.3),
        ("online_down", plant_in_product, "mlp.down_proj", 2.0),
    ],
)
def test_a_planted_outlier_is_spread(
    option: str, plant: Callable[[Model], None], linear: str, factor: float, tmp_path: Path
) -> None:
    """What counts is the input of the linear, after its online transform: peak over root mean square, per token."""
    model = opened("llama", tmp_path)
    plant(model)
    others = Rotation.model_validate({name: name != option for name in CHANGED})
    assert peak(model.rotated(only(option)), linear) * factor < peak(model, linear)
    assert peak(model.rotated(Rotation(online_output=True)), linear) * factor < peak(model.rotated(others), linear)


def peak(model: Model, linear: str) -> float:
    seen: list[Tensor] = []

    def take(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    block = model.block(0)
    block.linear(linear).register_forward_pre_hook(take)
    block.run(model.hidden(token_ids(1, 16))[0])
    return float((seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean())


def test_a_rotation_that_rotates_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="or it does nothing"):
        Rotation(residual=False, heads=False, online_down=False)
    with pytest.raises(ValidationError, match="seed"):
        Rotation(seed=-1)
    assert Rotation(residual=False, heads=False, online_down=False, online_output=True).kind == "rotation"
