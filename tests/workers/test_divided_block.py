"""A block that workers share: each solves some linears and runs it over some shards; the bits of one worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.models.family import is_expert
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.propagate import Propagate
from counterweight.workers.tasks.solve import Solve, SolvedRecord
from counterweight.workers.worker import Worker
from tests.workers.noise import GPTQ, LRC, SMOOTHED, content, in_passes, run, site_of, spec_of
from tests.workers.specs import Site

BIASED = {**GPTQ, "weights": {"bits": 4, "group_size": 32, "symmetric": False, "quantizer": {"kind": "rtn"}}}
ASER = {
    "weights": {"bits": 4, "quantizer": {"kind": "gptq"}},
    "activations": {"bits": 8, "clip": "search"},
    "compensation": {"kind": "aser", "rank": {"count": 4}, "factor_bits": 4},
}
ROTATED = {**LRC, "transforms": [{"kind": "rotation"}], "residual": {"selection": "static"}}
SMOOTHED_LRC = {**SMOOTHED, "compensation": {"kind": "lrc", "rank": {"count": 4}}}


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    found = [Worker("cpu", threads) for threads in (1, 2, 1)]
    yield found
    for worker in found:
        worker.close()


def paired(spec: BlockSpec) -> BlockSpec:
    """With inputs in the original model that are others."""
    return spec.model_copy(update={"original_inputs": tuple(reversed(spec.inputs))})


def units_of(spec: BlockSpec, site: Site) -> list[tuple[str, ...]]:
    return list(in_passes(spec, site, 1).passes)


def shared(spec: BlockSpec, site: Site, workers: list[Worker]) -> BlockRecord:
    """Two workers solve; they and a third, which has loaded nothing of the block yet, run over a shard each; that one joins."""
    units = units_of(spec, site)
    parts = [tuple(name for unit in units[place::2] for name in unit) for place in range(2)]
    solved = tuple(
        workers[place].run(Solve(block=spec, linears=linears, part=place, parts=2))
        for place, linears in enumerate(parts)
    )
    stretches = [
        worker.run(Propagate(block=spec, solved=solved, start=place, stop=place + 1))
        for place, worker in enumerate(workers)
    ]
    return workers[2].run(Compress(block=spec, solved=solved, propagated=tuple(stretches)))


@pytest.mark.parametrize(
    ("case", "recipe", "originals"),
    [
        ("mixtral", GPTQ, False),
        ("mixtral", ROTATED, True),
        ("llama", SMOOTHED_LRC, True),
        ("llama", ASER, False),
        ("llama", BIASED, True),
        ("gpt_oss", GPTQ, False),
    ],
)
def test_what_workers_make_of_a_block_is_what_one_makes(
    case: str, recipe: Mapping[str, Any], originals: bool, tmp_path: Path, workers: list[Worker]
) -> None:
    site = site_of(case, tmp_path)
    spec = spec_of(site, recipe, "compressed")
    spec = paired(spec) if originals else spec
    whole = content(run(Compress(block=spec)))
    assert len(whole["outputs"]) == 3
    assert len(whole["original_outputs"]) == 3 * originals
    assert content(shared(spec, site, workers)) == whole
    if recipe is ROTATED:
        # Solved in passes: experts run on weights that are let go when they are solved.
        (site.work / "_work" / "commits" / "block" / f"{spec.key()}.json").unlink()
        for part in (site.work / "_work" / "commits" / "solve").iterdir():
            part.unlink()
        assert content(shared(in_passes(spec, site, 2), site, workers)) == whole


def test_starved_drawn_and_held_out_tokens_are_those_of_one_worker(tmp_path: Path, workers: list[Worker]) -> None:
    site = site_of("mixtral", tmp_path)
    spec = spec_of(site, GPTQ, "compressed", ExpertCalibration(floor=64))
    spec = spec.model_copy(update={"drawn_from": 1, "held_out_from": 2})
    whole = content(run(Compress(block=spec)))
    assert any(module["fallbacks"] for module in whole["modules"])
    assert any(module["drawn"] for module in whole["modules"])
    assert all(module["held_out"] for module in whole["modules"])
    assert content(shared(spec, site, workers)) == whole


def test_a_worker_gathers_and_runs_what_its_linears_need(
    tmp_path: Path, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the experts of others; and a block that it has solved a part of is not loaded again."""
    from counterweight.workers import calibrated_block, divided_block, shards

    site = site_of("mixtral", tmp_path)
    spec = spec_of(site, GPTQ, "compressed")
    gathered: set[str] = set()
    of = shards.RunningStatistics.of

    def recorded(self: Any, group: Any, *rest: Any) -> Any:
        gathered.update(group)
        return of(self, group, *rest)

    loads: list[int] = []
    load = calibrated_block.load_block
    monkeypatch.setattr(shards.RunningStatistics, "of", recorded)
    monkeypatch.setattr(calibrated_block, "load_block", lambda *a, **k: (loads.append(1), load(*a, **k))[1])
    ran: list[str] = []
    look = divided_block.look

    def looked(context: Any, part: Any, held: Any, *rest: Any) -> Any:
        for name in filter(is_expert, spec.recipe):
            held.loaded.block.linear(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        return look(context, part, held, *rest)

    monkeypatch.setattr(divided_block, "look", looked)
    units = units_of(spec, site)
    own = next(unit for unit in units if is_expert(unit[0]))
    solved = workers[0].run(Solve(block=spec, linears=own, part=0, parts=2))
    assert gathered == set(own) == set(ran)
    rest = tuple(name for unit in units if unit != own for name in unit)
    others = workers[1].run(Solve(block=spec, linears=rest, part=1, parts=2))
    assert len(loads) == 2
    for place in (0, 1):
        workers[place].run(Propagate(block=spec, solved=(solved, others), start=place, stop=place + 1))
    workers[1].run(Propagate(block=spec, solved=(solved, others), start=2, stop=3))
    assert len(loads) == 2


def test_a_finished_block_is_found_by_parts_of_any_division(tmp_path: Path, workers: list[Worker]) -> None:
    site = site_of("llama", tmp_path)
    spec = spec_of(site, GPTQ, "compressed")
    part = Solve(block=spec, linears=units_of(spec, site)[0], part=0, parts=4)
    stretch = Propagate(block=spec, solved=(), start=1, stop=3)
    assert part.lookup(site.workspace) is None
    assert stretch.lookup(site.workspace) is None
    whole = workers[0].run(Compress(block=spec))
    found = part.lookup(site.workspace)
    assert isinstance(found, SolvedRecord)
    assert found.blobs == whole.stored
    assert found.hidden_states == (), "what is finished is not discarded with the parts of this job"
    behind = stretch.lookup(site.workspace)
    assert behind is not None
    assert behind.outputs == whole.outputs[1:]
    # From the finished block alone, on a worker that has seen nothing of it.
    again = workers[2].run(Propagate(block=spec, solved=(found,), start=1, stop=3))
    assert again.outputs == behind.outputs
