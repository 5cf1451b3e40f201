"""No bit of what a recipe stores changes unnoticed; and what notices it can tell a change from other arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.workers.config import Method
from counterweight.workers.keys import versions
from counterweight.workers.methods.compensations import SVD, NoCompensation
from counterweight.workers.methods.quantizers import GPTQ, RTN
from counterweight.workers.methods.scales import MeanSquare
from counterweight.workers.recipe import Recipe
from tests.golden.machine import this_machine
from tests.golden.made import CODES, Made, Sources, make
from tests.golden.recipes import RECIPES, Golden
from tests.golden.record import HERE
from tests.golden.records import SWAYING, Entry, Records, Refused, Verdict
from tests.golden.sources import DIGESTS, LENGTH, digest_of
from tests.inprocess import local, run_job
from tests.mortal import MortalPool


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def recorded() -> Records:
    return Records.read(HERE, this_machine())


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    """What recipes made, so that no test makes one again."""
    return {}


def made_of(name: str, made: dict[str, Made], sources: Sources) -> Made:
    if name not in made:
        made[name] = make(RECIPES[name], sources, sources.directory / "jobs" / name)
    return made[name]


def test_models_and_tokens_are_the_same_bits_on_every_machine(sources: Sources) -> None:
    found = {name: digest_of(sources.model(name)) for name in ("dense", "experts")}
    assert {**found, "tokens": digest_of(sources.tokens(64))} == DIGESTS


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stores_what_was_recorded(
    name: str, recorded: Records, made: dict[str, Made], sources: Sources
) -> None:
    verdict = recorded.judge(name, RECIPES[name], made_of(name, made, sources))
    assert verdict.problem is None, verdict.problem
    if not verdict.exact:
        warnings.warn(
            f"{name}: no digests of {this_machine().name}: compared with recorded values within tolerances",
            stacklevel=1,
        )


@pytest.mark.parametrize("name", RECIPES)
def test_deaths_around_every_commit_change_no_bit(
    name: str, made: dict[str, Made], sources: Sources, tmp_path: Path
) -> None:
    """Of no method, with other workers than before."""
    pool = MortalPool(2)
    found = make(RECIPES[name], sources, tmp_path, pool)
    assert found.tensors == made_of(name, made, sources).tensors
    kinds = {"inspect", "embed", "keep", "block", "copy", "join", "checksum"}
    assert pool.deaths >= 2 * len(kinds & {k for _, k in pool.calls})


def test_everything_that_is_recorded_is_a_recipe_and_the_other_way_round(recorded: Records) -> None:
    assert recorded.values.keys() == RECIPES.keys()


def test_every_method_has_a_recipe() -> None:
    used = set[str]().union(*(golden.versions for golden in RECIPES.values()))
    assert used == {"NUMERICS", *_methods(Method)}


def _methods(kind: type[Method]) -> set[str]:
    own = {kind.__name__} if "VERSION" in vars(kind) else set()
    return own.union(*(_methods(below) for below in kind.__subclasses__()))


def test_what_sways_is_a_kind_of_values() -> None:
    assert {kind for golden in RECIPES.values() for kind in golden.sways} <= SWAYING.keys()


def test_tolerances_hold_under_other_arithmetic() -> None:
    """In a process of its own: torch without vector instructions and MKL on another path, of which no digest is recorded."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    names = ("gptq-two-shards", "lrc-joint", "svd-anticipated", "rotation")
    tests = [f"{__file__}::{test_a_recipe_stores_what_was_recorded.__name__}[{name}]" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", *tests], env=environment, capture_output=True, text=True, check=False
    )
    assert "4 passed, 4 warnings" in done.stdout, done.stdout
    assert all(f"{name}: no digests of default-" in done.stdout for name in names)


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("rtn-mse-asymmetric", "weights.quantizer.scale.norm", 2.0),
        ("rtn-mse-unweighted", "weights.quantizer.scale.weighted", True),
        ("gptq-two-shards", "weights.quantizer.damping", 0.02),
        ("gptq-two-shards", "weights.quantizer.refinement", 0),
        ("gptq-as-it-comes", "weights.quantizer.refinement", 1),
        ("gptq-as-it-comes", "weights.quantizer.act_order", True),
        ("gptq-regressed", "weights.quantizer.target", "mixed"),
        ("gptq-mixed", "weights.quantizer.mix", 0.4),
        ("activations-clipped", "activations.clip", 0.88),
        ("activations-searched", "activations.clip", 1.0),
        ("svd-magnitude", "compensation.whitening", "diagonal"),
        ("svd-diagonal-energy", "compensation.damping", 0.5),
        ("svd-budget", "compensation.rank.budget_bits", 2.1),
        ("svd-anticipated", "compensation.anticipation", 0.55),
        ("lrc-joint", "compensation.damping", 0.05),
        ("lrc-joint", "compensation.damping", 0.3),
        ("aser", "compensation.reference", "median"),
        ("aser", "compensation.choose", "activations"),
        ("aser-unsmoothed", "compensation.damping", 0.0),
        ("rotation", "transforms", [{"kind": "rotation", "seed": 8}]),
        ("smoothing", "transforms", [{"kind": "smoothing", "strength": 0.5}]),
        ("tuning", "tuning.seed", 1),
        ("tuning", "tuning.epochs", 3),
        ("residual", "residual.candidates", 13),
        ("overrides", "keep", ["lm_head"]),
    ],
)
def test_tolerances_notice_an_option_that_changed(
    name: str, where: str, value: Any, recorded: Records, sources: Sources, tmp_path: Path
) -> None:
    """On a machine without recorded digests the tolerances are all there is."""
    golden = RECIPES[name]
    changed = replace(golden, recipe=_changed(golden.recipe, where.split("."), value))
    result = make(changed, sources, tmp_path)
    assert recorded.values[name].beyond(golden, result)


def _changed(recipe: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return {**recipe, first: _changed(recipe.get(first, {}), rest, value) if rest else value}


class TestRecords:
    """Without jobs: one made-up result."""

    golden = Golden(recipe={"weights": {"bits": 4, "quantizer": {"kind": "rtn"}}})
    before = Made(tensors={"a": "1" * 64, "b": "2" * 64}, values={CODES: torch.tensor([1, 2, 3], dtype=torch.int8)})
    after = replace(before, tensors={"a": "1" * 64, "b": "3" * 64})

    @pytest.fixture
    def records(self, tmp_path: Path) -> Records:
        records = Records.read(tmp_path, this_machine())
        records.record("one", self.golden, self.before)
        records.write()
        return Records.read(tmp_path, this_machine())

    def test_the_same_bits_pass(self, records: Records) -> None:
        verdict = records.judge("one", self.golden, self.before)
        assert (verdict.problem, verdict.exact) == (None, True)

    def test_other_bits_under_the_same_versions_fail_and_are_not_recorded(self, records: Records) -> None:
        problem = records.judge("one", self.golden, self.after).problem
        assert problem is not None
        assert problem.startswith("one: bits changed, versions did not: b. ")
        with pytest.raises(Refused, match="bits changed"):
            records.record("one", self.golden, self.after)

    def test_other_bits_under_a_raised_version_ask_to_be_recorded(
        self, records: Records, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RTN, "VERSION", RTN.VERSION + 1)
        problem = records.judge("one", self.golden, self.after).problem
        assert problem is not None
        assert problem.endswith("record anew: python -m tests.golden.record")
        records.record("one", self.golden, self.after)
        assert records.judge("one", self.golden, self.after).problem is None

    def test_another_machine_compares_values(self, records: Records) -> None:
        other = replace(records, machine=replace(records.machine, fingerprint="f" * 64), entries={})
        assert other.judge("one", self.golden, self.after).problem is None
        far = replace(self.after, values={CODES: torch.tensor([1, 2, 4], dtype=torch.int8)})
        verdict = other.judge("one", self.golden, far)
        assert not verdict.exact
        assert verdict.problem is not None
        assert "codes 0.33, expected at most 0.01" in verdict.problem

    def test_another_machine_tells_another_shape(self, records: Records) -> None:
        other = replace(records, entries={})
        for codes in (torch.tensor([1, 2], dtype=torch.int8), torch.empty(0)):
            problem = other.judge("one", self.golden, replace(self.after, values={CODES: codes})).problem
            assert "codes inf" in str(problem)

    def test_another_machine_records_only_what_is_near(self, records: Records) -> None:
        other = replace(records, machine=replace(records.machine, fingerprint="f" * 64), entries={})
        far = replace(self.after, values={CODES: torch.tensor([1, 2, 4], dtype=torch.int8)})
        with pytest.raises(Refused, match="further from the recorded values"):
            other.record("one", self.golden, far)
        other.record("one", self.golden, self.after)
        assert other.judge("one", self.golden, self.after) == Verdict(problem=None, exact=True)

    def test_digests_of_earlier_versions_leave_values_to_compare(
        self, records: Records, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Somebody raised a version and recorded on another machine: this one must not fail for that.
        monkeypatch.setattr(RTN, "VERSION", RTN.VERSION + 1)
        other = Records.read(records.directory, replace(records.machine, fingerprint="f" * 64))
        other.record("one", self.golden, self.before)
        other.write()
        verdict = Records.read(records.directory, records.machine).judge("one", self.golden, self.after)
        assert verdict == Verdict(problem=None, exact=False)

    def test_versions_of_other_methods_do_not_matter(self, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GPTQ, "VERSION", GPTQ.VERSION + 1)
        assert records.judge("one", self.golden, self.before) == Verdict(problem=None, exact=True)

    def test_another_job_asks_to_be_recorded(self, records: Records) -> None:
        problem = records.judge("one", replace(self.golden, sequences=63), self.before).problem
        assert "record anew" in str(problem)

    def test_recording_again_changes_no_byte(self, records: Records) -> None:
        files = [path for path in records.directory.rglob("*") if path.is_file()]
        written = [path.read_bytes() for path in files]
        records.record("one", self.golden, self.before)
        records.write()
        assert len(files) == 2
        assert [path.read_bytes() for path in files] == written

    def test_a_tensor_more_is_named_as_such(self) -> None:
        entry = Entry.of(self.golden, self.before)
        assert entry.changed(replace(self.before, tensors={"a": "1" * 64})) == ["the set of names, now 1, before 2"]


def test_versions_are_those_of_the_methods_that_a_recipe_uses() -> None:
    recipe = Recipe.model_validate({"weights": {"bits": 4, "quantizer": {"kind": "gptq"}}})
    assert versions(recipe) == {method.__name__: method.VERSION for method in (GPTQ, MeanSquare, NoCompensation)}


def test_a_raised_version_leaves_the_finished_blocks_of_other_methods_valid(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}},
        "compensation": {"kind": "svd", "rank": {"count": 4}},
        "overrides": [{"match": "*.layers.0.*", "compensation": {"kind": "none"}}],
    }
    calibration = {
        "source": {"kind": "tokens", "uri": sources.tokens(64).as_uri()},
        "sequences": 64,
        "sequence_length": LENGTH,
    }

    def reused() -> dict[str, bool]:
        published = run_job(sources.model("dense"), tmp_path, recipe, calibration=calibration)
        tasks = json.loads((local(published) / "report" / "report.json").read_text())["tasks"]
        return {task["name"]: task["reused"] for task in tasks if task["name"].startswith("block")}

    assert reused() == {"block 0": False, "block 1": False}
    monkeypatch.setattr(SVD, "VERSION", SVD.VERSION + 1)
    assert reused() == {"block 0": True, "block 1": False}
    monkeypatch.setattr(RTN, "VERSION", RTN.VERSION + 1)
    assert reused() == {"block 0": False, "block 1": False}
