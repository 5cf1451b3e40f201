"""The typed manifest of a batch: several jobs, or one under several settings, as one request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from itertools import product
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, JsonValue, StringConstraints, field_validator, model_validator

from counterweight.pipeline.manifest.calibration import Section
from counterweight.pipeline.manifest.job import Metadata
from counterweight.pipeline.manifest.validation import MAX_URI
from counterweight.workers.keys import digest

MAX_JOBS = 1000
"""Of one batch."""

MAX_NAME = 63
"""Characters of a job's name (`Metadata.name`)."""

_PATH = StringConstraints(pattern=r"^(spec|metadata)(\.[A-Za-z0-9_]{1,64}){1,16}$")
FieldPath = Annotated[str, _PATH]
"""A field of a job's manifest, as `--set` has it: spec.recipe.weights.bits."""

Settings = Mapping[str, JsonValue]
"""Field -> value."""

_Settings = Annotated[
    dict[FieldPath, JsonValue],
    Field(min_length=1, max_length=64, json_schema_extra={"additionalProperties": True}),
]


class Overlap(Enum):
    """What a firing of a schedule does while jobs of the one before are not at their end."""

    ALLOW = "allow"
    SKIP = "skip"
    REPLACE = "replace"


class BatchSpec(Section):
    """Which jobs, under which settings, and how many of them at once."""

    jobs: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=MAX_URI)], ...],
        Field(min_length=1, max_length=MAX_JOBS),
    ]
    """Manifests of jobs: `file:`, `s3:` or paths relative to this one."""
    matrix: Annotated[
        dict[FieldPath, Annotated[tuple[JsonValue, ...], Field(min_length=1, max_length=MAX_JOBS)]],
        Field(max_length=16, json_schema_extra={"additionalProperties": True}),
    ] = Field(default_factory=dict)
    """Field of the jobs -> values: each job is made once for each combination of values, such as
    `spec.recipe.compensation.rank.count: [16, 32, 64]`.
    """
    exclude: Annotated[tuple[_Settings, ...], Field(max_length=MAX_JOBS)] = ()
    """Combinations of the matrix that are left out: those that have all values of one of these."""
    include: Annotated[tuple[_Settings, ...], Field(max_length=MAX_JOBS)] = ()
    """Further combinations, which need not be of the matrix."""
    concurrency: Annotated[int, Field(ge=1, le=MAX_JOBS)] = 1
    """Jobs of the batch that may run at once."""
    max_failures: Annotated[int, Field(ge=0, le=MAX_JOBS)] | None = None
    """Jobs that may fail before those that have not begun are cancelled; null: all are run."""

    schedule: Annotated[str, Field(max_length=200)] | None = None
    """When the batch is submitted, again and again: a cron expression of five fields, such as `0 2 * * *`; null: once, now."""
    timeZone: Annotated[str, Field(max_length=64)] = "UTC"
    """Time zone of the schedule, such as Europe/Zurich."""
    missed_after_seconds: Annotated[int, Field(ge=60, le=2_592_000)] = 3600
    """A firing that nobody was there for is made up for within so many seconds, one for all of them, and not later."""
    overlap: Overlap = Overlap.SKIP
    """What a firing does while jobs of the one before are not at their end: `skip`: nothing; `allow`: it starts too; `replace`:
    it cancels those.
    """

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, value: str | None) -> str | None:
        if value is not None:
            if len(value.split()) != 5:
                raise ValueError("expected five fields: minute, hour, day of month, month, day of week")
            from cronsim import CronSim, CronSimError  # which reading an artifact, as engines do, need not have

            try:
                next(CronSim(value, datetime(2000, 1, 1, tzinfo=UTC)))
            except (CronSimError, StopIteration) as error:
                raise ValueError(f"{error or 'never'}: expected a cron expression, such as 0 2 * * *") from error
        return value

    @field_validator("timeZone")
    @classmethod
    def _is_a_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("no such time zone: expected one of the IANA database, such as Europe/Zurich") from error
        return value

    @model_validator(mode="after")
    def _excludes_are_of_the_matrix(self) -> BatchSpec:
        for index, excluded in enumerate(self.exclude):
            if unknown := [path for path in excluded if path not in self.matrix]:
                raise ValueError(f"exclude.{index}: {unknown[0]}: expected a field of the matrix")
        count = len(self.jobs) * len(combinations(self))
        if not 1 <= count <= MAX_JOBS:
            raise ValueError(f"{count} jobs in all: expected 1 to {MAX_JOBS}")
        return self


class CompressionBatch(Section):
    """A manifest: several compressions as one request."""

    apiVersion: Literal["counterweight/v1"]
    """Version of the manifest's format."""
    kind: Literal["CompressionBatch"]
    """What the manifest describes."""
    metadata: Metadata
    """What the batch is called."""
    spec: BatchSpec
    """What it does."""


def combinations(spec: BatchSpec) -> list[Settings]:
    """The settings under which every job of the batch is made: the matrix in order, the last field fastest, without what is
    excluded; then what is included; each once. Without matrix and includes a single one without any setting."""
    fields = list(spec.matrix)
    made: list[Settings] = []
    if fields or not spec.include:
        if _count(spec) > MAX_JOBS:
            raise ValueError(f"matrix: {_count(spec)} combinations: expected at most {MAX_JOBS}")
        made = [dict(zip(fields, values, strict=True)) for values in product(*spec.matrix.values())]
    kept = [settings for settings in made if not any(_has(settings, excluded) for excluded in spec.exclude)]
    # JSON tells 1 from true, which Python does not.
    return list({_json(settings): settings for settings in (*kept, *spec.include)}.values())


def overrides(settings: Settings) -> list[str]:
    """The settings as `--set` has them."""
    return [f"{path}={json.dumps(value)}" for path, value in settings.items()]


def name_under(name: str, settings: Settings) -> str:
    """What a job is called under settings: `llama-rank-count-16`. One that is too long ends in a digest."""
    if not settings or "metadata.name" in settings:
        return str(settings.get("metadata.name", name))
    parts = [f"{'-'.join(path.split('.')[-2:])}-{_plain(value)}" for path, value in settings.items()]
    whole = "-".join([name, *(_slug(part) for part in parts)])
    if len(whole) <= MAX_NAME:
        return whole
    return f"{whole[: MAX_NAME - 9].rstrip('-')}-{digest([name, dict(settings)])[:8]}"


def _count(spec: BatchSpec) -> int:
    count = 1
    for values in spec.matrix.values():
        count *= len(values)
    return count


def _has(settings: Settings, excluded: Settings) -> bool:
    return all(_json(settings[path]) == _json(value) for path, value in excluded.items())


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _plain(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def same_name(names: Sequence[str]) -> str | None:
    """A name that occurs twice, if one does."""
    return next((name for index, name in enumerate(names) if name in names[:index]), None)
