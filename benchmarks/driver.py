"""What the driver of a job does itself: CPU seconds of the real orchestrator, with workers that do nothing but answer.

    python benchmarks/driver.py [--model Qwen3-235B-A22B] [--layers N] [--recipe NAME] [--device H100-80G] [--record]

The whole job of a published model's shapes, from headers to the artifact's documents, on 512 x 2048 tokens and 160 windows:
inventory, graph, dispatch, events, ledger, index, report. Each task is answered at once with a record as large as the true one,
pickled as it comes from a worker; making it is the worker's part and not counted, reading it is. Beside it the seconds that
`plan` says of the same job: the driver has a core of its own, so its share is CPU seconds over those.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, record, table, versions
from planning import manifest, write_tokens
from plans import RECIPES
from true_shapes import make, shapes

from counterweight.pipeline.devices import memory_of
from counterweight.pipeline.events import EventLog
from counterweight.pipeline.manifest import CompressionJob, load_manifest
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.opening import Opened
from counterweight.pipeline.orchestrator import Orchestrator
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.pool import Outcome
from counterweight.pipeline.resolve import stored_name
from counterweight.pipeline.tokens import read_tokens
from counterweight.pipeline.units import seconds_text
from counterweight.workers.checkpoint.inspector import TensorDigest
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.metrics import METRICS, PROFILES
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, QUANTIZED, Evaluate, EvaluateRecord
from counterweight.workers.tasks.files import Checksum, CheckTensors, Copy, Join
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.original import Original, OriginalRecord
from counterweight.workers.tasks.pass_through import PassThrough, PassThroughRecord
from counterweight.workers.tasks.prefetch import Prefetch
from counterweight.workers.tasks.records import HeldOutErrors, HiddenRecord, LedgerEntry, ModuleReport, Timing
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.tasks.solve import Solve, SolvedRecord
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob

WORKERS = (1, 8)

TIMING = Timing(load=1.0, forward=1.0, solve=1.0, write=1.0)
ERRORS = HeldOutErrors(tokens=2048, quantized=1e-3, compensated=1e-3)
WANTED = 0.01
"""Share of a job that the project wants the driver to take at most."""


def digest_of(*parts: object) -> str:
    """Any sha256 of its own."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def blob_of(*parts: object) -> Blob:
    """Any blob of its own."""
    return Blob(sha256=digest_of(*parts), size=1 << 20)


class Answers:
    """What a worker would give back of each task of a job on `source`."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._kinds: Mapping[type, Callable[[Any], object]] = {
            Inspect: lambda task: {name: TensorDigest(sha256=digest_of(name), finite=True) for name in task.names},
            Embed: self._embedded,
            Prefetch: lambda _: None,
            Calibrate: self._calibrated,
            Solve: self._solved,
            Compress: lambda task: self._compressed(task.block.index, task.block.recipe),
            PassThrough: self._kept,
            Original: lambda task: OriginalRecord(outputs=(blob_of("original", task.start),), timing=TIMING),
            Evaluate: self._evaluated,
            Copy: lambda task: Written(size=task.blob.size, sha256=task.blob.sha256),
            Join: lambda task: None if task.awaited else Written(size=1 << 20, sha256=digest_of(task.path)),
            Checksum: lambda task: self.written[task.path],
            CheckTensors: lambda _: True,
        }
        self.written: dict[str, str] = {}
        """File -> its sha256."""

    def of(self, task: Task[object]) -> object:
        """The answer."""
        found = self._kinds[type(task)](task)
        if isinstance(found, Written):
            name = task.path if isinstance(task, Join) else Path(getattr(task, "key", "")).name
            self.written[name] = found.sha256
        return found

    def _embedded(self, task: Embed) -> HiddenRecord:
        sequences, length = 512, 2048
        solved, unseen = (-(-count // shard_sequences(length)) for count in (sequences, task.held_out))
        shards = range(solved + unseen)[task.start : task.stop]
        if task.parts:
            return HiddenRecord(outputs=tuple(blob for part in task.parts for blob in part.outputs), timing=TIMING)
        return HiddenRecord(outputs=tuple(blob_of("embedded", shard) for shard in shards), timing=TIMING)

    def _calibrated(self, task: Calibrate) -> HiddenRecord:
        shards = range(task.start, task.stop)
        return HiddenRecord(
            outputs=tuple(blob_of("hidden", task.block.index, shard) for shard in shards), timing=TIMING
        )

    def _solved(self, task: Solve) -> SolvedRecord:
        whole = self._compressed(task.block.index, {name: task.block.recipe[name] for name in task.linears})
        blobs = (blob_of("solved", task.block.index, task.part),)
        return SolvedRecord(blobs=blobs, formats=whole.formats, modules=whole.modules, timing=TIMING)

    def _compressed(self, index: int, recipe: Mapping[str, Any]) -> BlockRecord:
        source = self._source
        shapes = source.layout.block_parameters(index)
        names = {name: stored_name(source, index, name) for name in recipe}
        tensors = {f"{name}.{part}": digest_of(name, part) for name in names.values() for part in ("packed", "scale")}
        return BlockRecord(
            index=index,
            checkpoint=blob_of("block", index),
            adapter=None,
            tensors=tensors,
            factors={},
            modules=tuple(self._module(name, shapes[f"{own}.weight"]) for own, name in names.items()),
            formats={
                name: ModuleFormat(bits=4, group_size=128, symmetric=True, activation_bits=None, rank=0)
                for name in names.values()
            },
            kept_bits=1,
            ledger=tuple(self._entry(name, "quantized") for name in source.block_tensors(index)),
            timing=TIMING,
            made_from=dict.fromkeys(("weights", "inputs", "recipe", "tokens"), digest_of(index)),
        )

    def _module(self, name: str, shape: Sequence[int]) -> ModuleReport:
        rows, columns = shape
        bits = {"code_bits": 4 * rows * columns, "scale_bits": rows * columns // 8, "factor_bits": 0}
        counts = {"rows": rows, "columns": columns, "bits": 4, "group_size": 128, "rank": 0, "tokens": 1 << 20, **bits}
        errors = {"error_quantized": None, "error_compensated": None, "held_out": ERRORS}
        return ModuleReport.model_validate({"name": name, "seconds": 0.1, **counts, **errors})

    def _entry(self, name: str, fate: str) -> LedgerEntry:
        shape = self._source.checkpoint.entry(name).shape
        return LedgerEntry.model_validate({"source": name, "shape": shape, "fate": fate, "stored_as": (name,)})

    def _kept(self, task: PassThrough) -> PassThroughRecord:
        entries = tuple(self._entry(name, "kept") for name in task.tensors)
        own = {"checkpoint": blob_of(*task.tensors), "tensors": dict(task.tensors), "ledger": entries}
        return PassThroughRecord.model_validate({**own, "bits": 1, "timing": TIMING})

    def _evaluated(self, task: Evaluate) -> EvaluateRecord:
        windows = range(task.original.start, task.original.stop)
        numbers = {metric.name: 1.0 for metric in METRICS if not metric.sparse}
        along = {profile.name: (0.0,) * len(profile.ranges(2048)) for profile in PROFILES}
        variants = (BASELINE, QUANTIZED, COMPENSATED)
        return EvaluateRecord(
            windows={variant: tuple(numbers for _ in windows) for variant in variants},
            profiles={variant: tuple(along for _ in windows) for variant in variants},
            timing=TIMING,
        )


class AnsweringPool:
    """Workers that answer at once. spent: CPU seconds of making the answers."""

    def __init__(self, size: int, answers: Answers) -> None:
        self.size, self.threads = size, 1
        self.room: int | None = 0
        self.spent, self.tasks = 0.0, 0
        self._answers = answers
        self._idle = list(range(size))
        self._done: list[tuple[int, int, bytes]] = []

    def idle(self) -> Sequence[int]:
        return list(self._idle)

    def submit(self, worker: int, task: Task[object]) -> int:
        self._idle.remove(worker)
        sent = pickle.dumps(task)
        before = time.process_time()
        answer = pickle.dumps(self._answers.of(pickle.loads(sent)))
        self.spent += time.process_time() - before
        self.tasks += 1
        self._done.append((self.tasks, worker, answer))
        return self.tasks

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._done:
            return []
        ticket, worker, answer = self._done.pop(0)
        self._idle.append(worker)
        return [Outcome(ticket, worker, value=pickle.loads(answer))]

    def forget(self, unread: Sequence[Blob]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """tasks: how many. planning, driving: CPU seconds of the driver. job: seconds that the plan says."""

    workers: int
    tasks: int
    planning: float
    driving: float
    job: float

    @property
    def share(self) -> float:
        return (self.planning + self.driving) / self.job


def driven(job: CompressionJob, device: str) -> Share:
    """One job, from headers to the published artifact."""
    told = make_plan(job, open_model(job.spec.model.uri), device)
    began = time.process_time()
    source = open_model(job.spec.model.uri)
    plan = make_plan(job, source, gpu_bytes=memory_of(device))  # as `run` does, which asks nobody for the time
    tokens = read_tokens(job, None)
    planned = time.process_time()
    pool = AnsweringPool(job.spec.resources.workers, Answers(source))
    opened = Opened(source=source, tokens=tokens, plan=plan)
    Orchestrator(job, opened, pool, "cuda", EventLog()).run()
    driving = time.process_time() - planned - pool.spent
    if told.estimate is None:
        raise ValueError(f"--device: {device}: expected one whose rates are known")
    return Share(
        workers=pool.size, tasks=pool.tasks, planning=planned - began, driving=driving, job=told.estimate.seconds
    )


def shares(model: str, recipe: str, layers: int | None, device: str) -> list[Share]:
    """For each number of workers."""
    shape = shapes()[model]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(shape.with_layers(layers or shape.config["num_hidden_layers"]), folder / "model")
        write_tokens(folder / "tokens.safetensors", 512 + 2, 2048)
        document = str(manifest(shape, recipe, folder))
        jobs = {
            workers: load_manifest(
                document, [f"spec.resources.workers={workers}", f"spec.output.uri={folder / str(workers)}"]
            ).job
            for workers in WORKERS
        }
        return [driven(job, device) for job in jobs.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(shapes()), default="Qwen3-235B-A22B")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--recipe", choices=list(RECIPES), default=next(iter(RECIPES)))
    parser.add_argument("--device", default="H100-80G")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    rows = [
        [
            *(str(found.workers), f"{found.tasks:,}", f"{found.planning:.2f}", f"{found.driving:.2f}"),
            *(seconds_text(found.job), f"{found.share:.2%}"),
        ]
        for found in shares(arguments.model, arguments.recipe, arguments.layers, arguments.device)
    ]
    header = ["workers", "tasks", "plan, CPU s", "driver, CPU s", "the job, by its plan", "share"]
    body = table(header, rows)
    about = f"{machine()}. {versions('pydantic')}. {arguments.recipe}; wanted: at most {WANTED:.0%}."
    print(body)
    if arguments.record:
        title = f"The driver's own share of a job: {arguments.model} on {arguments.device}"
        print(record("driver", title, body, about))


if __name__ == "__main__":
    main()
