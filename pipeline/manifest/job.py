"""The typed manifest of one compression job. Field docstrings become the descriptions in the JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from counterweight.pipeline.manifest.calibration import Calibration, Section, Tokens
from counterweight.pipeline.manifest.validation import FIRST_GATES, MAX_URI, Validation
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.methods.distillation import Distillation
from counterweight.workers.recipe import Recipe

SMALLEST_SHARE = 0.01  # of a GPU; Ray counts in units of 0.0001

_NAME = Field(
    pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
    json_schema_extra={
        "patternErrorMessage": (
            "1 to 63 lower-case letters, digits and '-', beginning and ending with a letter or digit"
        )
    },
)
_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}

_LABEL_KEY = StringConstraints(pattern=r"^[A-Za-z0-9]([-_./A-Za-z0-9]{0,98}[A-Za-z0-9])?$")
_LABEL_VALUE = StringConstraints(max_length=200)
_URI = StringConstraints(min_length=1, max_length=MAX_URI)


class Metadata(Section):
    """What the job is called."""

    name: Annotated[str, _NAME]
    """Name of the job and of the folder its artifacts are published in: 1 to 63 lower-case letters, digits
    and '-'.
    """
    labels: Annotated[
        dict[Annotated[str, _LABEL_KEY], Annotated[str, _LABEL_VALUE]],
        Field(max_length=64, json_schema_extra={"additionalProperties": False}),
    ] = Field(default_factory=dict)
    """Free key-value pairs for people and tools; without influence on the result."""


class Model(Section):
    """The model to compress."""

    uri: Annotated[str, _URI]
    """A transformers checkpoint in safetensors: `file:`, `s3:`, `hf:owner/name[@revision]`, or a path
    relative to the manifest.
    """


class TextShare(Section):
    """Windows of a text."""

    source: Tokens
    """Where they come from; without a `kind`, a text."""
    sequences: Annotated[int, Field(ge=1, le=1_000_000)]
    """How many of them, each as long as the calibration's."""
    skip: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Windows that are left out first, from the start of the text."""


class DistillationStage(Section):
    """Training of the compressed model as a whole, when all its blocks are solved."""

    texts: Annotated[tuple[TextShare, ...], Field(min_length=1, max_length=16)]
    """What is trained on: texts of several kinds, or the model learns the ways of one."""
    held_out: Annotated[tuple[TextShare, ...], Field(min_length=1, max_length=16)]
    """What decides whether training has won: on none of these texts may the model become worse. One of them should be of a kind
    that is not trained on.
    """
    training: Distillation = Field(default_factory=Distillation)
    """How it is trained."""

    @property
    def trained(self) -> int:
        """Sequences that are trained on."""
        return sum(share.sequences for share in self.texts)

    @model_validator(mode="after")
    def _a_sequence_for_each_part(self) -> DistillationStage:
        training = self.training
        if training.parts > self.trained:
            raise ValueError(
                f"training: {training.replicas} replicas in {training.rounds} rounds an epoch: expected at most "
                f"{self.trained} parts, as many as texts have sequences"
            )
        return self


_SIZE = Field(
    pattern=r"^(0|[1-9][0-9]{0,8})([.][0-9]{1,3})?(MiB|GiB)$",
    json_schema_extra={"patternErrorMessage": "a number of MiB or GiB, such as 20GiB"},
)


def _bytes_of(size: str | None) -> int | None:
    return None if size is None else int(float(size[:-3]) * _UNITS[size[-3:]])


class HiddenStates(Section):
    """How hidden states get from block to block; without influence on the result."""

    memory: Annotated[str, _SIZE] | None = None
    """Memory of its host in which each worker keeps them for those that read them, such as 16GiB: a single one its own, several
    that of Ray's object store. What does not fit goes through the output's `_work`. 0MiB: everything. null: half of what a
    worker's machine has for it beside its tasks, and 24GiB at most of a GPU's host.
    """
    durable_every: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Blocks between two places at which they are written even so: when a worker or the job dies, the original blocks behind
    the last of these are run again. 0: nowhere, but behind the embedding. null: 8 with GPUs; on CPUs as many as a
    single worker runs again within a minute, 1 for several.
    """

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return _bytes_of(self.memory)


class Resources(Section):
    """What the job may use; without influence on the result."""

    workers: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Number of worker processes."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs of a worker: a whole number, or a share from 0.01 where workers share one; 0: the CPU computes."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU cores of a worker; null: the cluster's cores divided by the workers."""
    memory_per_worker: Annotated[str, _SIZE] | None = None
    """Memory of a worker, such as 20GiB: of its process, or of its GPU. Blocks that need more are solved in several passes over
    the calibration tokens; null: a CPU worker's share of the machine, and of a GPU what `plan --device` is told.
    """

    hidden_states: HiddenStates = Field(default_factory=HiddenStates)
    """How they get from block to block."""

    @property
    def memory_bytes(self) -> int | None:
        """`memory_per_worker` in bytes."""
        return _bytes_of(self.memory_per_worker)

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_or_share(cls, value: float) -> float:
        if (value > 1 and not value.is_integer()) or 0 < value < SMALLEST_SHARE:
            raise ValueError(f"expected 0, a share of a GPU from {SMALLEST_SHARE} to 1, or a whole number")
        return value


class Output(Section):
    """Where the artifact goes."""

    uri: Annotated[str, _URI]
    """Folder of artifacts: `file:`, `s3:` or a path relative to the manifest."""


class JobSpec(Section):
    """What is to be compressed, how, on what, and where to."""

    model: Model
    """The model to compress."""
    calibration: Calibration
    """What statistics are gathered on."""
    recipe: Recipe
    """What is done to the weights."""
    distillation: DistillationStage | None = None
    """Training of the model behind the closed forms; null: it stays as its blocks were solved."""
    validation: Validation | None = None
    """How the result is judged; null: it is published unjudged."""
    resources: Resources = Field(default_factory=Resources)
    """What the job may use."""
    output: Output
    """Where the artifact goes."""

    @model_validator(mode="after")
    def _distils_what_it_can(self) -> JobSpec:
        if self.distillation is not None and self.recipe.residual is not None:
            raise ValueError(
                "distillation: expected recipe.residual null: its store holds what the untrained model leaves"
            )
        return self

    @property
    def validation_sequence_length(self) -> int | None:
        """Tokens of a validation window, or None without validation."""
        if self.validation is None:
            return None
        return self.validation.sequence_length or self.calibration.sequence_length


class CompressionJob(Section):
    """A manifest: the compression of one model."""

    apiVersion: Literal["counterweight/v1"]
    """Version of the manifest's format."""
    kind: Literal["CompressionJob"]
    """What the manifest describes."""
    metadata: Metadata
    """What the job is called."""
    spec: JobSpec
    """What it does."""


def canonical(job: CompressionJob) -> bytes:
    """Canonical JSON of what determines the job's result, the bytes of its inputs excepted.

    Two manifests with equal `canonical` bytes, equal digests of the model and equal digests of the tokens ask
    for the same artifact. So names, labels, resources, the output and every URI are left out; the caller adds
    the digests. A default written out is the same as a default left out.
    """
    spec = job.spec.model_dump(
        mode="json",
        include={"calibration": True, "recipe": True, "validation": True},
        exclude={
            "calibration": {"source", "special_tokens"},
            "validation": {
                "text": True,
                "special_tokens": True,
                "texts": {"__all__": {"source"}},
                "bounds": {"__all__": {"no_worse_than"}},
                "tasks": {"__all__": {"uri"}},
            },
        },
    )
    if (stage := job.spec.distillation) is not None:
        # Only where it is asked for: jobs without it keep the identity that they had before there was any.
        spec["distillation"] = {"training": stage.training.determines(), "held_out": len(stage.held_out)}
    if job.spec.calibration.experts == ExpertCalibration():
        del spec["calibration"]["experts"]  # younger than artifacts of dense models, whose ids were made without it
    spec["calibration"]["propagate"] = job.spec.calibration.propagated
    if job.spec.calibration.segment_blocks in (None, 1):
        del spec["calibration"]["segment_blocks"]  # younger than artifacts whose ids were made without it
    if not job.spec.calibration.drawn:
        del spec["calibration"]["drawn"]  # younger than artifacts whose ids were made without it
    del spec["calibration"]["held_out"]  # decides what errors are measured on, whose digest the caller adds
    if spec["validation"] is not None:
        spec["validation"]["sequence_length"] = job.spec.validation_sequence_length
        _without_younger(spec["validation"])
    content = {"apiVersion": job.apiVersion, **spec}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _without_younger(validation: dict[str, Any]) -> None:
    """Drops what says nothing and is younger than artifacts whose ids were made without it."""
    for field in ("prefill_gates", "texts", "bounds", "tasks", "generation"):
        if not validation[field]:
            del validation[field]
    for field in ("gates", "prefill_gates"):
        gates = validation.get(field, {})
        for gate in gates.keys() - FIRST_GATES:
            if gates[gate] is None:
                del gates[gate]
    for bound in validation.get("bounds", ()):
        if bound["significance"] is None:
            del bound["significance"]
