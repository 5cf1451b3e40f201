"""Manifests for the tests: the smallest that is right, and what the loader says about others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from counterweight.pipeline.manifest import CompressionJob, parse_manifest
from counterweight.pipeline.manifest.problems import MAX_LINES
from counterweight.workers.errors import ManifestError

BASE = "file:///jobs"

MINIMAL = """\
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {name: small}
spec:
  model: {uri: model}
  calibration: {source: {uri: text.txt}}
  recipe: {weights: {bits: 4}}
  output: {uri: out}
"""

FULL = """\
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {name: full, labels: {team: a}}
spec:
  model: {uri: model}
  calibration:
    source: {kind: text, uri: text.txt}
    sequences: 8
    sequence_length: 64
    sampling: consecutive
    seed: 1
    propagate: compressed
    compute_dtype: bfloat16
  recipe:
    weights: {bits: 4, group_size: 32, quantizer: {kind: gptq}}
    activations: {bits: 8}
    compensation: {kind: svd, rank: {count: 4}}
    overrides: [{match: "*.down_proj", weights: {bits: 8}}]
    keep: [lm_head]
  validation:
    text: {uri: other.txt}
    sequence_length: 32
    windows: 4
    gates: {perplexity_ratio: 1.1, kl: 0.5}
  resources: {workers: 2, gpus_per_worker: 0.5, cpus_per_worker: 3}
  output: {uri: out}
"""


def job(text: str = FULL, *overrides: str, base: str | None = BASE) -> CompressionJob:
    """The job that a YAML text describes."""
    return parse_manifest(text, name="job.yaml", base=base, overrides=overrides).job


def refused(text: str | bytes = FULL, *overrides: str, name: str = "job.yaml", base: str | None = BASE) -> str:
    """What is said about a text that describes no job."""
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, name=name, base=base, overrides=overrides)
    return str(caught.value)


def setting(path: str, value: Any) -> str:
    """An override; JSON is YAML."""
    return f"{path}={json.dumps(value)}"


def check_lines(found: str) -> None:
    """However hostile the manifest, what is said of it is short and holds nothing that a terminal obeys."""
    lines = found.split("\n")
    assert len(lines) <= MAX_LINES
    assert all(line.isprintable() and len(line) < 600 for line in lines)
