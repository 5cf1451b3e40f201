"""Shards that nothing is solved on: they change no bit of what is solved, and what is solved is judged by them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.coverage import ENOUGH, judged_by
from counterweight.workers.held_out import LIMIT, HeldOutRows
from counterweight.workers.hooks import input_hooks
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.parallel import OrderedPool, SideBySide
from counterweight.workers.shards import run_shards
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tensor_blobs import get_tensors
from counterweight.workers.worker import Worker
from tests.models import VOCABULARY
from tests.workers.specs import Site
from tests.workers.test_block import block_of, inputs_of, loaders, shards
from tests.workers.test_passes import GPTQ, LRC, SMOOTHED, TUNED, content, in_passes, run, site_of, spec_of

REGRESSED = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq", "target": "regressed"}}}


def held_out(block: Block, hidden: list[Tensor], originals: list[Tensor] | None = None) -> HeldOutRows:
    rows = HeldOutRows(block, dict.fromkeys(block.groups, Gathering()))
    pool = OrderedPool(2)
    run_shards(block, loaders(hidden), lambda output: None, rows, SideBySide(pool), loaders(originals or []))
    pool.close()
    return rows


def test_rows_are_what_enters_each_linear() -> None:
    block, hidden = block_of("llama"), shards(3)
    rows, expected = held_out(block, hidden), inputs_of(block, hidden)
    for group in block.groups:
        found = rows.rows(group)
        assert found is not None
        assert found.original is None
        assert torch.equal(found.x, expected[group[0]])


def test_no_more_rows_stay_than_the_limit_and_those_of_both_streams_are_of_the_same_tokens() -> None:
    block, hidden = block_of("llama"), [torch.randn(30, 24, 64) for _ in range(2)]
    rows = held_out(block, hidden, hidden)
    for group in block.groups:
        found = rows.rows(group)
        assert found is not None
        assert LIMIT // 2 < len(found.x) <= LIMIT
        assert found.original is not None
        assert torch.equal(found.x, found.original)


def test_an_expert_with_few_held_out_tokens_is_judged_by_those_of_its_layer() -> None:
    block, hidden = block_of("mixtral"), shards(1)
    unseen = held_out(block, hidden)
    found = judged_by(block, block.groups, unseen)
    named = block.separate_experts()
    assert named is not None
    assert unseen.sample is not None
    given = unseen.sample.rows()
    assert given is not None
    few: set[SharedInputGroup] = set()
    for group in block.groups:
        own = unseen.rows(group)
        if is_expert(group[0]) and (own is None or len(own.x) < ENOUGH):
            few.add(group)
            seen: list[Tensor] = []
            with torch.no_grad(), input_hooks(block, [group], lambda _, x, seen=seen: seen.append(x)):
                named[1].run(int(group[0].split(".")[2]), given)
            assert torch.equal(found[group].x, torch.cat(seen))
        else:
            assert own is not None
            assert torch.equal(found[group].x, own.x)
        assert found[group].of_layer == (group in few)
    assert few


@pytest.mark.parametrize(
    ("case", "recipe", "experts"),
    [
        ("llama", LRC, None),
        ("llama", SMOOTHED, None),
        ("llama", TUNED, None),
        ("mixtral", GPTQ, ExpertCalibration(floor=64)),
        ("mixtral", GPTQ, ExpertCalibration(every_token=True)),
    ],
)
def test_nothing_is_solved_on_them_and_every_linear_is_judged_by_them(
    case: str, recipe: Mapping[str, Any], experts: ExpertCalibration | None, tmp_path: Path
) -> None:
    """In one pass or several, on one thread or two."""
    site = site_of(case, tmp_path)
    whole = spec_of(site, recipe, experts=experts)
    spec = whole.model_copy(update={"held_out_from": 2})
    found, plain = content(run(Compress(block=spec))), content(run(Compress(block=whole.before(2))))
    assert found.pop("made_from") != plain.pop("made_from")
    judged = [module.pop("held_out") for module in found["modules"]]
    assert [module.pop("held_out") for module in plain["modules"]] == [None] * len(judged)
    for error in ("error_quantized", "error_compensated"):
        assert [module.pop(error) for module in found["modules"]] == [None] * len(judged), "one figure, not two"
        assert all(module.pop(error) > 0 for module in plain["modules"])
    assert found == plain
    assert all(0 < held_out["compensated"] <= 2 * held_out["quantized"] for held_out in judged)
    if recipe is not TUNED:
        divided = in_passes(spec, site, 2)
        again = content(run(Compress(block=divided), threads=2))
        assert [module["held_out"] for module in again["modules"]] == judged


def test_of_two_streams_the_target_is_the_originals_output(tmp_path: Path) -> None:
    """A linear that sees something else than the original's does is judged by what the original's makes."""
    site = site_of("llama", tmp_path)
    spec = spec_of(site, REGRESSED, "compressed").model_copy(update={"held_out_from": 2})
    same = run(Compress(block=spec.model_copy(update={"original_inputs": spec.inputs}))).modules[0].held_out
    turned = tuple(reversed(spec.inputs))
    other = run(Compress(block=spec.model_copy(update={"original_inputs": turned}))).modules[0].held_out
    assert same.compensated < 0.1
    assert other.compensated > 0.5


def test_keys_tell_what_is_held_out(tmp_path: Path) -> None:
    spec: BlockSpec = spec_of(site_of("llama", tmp_path), GPTQ)
    held_out = spec.model_copy(update={"held_out_from": 2})
    assert held_out.key() != spec.key()
    assert held_out.statistics_key() != spec.statistics_key()
    assert held_out.calibrate_key() == spec.calibrate_key(), "the original's outputs are the same"
    assert held_out.solving.inputs == spec.inputs[:2]


def test_they_are_shards_of_their_own(tmp_path: Path) -> None:
    site: Site = site_of("llama", tmp_path)
    task: Embed = site.embed(torch.arange(6 * 8).reshape(6, 8) % VOCABULARY)
    worker = Worker("cpu")
    outputs = [
        [len(get_tensors(site.workspace, blob)["hidden"]) for blob in worker.run(one).outputs]
        for one in (task, task.model_copy(update={"held_out": 2}))
    ]
    worker.close()
    assert outputs == [[6], [4, 2]]
    assert task.key() != task.model_copy(update={"held_out": 2}).key()
