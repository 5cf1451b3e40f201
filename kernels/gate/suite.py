"""All cases, measured by several processes and remembered."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from counterweight.kernels.gate import cases
from counterweight.kernels.gate.case import Case
from counterweight.kernels.gate.compile import CompilationFailed, fingerprint, measure
from counterweight.kernels.gate.measurement import Measurement

_REMEMBERED = Path(__file__).parents[2] / "build" / "gate.json"


@cache
def all_cases() -> Mapping[str, Case]:
    """The cases of all modules in kernels.gate.cases, by name; ValueError for a name that occurs twice."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(cases.__path__, f"{cases.__name__}."):
        for case in importlib.import_module(module.name).CASES:
            if case.name in found:
                raise ValueError(f"{case.name}: two cases have this name")
            found[case.name] = case
    return found


def brief(chosen: Mapping[tuple[str, int], Case], whole: int | None) -> dict[tuple[str, int], Case]:
    """What continuous integration has time for: on every architecture the first case of each kernel, on `whole` all of
    them."""
    first: dict[tuple[str, int], str] = {}
    for (name, arch), case in chosen.items():
        first.setdefault((case.kernel.__name__, arch), name)
    return {
        (name, arch): case
        for (name, arch), case in chosen.items()
        if arch == whole or first[case.kernel.__name__, arch] == name
    }


def measure_all(
    chosen: Mapping[tuple[str, int], Case], jobs: int
) -> tuple[dict[tuple[str, int], Measurement], list[str]]:
    """Measures cases by name and architecture, in the order given; what was measured before is not compiled again.

    Returns the measurements, and one text for each case that does not compile.
    """
    remembered = _remembered()
    prints = {key: fingerprint(case, key[1]) for key, case in chosen.items()}
    failures = []
    if new := [key for key in chosen if prints[key] not in remembered]:
        with (
            tempfile.TemporaryDirectory() as directory,
            ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _compile_in, (directory,)) as pool,
        ):
            for key, found in zip(new, pool.map(_measure, new), strict=True):
                if isinstance(found, str):
                    failures.append(found)
                else:
                    remembered[prints[key]] = asdict(found)
                    _remember({prints[key]: remembered[prints[key]]})
    return {key: Measurement(**remembered[prints[key]]) for key in chosen if prints[key] in remembered}, failures


def _remembered() -> dict[str, dict[str, Any]]:
    return json.loads(_REMEMBERED.read_text()) if _REMEMBERED.exists() else {}


def _remember(measured: Mapping[str, Mapping[str, object]]) -> None:
    """After each case, for a run may be interrupted; the file is replaced, for another run may be reading."""
    _REMEMBERED.parent.mkdir(exist_ok=True)
    written = _REMEMBERED.with_name(f"gate.{os.getpid()}.json")
    written.write_text(json.dumps({**_remembered(), **measured}))
    written.replace(_REMEMBERED)


def _compile_in(directory: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = directory


def _measure(key: tuple[str, int]) -> Measurement | str:
    name, arch = key
    try:
        return measure(all_cases()[name], arch)
    except CompilationFailed as error:
        return str(error)
