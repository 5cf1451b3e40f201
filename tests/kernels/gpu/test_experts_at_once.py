"""Experts that run together where kernels do are the experts that run one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

for needed in ("pydantic", "transformers"):  # the rest of this folder needs torch and triton alone
    pytest.importorskip(needed)

from counterweight.kernels.forms import ActivationFormat  # noqa: E402
from counterweight.workers.calibration.statistics import Gathering, InputStatistics  # noqa: E402
from counterweight.workers.drawing import DrawnStatistics  # noqa: E402
from counterweight.workers.models import at_once  # noqa: E402
from counterweight.workers.models.block_builder import Block, BlockBuilder  # noqa: E402
from counterweight.workers.models.family import SharedInputGroup, is_expert  # noqa: E402
from counterweight.workers.parallel import Overlapped  # noqa: E402
from counterweight.workers.shards import RunningStatistics, run_shards  # noqa: E402
from tests.models import CASES, build  # noqa: E402

RECIPES = {"products": Gathering(), "of quantized inputs": Gathering(activations=ActivationFormat(bits=8))}
Ran = tuple[dict[SharedInputGroup, InputStatistics], list[Tensor]]


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[int]]:
    """Has experts run together or not; what it gives back counts how often they did."""
    calls: list[int] = []
    run = at_once.AtOnce.__call__

    def use(yes: bool) -> list[int]:
        calls.clear()
        for module in ("models.at_once", "shards", "calibration.statistics"):
            monkeypatch.setattr(f"counterweight.workers.{module}.runs_kernels", lambda _: yes)
        monkeypatch.setattr(at_once.AtOnce, "__call__", lambda *given: calls.append(1) or run(*given))
        return calls

    return use


def block_on(device: torch.device, case: str = "qwen3_moe") -> Block:
    model = build(case)
    builder = BlockBuilder({**model.config.to_dict(), "model_type": CASES[case].family})
    tensors = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    parameters = {name: part.of(tensors[part.source]) for name, part in builder.layout.sources(0, tensors).items()}
    return builder.block(0, parameters, device, torch.float16)


def shards_on(device: torch.device, block: Block) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = block.linear(block.groups[0][0]).in_features
    return [torch.randn(1, 12, width, generator=generator).half().to(device) for _ in range(2)]


def ran(block: Block, hidden: list[Tensor], gathering: Gathering) -> Ran:
    shards = Overlapped()
    sums = RunningStatistics(block, dict.fromkeys(block.groups, gathering))
    outputs = run_shards(block, [lambda shard=shard: shard for shard in hidden], lambda output: output, sums, shards)
    shards.close()
    return dict(sums.result().items()), outputs


@pytest.mark.parametrize("gathering", RECIPES.values(), ids=RECIPES)
def test_sums_and_outputs_are_those_of_one_by_one(
    gathering: Gathering, device: torch.device, on_kernels: Callable[[bool], list[int]]
) -> None:
    block = block_on(device)
    hidden = shards_on(device, block)[:1]
    on_kernels(False)
    expected, outputs = ran(block, hidden, gathering)
    calls = on_kernels(True)
    found, together = ran(block, hidden, gathering)
    assert len(calls) == len(hidden)
    for one, other in zip(outputs, together, strict=True):
        torch.testing.assert_close(other, one, rtol=5e-3, atol=5e-3)
    assert found.keys() == expected.keys()
    assert any(is_expert(group[0]) and statistics.tokens for group, statistics in found.items())
    for group, statistics in expected.items():
        assert found[group].tokens == statistics.tokens, group
        for pair in ("xx", "yy", "xy") if gathering.activations else ("xx",):
            product = statistics.product(pair)
            close = 2e-2 * max(1.0, float(product.abs().max()))
            torch.testing.assert_close(found[group].product(pair), product, rtol=1e-2, atol=close)


def test_experts_that_are_not_asked_for_do_not_run(
    device: torch.device, on_kernels: Callable[[bool], list[int]]
) -> None:
    block = block_on(device)
    hidden = shards_on(device, block)[0]
    asked = [group[0] for group in block.groups if is_expert(group[0])][:3]
    outputs: dict[bool, Tensor] = {}
    for together in (False, True):
        calls = on_kernels(together)
        with block.asking(asked):
            outputs[together] = block.run(hidden)
        assert bool(calls) is together
    torch.testing.assert_close(outputs[True], outputs[False], rtol=5e-3, atol=5e-3)
    assert not torch.allclose(outputs[True], block.run(hidden), rtol=5e-3, atol=5e-3)


def test_drawn_rows_are_added_to_the_experts_that_lack_them(
    device: torch.device, on_kernels: Callable[[bool], list[int]]
) -> None:
    block = block_on(device)
    hidden = shards_on(device, block)
    experts = [group for group in block.groups if is_expert(group[0])]
    on_kernels(True)
    sums = RunningStatistics(block, dict.fromkeys(block.groups, Gathering()))
    drawn = DrawnStatistics(sums, dict.fromkeys(experts[::2], 0))
    shards = Overlapped()
    run_shards(block, [lambda: hidden[0]], lambda output: output, drawn, shards)
    shards.close()
    tokens = {group: found.tokens for group, found in sums.result().items()}
    assert sum(tokens[group] for group in experts[::2]) > 0
    assert not any(tokens[group] for group in block.groups if group not in experts[::2])


def test_who_cannot_run_together_runs_one_by_one(device: torch.device, on_kernels: Callable[[bool], list[int]]) -> None:
    on_kernels(True)
    block = block_on(device)
    ((_, experts),) = block.experts()
    few, device = experts.experts, block.device
    with torch.no_grad():
        assert experts.at_once(few, torch.float16, device) is not None
        assert experts.at_once(few, torch.float32, device) is None
        assert experts.at_once(few << 20, torch.float16, device) is None
        with experts.get_submodule("0.down_proj").register_forward_pre_hook(lambda *_: None):
            assert experts.at_once(few, torch.float16, device) is None
    assert experts.at_once(few, torch.float16, device) is None
