"""What `plan` says: the plan, and everything that `run` would refuse, without writing, running or starting anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from counterweight.pipeline.judging.task_files import read_documents
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.plan import Plan, make_plan
from counterweight.pipeline.preflight import beyond_positions, look_only
from counterweight.pipeline.processor import emulated
from counterweight.pipeline.resume import foreseen

GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices that drivers of GPUs make: NVIDIA's, AMD's, Windows' for its Linux."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """reuse: what of earlier runs would be taken over, or why not. notes: what is no reason to refuse the job, but should be
    known before."""

    plan: Plan
    reuse: Sequence[str]
    notes: Sequence[str]


def foresee(job: CompressionJob, device: str | None = None) -> Foresight:
    """RequestError and its kinds for what `run` would refuse: the model, the texts, the tokenizer, positions, the output, the
    recipe. device: see `make_plan`."""
    root, check_texts = look_only(job)
    with ThreadPoolExecutor(1, "texts") as beside:  # a process of its own tokenizes
        texts = beside.submit(check_texts)
        source = open_model(root)
        documents = read_documents(job.spec.validation, source.store)  # which refuses tasks that cannot be asked
        made = make_plan(job, source, device, documents=documents)
        texts.result()
    return Foresight(plan=made, reuse=foreseen(job, source, made), notes=tuple(_notes(job, source, device)))


def _notes(job: CompressionJob, source: ModelSource, device: str | None) -> Iterator[str]:
    if (beyond := beyond_positions(job, source.checkpoint.config)) is not None:
        yield beyond
    if device is None and (slow := emulated(job)) is not None:
        yield slow
    if source.checkpoint.asks_for_code:
        yield f"auto_map: code of the repository is never run; transformers' own runs {source.layout.model_type}"
    if job.spec.validation is not None and job.spec.validation.tasks:
        yield "spec.validation.tasks: their time is an upper bound: what templates make of their rows only the harness knows"
    if job.spec.resources.gpus_per_worker > 0 and device is None and not any(map(os.path.exists, GPUS)):
        yield "this machine has no GPU: workers here would compute on the CPU"
