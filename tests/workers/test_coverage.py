"""Experts that saw too few tokens: what they are solved on, against products in float64 of rows taken by other hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.coverage import feed, row_sample
from counterweight.workers.errors import RequestError
from counterweight.workers.hooks import input_hooks
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.family import is_expert
from counterweight.workers.parallel import OrderedPool, SideBySide
from counterweight.workers.shards import RunningStatistics, run_shards
from tests.workers.test_block import block_of, inputs_of, loaders, shards

GATHERING = Gathering(activations=ActivationFormat(bits=8))
CASES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"]
"""Experts that are given the routing, with biases too, and experts that are given what the router scaled."""


def sparse(case: str) -> Block:
    return block_of(case, index=1 if case == "llama4_text" else 0)


def gathered(
    block: Block, hidden: list[Tensor], options: ExpertCalibration | None, threads: int = 1
) -> tuple[PackedStatistics, Tensor | None]:
    """What a pass gathers, and the tokens that it keeps."""
    pool = OrderedPool(threads)
    gatherings = dict.fromkeys(block.groups, GATHERING)
    every_token = options is not None and options.every_token
    sums = RunningStatistics(block, gatherings, every_token=every_token, sample=row_sample(block, gatherings, options))
    run_shards(block, loaders(hidden), lambda output: None, sums, SideBySide(pool))
    pool.close()
    return sums.result(), sums.take_rows()


def same(one: InputStatistics, other: InputStatistics) -> bool:
    return torch.equal(one.gram, other.gram) and one.starvation == other.starvation and one.tokens == other.tokens


def given(block: Block, hidden: list[Tensor]) -> Tensor:
    """What the block's experts are given: of transformers' MLP, by a hook of our own."""
    seen: list[Tensor] = []
    named = block.separate_experts()
    assert named is not None
    handle = named[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for shard in hidden:
        block.run(shard)
    handle.remove()
    rows = torch.cat(seen)
    return rows[rows.abs().sum(-1) > 0]


@pytest.mark.parametrize("case", CASES)
def test_below_the_floor_an_expert_is_shrunk_toward_what_it_makes_of_the_layers_tokens(case: str) -> None:
    block, hidden = sparse(case), shards(3)
    options = ExpertCalibration(floor=64, strength=0.5)
    found, rows = gathered(block, hidden, options)
    assert rows is not None
    torch.testing.assert_close(rows, given(block, hidden))
    own = dict(found)
    feed(block, found, dict.fromkeys(block.groups, GATHERING), rows, options)
    named = block.separate_experts()
    assert named is not None
    for group in filter(lambda group: is_expert(group[0]), block.groups):
        expert = int(group[0].split(".experts.")[1].split(".")[0])
        seen: list[Tensor] = []
        with torch.no_grad(), input_hooks(block, [group], lambda _, x, seen=seen: seen.append(x)):
            named[1].run(expert, rows)
        x = torch.cat(seen).double()
        weight = round(0.5 * x.shape[1])
        expected = own[group].gram + weight * (x.T @ x) / len(x)
        assert (found[group].gram - expected).norm() <= 1e-6 * expected.norm()
        assert found[group].others.keys() == {"xy", "yy"}
        assert found[group].tokens == own[group].tokens + weight
        starvation = found[group].starvation
        assert starvation is not None
        assert (starvation.tokens, starvation.floor) == (own[group].tokens, 64 * x.shape[1])
    dense = [group for group in block.groups if not is_expert(group[0])]
    assert dense
    assert all(same(found[group], own[group]) for group in dense)


def test_above_the_floor_nothing_changes() -> None:
    block, hidden = sparse("mixtral"), shards(3)
    few = min(found.tokens for group, found in gathered(block, hidden, None)[0].items() if is_expert(group[0]))
    options = ExpertCalibration(floor=few / 96)
    found, rows = gathered(block, hidden, options)
    assert rows is not None
    own = dict(found)
    feed(block, found, dict.fromkeys(block.groups, GATHERING), rows, options)
    assert all(same(found[group], own[group]) for group in own)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_what_is_kept_change_no_sum(threads: int) -> None:
    block, hidden = sparse("qwen3_moe"), shards(5)
    plain, nothing = gathered(block, hidden, None)
    found, rows = gathered(block, hidden, ExpertCalibration(sample=0.5), threads)
    assert nothing is None
    assert rows is not None
    assert torch.equal(rows, given(block, hidden)[::8])
    assert all(torch.equal(found[group].gram, plain[group].gram) for group in plain)


def test_a_dense_block_and_a_floor_of_nothing_keep_no_tokens() -> None:
    assert gathered(block_of("llama"), shards(2), ExpertCalibration())[1] is None
    assert gathered(sparse("mixtral"), shards(2), ExpertCalibration(floor=0))[1] is None


@pytest.mark.parametrize("case", CASES)
def test_every_token_through_every_expert(case: str) -> None:
    block, hidden = sparse(case), shards(2)
    found, rows = gathered(block, hidden, ExpertCalibration(every_token=True), threads=2)
    assert rows is None
    plain = inputs_of(block, hidden)
    everything = given(block, hidden).double()
    for group, statistics in found.items():
        if group[0].endswith("gate_proj") and is_expert(group[0]):
            expected = everything.T @ everything
            assert statistics.tokens == len(everything)
            assert (statistics.gram - expected).norm() <= 1e-6 * expected.norm()
        elif is_expert(group[0]):
            assert statistics.tokens == len(everything)
        else:
            assert statistics.tokens == len(plain[group[0]])


def test_every_token_changes_no_output() -> None:
    block, hidden = sparse("mixtral"), shards(2)
    outputs = {}
    for every in (False, True):
        sums = RunningStatistics(block, dict.fromkeys(block.groups, Gathering()), every_token=every)
        outputs[every] = run_shards(block, loaders(hidden), lambda output: output, sums, SideBySide(OrderedPool(1)))
    assert all(torch.equal(one, two) for one, two in zip(outputs[False], outputs[True], strict=True))


def test_what_is_not_finite_elsewhere_is_told_by_name() -> None:
    block = sparse("mixtral")
    options = ExpertCalibration(floor=64)
    own, rows = gathered(block, shards(2), options)
    assert rows is not None
    rows[0] = 1e30
    with pytest.raises(
        RequestError, match=r"the input of mlp\.experts\.0\..* is not finite .* calibration\.experts\.floor 0"
    ):
        feed(block, own, dict.fromkeys(block.groups, GATHERING), rows, options)
