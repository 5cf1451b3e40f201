"""Which places a manifest may name: those below the roots that the service was given."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from counterweight.pipeline.manifest import CompressionJob, named_uris
from counterweight.pipeline.manifest.problems import path_text, show
from counterweight.workers.errors import RequestError
from counterweight.workers.storage.names import file_root, s3_root

HUB = "hf:"


@dataclass(frozen=True, slots=True)
class Roots:
    """files: directories. buckets: name and segments of the prefix. hub: whether the Hugging Face hub may be named."""

    files: tuple[Path, ...] = ()
    buckets: tuple[tuple[str, tuple[str, ...]], ...] = ()
    hub: bool = False

    @classmethod
    def parse(cls, uris: Sequence[str]) -> Self:
        """Of `s3://bucket/prefix`, `file:/directory` and `hf:`. RequestError."""
        files, buckets = [], []
        for uri in uris:
            if uri == HUB:
                continue
            if (path := _path(uri)) is not None:
                files.append(path)
            elif (place := s3_root(uri)) is not None:
                buckets.append((place[0], _segments(place[1])))
            else:
                raise RequestError(f"--allow {uri[:200]!r}: expected s3://bucket/prefix, file:/directory or hf:")
        return cls(tuple(files), tuple(buckets), HUB in uris)

    def contains(self, uri: str) -> bool:
        """Whether a place is a root or below one. By its name alone: no link is followed, nothing is asked."""
        try:
            if uri.startswith(HUB):
                return self.hub
            if (path := _path(uri)) is not None:
                return any(path.is_relative_to(root) for root in self.files)
            place = s3_root(uri)
        except RequestError:
            return False
        if place is None:
            return False
        bucket, segments = place[0], _segments(place[1])
        return any(bucket == name and segments[: len(prefix)] == prefix for name, prefix in self.buckets)

    def refused(self, job: CompressionJob) -> list[str]:
        """A line for each place that a manifest names and may not: its field, its value, what is expected."""
        validation = job.spec.validation
        code = ["spec.validation.tasks: expected none here: templates of task files run as programs do"]
        return (code if validation is not None and validation.tasks else []) + [
            f"{path_text(path)}: {show(uri)}: expected a place below the roots of this service"
            for path, uri in named_uris(job)
            if not self.contains(uri)
        ]


def _path(uri: str) -> Path | None:
    path = file_root(uri)
    return None if path is None else Path(os.path.normpath(path))


def _segments(prefix: str) -> tuple[str, ...]:
    return tuple(prefix.split("/")) if prefix else ()
