"""bfloat16 on a processor without instructions for it: said, and not what a new manifest asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterweight.pipeline import processor
from counterweight.pipeline.foresight import foresee
from counterweight.pipeline.processor import emulated, multiplies_bfloat16
from counterweight.pipeline.starter import Choices, starter
from tests.pipeline.tiny import job_of, write_job

ASKED = ("spec.calibration.compute_dtype=bfloat16", "spec.validation.compute_dtype=bfloat16")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path / "job", layers=1)


def processor_with(flags: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    patch.setattr(processor, "CPUINFO", folder / "cpuinfo")


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("isa\t\t: rv64imafdc", True),  # nothing is known
    ],
)
def test_instructions_are_those_that_the_kernel_names(
    flags: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_with(flags, tmp_path / "proc", monkeypatch)
    assert multiplies_bfloat16() is has


def test_nothing_is_known_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "absent")
    assert multiplies_bfloat16()


def test_a_plan_says_what_is_emulated(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor_with("flags\t: avx2", tmp_path / "proc", monkeypatch)
    (note,) = (note for note in foresee(job_of(job, *ASKED)).notes if "no instructions" in note)
    assert note.startswith("spec.calibration.compute_dtype and spec.validation.compute_dtype: bfloat16: ")
    assert emulated(job_of(job)) is None
    assert emulated(job_of(job, *ASKED, "spec.resources.gpus_per_worker=1")) is None
    processor_with("flags\t: avx512_bf16", tmp_path / "proc", monkeypatch)
    assert emulated(job_of(job, *ASKED)) is None


def test_a_new_manifest_asks_for_what_the_processor_has(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(job.parent / "model")
    for flags, dtype in (("flags\t: avx2", "float32"), ("flags\t: amx_bf16", "bfloat16")):
        processor_with(flags, tmp_path / "proc", monkeypatch)
        assert starter(model, model, Choices()).count(f"compute_dtype: {dtype}") == 2
