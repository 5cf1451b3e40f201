"""What was recorded of the golden recipes, and what is said of a result that is compared with it.

    digests/<machine>.json  every stored tensor's digest, per machine: there, not a bit may change
    values.safetensors      samples of the tensors' values, for all other machines: there, `TOLERANCES` hold

An entry counts only for the job and the versions that it was recorded for. `python -m tests.golden.record` writes both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from counterweight.workers.keys import digest
from tests.golden.machine import Machine
from tests.golden.made import BRANCHES, CODES, CORRECTIONS, ERRORS, KEPT, SCALES, Made
from tests.golden.recipes import Golden

COMMAND = "python -m tests.golden.record"

STEADY: Mapping[str, float] = {CODES: 0.01, SCALES: 0.01, BRANCHES: 0.1, CORRECTIONS: 0.02, KEPT: 1e-3, ERRORS: 0.005}
"""Kind of values -> how far they may be from the recorded ones: of codes the share that differs, otherwise ||a - b|| / ||b||.

Seen with other instruction sets of torch, MKL and oneDNN: 0.0022, 0.004, 0.043, 0, 9e-5 and 0.0024; of recipes in float32 in
which nothing sways 0, 0, 8e-6, 0, 3e-8 and 1e-4. The rest is room for ties that fall the other way.
"""

SWAYING: Mapping[str, float] = {CODES: 0.4, SCALES: 0.1, BRANCHES: 0.8, CORRECTIONS: 0.3, KEPT: 0.03, ERRORS: 0.04}
"""Likewise, of kinds that sway in a recipe; seen: 0.34 (factors of 4 bits, without vector instructions), 0.041, 0.54, 0.13,
0.014, 0.019. Where codes differ, a branch differs much: what rounding leaves has no few strong directions, and others are as
good. That they are is what the errors say."""

SHORT = 16
"""Hex digits of a tensor's digest that are kept, to say which one changed."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was recorded of a recipe. digest: of all tensors' names and digests. names: digest of the names. tensors: the
    beginnings of the tensors' digests, in the order of their names, with spaces between."""

    asked: str
    versions: Mapping[str, int]
    digest: str
    names: str
    tensors: str

    @classmethod
    def of(cls, golden: Golden, made: Made) -> Entry:
        """What is to be recorded of `made`."""
        return cls(
            asked=golden.asked,
            versions=golden.versions,
            digest=digest(made.tensors),
            names=digest(sorted(made.tensors))[:SHORT],
            tensors=" ".join(made.tensors[name][:SHORT] for name in sorted(made.tensors)),
        )

    def answers(self, golden: Golden) -> bool:
        """Whether it was recorded for this job under these versions."""
        return self.asked == golden.asked and self.versions == golden.versions

    def changed(self, made: Made) -> list[str]:
        """Names of the tensors that are not what they were."""
        names = sorted(made.tensors)
        if digest(names)[:SHORT] != self.names:
            return [f"the set of names, now {len(names)}, before {len(self.tensors.split())}"]
        return [
            name
            for name, recorded in zip(names, self.tensors.split(), strict=True)
            if not made.tensors[name].startswith(recorded)
        ]


@dataclass(frozen=True, kw_only=True)
class Values:
    """Sampled values that were recorded of a recipe: see `Made.values`."""

    asked: str
    versions: Mapping[str, int]
    tensors: Mapping[str, Tensor]

    def answers(self, golden: Golden) -> bool:
        """Whether they were recorded for this job under these versions."""
        return self.asked == golden.asked and self.versions == golden.versions

    def beyond(self, golden: Golden, made: Made) -> list[str]:
        """The kinds of values that are further from these than the tolerance, with both numbers."""
        tolerances = {kind: (SWAYING if kind in golden.sways else STEADY)[kind] for kind in STEADY}
        found = distances(self.tensors, made.values)
        return [
            f"{kind} {distance:.2g}, expected at most {tolerances[kind]:g}"
            for kind, distance in found.items()
            if not distance <= tolerances[kind]
        ]


def distances(recorded: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, float]:
    """Kind -> how far values are from the recorded ones; infinite where they are not of one shape."""
    return {
        kind: _distance(kind, recorded.get(kind, torch.empty(0)), values.get(kind, torch.empty(0)))
        for kind in sorted({*recorded, *values})
    }


def _distance(kind: str, recorded: Tensor, values: Tensor) -> float:
    if recorded.shape != values.shape:
        return float("inf")
    if kind == CODES:
        return float((recorded != values).double().mean())
    return float((values - recorded).double().norm() / recorded.double().norm())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """problem: what is wrong, None when nothing is. exact: whether digests were compared, and not values."""

    problem: str | None
    exact: bool


class Refused(ValueError):
    """Something must not be recorded."""


@dataclass(kw_only=True)
class Records:
    """Everything recorded in a directory that concerns one machine."""

    directory: Path
    machine: Machine
    entries: dict[str, Entry] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path, machine: Machine) -> Records:
        """What the directory holds; without files, nothing."""
        records = cls(directory=directory, machine=machine)
        if records._digests.exists():
            document = json.loads(records._digests.read_text())
            records.entries = {name: Entry(**entry) for name, entry in document["recipes"].items()}
        if records._values.exists():
            with safe_open(records._values, "pt") as file:
                for name, about in json.loads(file.metadata()["recipes"]).items():
                    tensors = {kind: file.get_tensor(f"{name}/{kind}") for kind in about.pop("kinds")}
                    records.values[name] = Values(**about, tensors=tensors)
        return records

    def judge(self, name: str, golden: Golden, made: Made) -> Verdict:
        """Compares a result bit by bit, where this machine's digests are recorded, and within tolerances elsewhere."""
        values, entry = self.values.get(name), self.entries.get(name)
        if values is None or not values.answers(golden):
            before = "not at all" if values is None else f"for job {values.asked} under {dict(values.versions)}"
            problem = (
                f"{name}: recorded {before}, now job {golden.asked} under {golden.versions}: record anew: {COMMAND}"
            )
            return Verdict(problem=problem, exact=False)
        if entry is not None and entry.answers(golden):
            return Verdict(problem=self._changed(name, golden, made, entry, values), exact=True)
        beyond = values.beyond(golden, made)
        problem = f"{name}: further from the recorded values than other arithmetic explains: {'; '.join(beyond)}"
        return Verdict(problem=problem if beyond else None, exact=False)

    def record(self, name: str, golden: Golden, made: Made) -> None:
        """Takes a result in. Refused when it differs from what was recorded and no version was raised."""
        verdict = self.judge(name, golden, made)
        values = self.values.get(name)
        if values is None or not values.answers(golden):
            self.values[name] = Values(asked=golden.asked, versions=golden.versions, tensors=made.values)
        elif verdict.problem is not None:
            raise Refused(verdict.problem)
        self.entries[name] = Entry.of(golden, made)

    def write(self) -> None:
        """Writes both files."""
        self._digests.parent.mkdir(parents=True, exist_ok=True)
        recipes = {name: asdict(entry) for name, entry in sorted(self.entries.items())}
        document = {"machine": asdict(self.machine), "recipes": recipes}
        self._digests.write_text(json.dumps(document, indent=1) + "\n")
        about = {
            name: {"asked": values.asked, "versions": dict(values.versions), "kinds": sorted(values.tensors)}
            for name, values in sorted(self.values.items())
        }
        tensors = {f"{name}/{kind}": t for name, values in self.values.items() for kind, t in values.tensors.items()}
        save_file(tensors, self._values, metadata={"recipes": json.dumps(about)})

    def keep_only(self, names: Mapping[str, object]) -> None:
        """Forgets recipes that are no more."""
        self.entries = {name: entry for name, entry in self.entries.items() if name in names}
        self.values = {name: values for name, values in self.values.items() if name in names}

    @property
    def _digests(self) -> Path:
        return self.directory / "digests" / f"{self.machine.name}.json"

    @property
    def _values(self) -> Path:
        return self.directory / "values.safetensors"

    @staticmethod
    def _changed(name: str, golden: Golden, made: Made, entry: Entry, values: Values) -> str | None:
        if digest(made.tensors) == entry.digest:
            return None
        changed = entry.changed(made)
        shown = ", ".join(changed[:10]) + (f" and {len(changed) - 10} more" if len(changed) > 10 else "")
        far = ", ".join(f"{kind} {distance:.2g}" for kind, distance in distances(values.tensors, made.values).items())
        return (
            f"{name}: bits changed, versions did not: {shown}. Distances: {far}. Mend it; or, if the change is meant, raise "
            f"the VERSION of the method that changed (or NUMERICS), one of {golden.versions}, and record anew: {COMMAND}"
        )
