"""Shards that are drawn for experts which saw too few tokens: who gets their moments, and that nobody else changes by a bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration, Starvation
from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.coverage import row_sample
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.parallel import OrderedPool, SideBySide
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tensor_blobs import get_tensors
from counterweight.workers.worker import Worker
from tests.models import VOCABULARY
from tests.workers.test_block import block_of, inputs_of, loaders, shards
from tests.workers.test_coverage import GATHERING
from tests.workers.test_passes import GPTQ, LRC, SMOOTHED, TUNED, content, in_passes, run, site_of, spec_of

FEW = ExpertCalibration(floor=0.5)
"""Tells the experts of a block on two shards apart: some are below it, some are not."""

FEWER = ExpertCalibration(floor=0.3)
"""Likewise on one."""

ENOUGH = ExpertCalibration(floor=0.01)


def gathered(block: Block, first: list[Tensor], drawn: list[list[Tensor]], threads: int = 1) -> PackedStatistics:
    """Statistics of the first shards and of drawn ones, stretch by stretch."""
    pool = OrderedPool(threads)
    gatherings = dict.fromkeys(block.groups, GATHERING)
    sums = RunningStatistics(block, gatherings, sample=row_sample(block, gatherings, FEW))
    run_shards(block, loaders(first), lambda _: None, sums, SideBySide(pool))
    for stretch in drawn:
        run_shards(block, loaders(stretch), lambda _: None, sums.drawing(FEW), SideBySide(pool))
    pool.close()
    return sums.result()


def lacking(block: Block, first: PackedStatistics) -> set[SharedInputGroup]:
    """The groups of experts below the floor; of any block that is used here some are, and some are not."""
    experts = {group: first[group] for group in block.groups if is_expert(group[0])}
    found = {group for group, own in experts.items() if own.tokens < own.width / 2}
    assert 0 < len(found) < len(experts)
    return found


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_who_saw_too_few_is_summed_over_drawn_shards_too_and_nobody_else_is(case: str) -> None:
    block, (one, two, three, four) = block_of(case), shards(4)
    plain, found = gathered(block, [one, two], []), gathered(block, [one, two], [[three, four]])
    starved, rows = lacking(block, plain), inputs_of(block, [one, two, three, four])
    for group in block.groups:
        own, before = found[group], plain[group]
        if group in starved:
            x = rows[group[0]]
            assert own.tokens == len(x)
            assert own.drawn == len(x) - before.tokens
            assert (own.gram - x.T @ x).norm() <= 1e-6 * (x.T @ x).norm()
            assert own.others.keys() == before.others.keys()
        else:
            assert (own.tokens, own.drawn) == (before.tokens, None)
            assert torch.equal(own.gram, before.gram)
            assert all(torch.equal(own.others[name], before.others[name]) for name in before.others)
    assert any(found[group].drawn for group in starved)


def test_who_gets_them_is_decided_before_the_first_and_does_not_change_on_the_way() -> None:
    """Though some reach the floor in the first of the drawn shards; nor do threads and stretches change a bit."""
    block, (one, two, *more) = block_of("mixtral"), shards(6)
    whole = gathered(block, [one, two], [more])
    starved = lacking(block, gathered(block, [one, two], []))
    assert any(gathered(block, [one, two], [more[:1]])[group].tokens >= whole[group].width / 2 for group in starved)
    for stretches, threads in (([[shard] for shard in more], 1), ([more[:3], more[3:]], 3)):
        again = gathered(block, [one, two], stretches, threads)
        for group in block.groups:
            assert again[group].tokens == whole[group].tokens
            assert torch.equal(again[group].gram, whole[group].gram)


def drawing(spec: BlockSpec) -> BlockSpec:
    """The first shard is solved on, the second drawn, the third held out."""
    return spec.model_copy(update={"drawn_from": 1, "held_out_from": 2})


@pytest.mark.parametrize(
    ("recipe", "propagate"), [(GPTQ, "original"), (LRC, "compressed"), (SMOOTHED, "original")], ids=str
)
def test_passes_threads_and_stretches_change_no_bit(recipe: Mapping[str, Any], propagate: Any, tmp_path: Path) -> None:
    site = site_of("mixtral", tmp_path)
    spec = drawing(spec_of(site, recipe, propagate, FEWER))
    if propagate == "compressed":
        spec = spec.model_copy(update={"original_inputs": tuple(reversed(spec.inputs))})
    whole = content(run(Compress(block=spec)))
    assert any(module["drawn"] for module in whole["modules"])
    assert any(not module["drawn"] for module in whole["modules"] if is_expert(module["name"]))
    divided = in_passes(spec, site, 2)
    assert divided.key() == spec.key()
    assert content(run(Compress(block=divided), threads=2)) == whole
    if propagate == "original":
        worker = Worker("cpu")
        for start in range(3):
            worker.run(Calibrate(block=spec.before(start + 1), shards=3, start=start, stop=start + 1))
        assert content(Compress(block=spec).compute(worker.context, spec.setting.open_workspace())) == whole
        worker.close()


@pytest.mark.parametrize(
    ("case", "recipe", "experts"), [("mixtral", GPTQ, ENOUGH), ("llama", TUNED, None), ("mixtral", GPTQ, FEW)], ids=str
)
def test_nothing_changes_but_experts_that_lack_tokens(
    case: str, recipe: Mapping[str, Any], experts: ExpertCalibration | None, tmp_path: Path
) -> None:
    """Blocks are trained on the first shards alone, too."""
    spec = spec_of(site_of(case, tmp_path), recipe, experts=experts).model_copy(update={"drawn_from": 2})
    found, plain = (
        run(Compress(block=spec)),
        run(Compress(block=spec.before(2).model_copy(update={"drawn_from": None}))),
    )
    assert found.made_from != plain.made_from
    changed = set()
    for one, other in zip(found.modules, plain.modules, strict=True):
        if one.model_copy(update={"seconds": 0.0}) != other.model_copy(update={"seconds": 0.0}):
            changed.add(one.name)
            assert one.drawn == one.tokens - other.tokens
        assert one.name in changed or not one.drawn
    assert bool(changed) == (experts is FEW)
    for name, sha256 in found.tensors.items():
        module = name.rpartition(".")[0]
        assert module in changed or plain.tensors[name] == sha256


def test_the_cause_names_both() -> None:
    lack = Starvation(tokens=7, floor=512, rows=4096, weight=256)
    assert lack.cause.startswith("7 of 512 tokens: statistics shrunk toward 4096 tokens of the layer")
    both = Starvation(tokens=7, drawn=5, floor=512, rows=4096, weight=256)
    assert both.cause.startswith("7 of 512 tokens, 5 of them from drawn sequences: statistics shrunk toward 4096")


def test_keys_tell_what_is_drawn(tmp_path: Path) -> None:
    spec = spec_of(site_of("mixtral", tmp_path), GPTQ)
    drawn = spec.model_copy(update={"drawn_from": 2})
    assert drawn.key() != spec.key()
    assert drawn.statistics_key() != spec.statistics_key()
    assert drawn.key() != spec.model_copy(update={"held_out_from": 2}).key()
    assert drawn.calibrate_key() == spec.calibrate_key(), "the original's outputs are the same"
    assert drawn.solving.inputs == spec.inputs[:2]


def test_they_are_shards_of_their_own(tmp_path: Path) -> None:
    site = site_of("llama", tmp_path)
    task: Embed = site.embed(torch.arange(6 * 8).reshape(6, 8) % VOCABULARY)
    drawn = task.model_copy(update={"drawn": 3, "held_out": 1})
    worker = Worker("cpu")
    outputs = [get_tensors(site.workspace, blob)["hidden"] for blob in worker.run(drawn).outputs]
    (whole,) = worker.run(task).outputs
    worker.close()
    assert [len(shard) for shard in outputs] == [2, 3, 1]
    assert torch.equal(torch.cat(outputs), get_tensors(site.workspace, whole)["hidden"])
    others = [task, task.model_copy(update={"held_out": 1}), task.model_copy(update={"drawn": 3})]
    assert drawn.key() not in {other.key() for other in others}
