"""A manifest to begin with: commented, made for one model from its config.json alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from counterweight.pipeline.model_files import config_of, positions_of
from counterweight.pipeline.processor import multiplies_bfloat16
from counterweight.workers.models.families import family_of

WINDOW = 2048
"""Tokens of a window where the model has so many positions."""

GROUP = 128

WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")

SPARSE = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of a config.json that count the experts of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What somebody has said already; None: to be filled in. text: to calibrate on; held: to validate on."""

    text: str | None = None
    held: str | None = None
    output: str | None = None


def starter(model: str, called: str, choices: Choices) -> str:
    """The manifest as YAML. model: a path or URI; called: what the manifest calls it. RequestError and its kinds, StorageError,
    for what is no model of ours."""
    config = config_of(model)
    family_of(config.get("model_type"))
    window = min(WINDOW, positions_of(config) or WINDOW)
    fields = {
        "name": job_name(model),
        "model": _scalar(called),
        "type": str(config["model_type"]),
        "positions": str(positions_of(config) or "an unknown number of"),
        "window": str(window),
        "dtype": "bfloat16" if _dtype(config) != "float32" and multiplies_bfloat16() else "float32",
        "group": _group(config),
        "calibration": _source(choices.text, "train"),
        "validation": _source(choices.held, "test"),
        "experts": EXPERTS if _inside(config).keys() & set(SPARSE) else "",
        "output": _scalar(choices.output or "out"),
    }
    return _TEMPLATE.format(**fields)


def job_name(model: str) -> str:
    """A job's name after its model: the last part of its URI."""
    last = re.sub(r"@.*", "", model.rstrip("/")).rpartition("/")[2].removeprefix("hf:")
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:63].strip("-") or "model"


def _source(text: str | None, split: str) -> str:
    """The text, or a data set of the hub that everybody may read."""
    if text is not None:
        return f"{{kind: text, uri: {_scalar(text)}}}"
    return f"{{kind: dataset, path: Salesforce/wikitext, name: wikitext-2-raw-v1, split: {split}}}"


def _scalar(text: str) -> str:
    """As a YAML scalar; JSON's strings are."""
    return text if all(c.isalnum() or c in "/._-" for c in text) and not text.startswith("-") else json.dumps(text)


def _inside(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inside = config.get("text_config")
    return {**config, **(inside if isinstance(inside, Mapping) else {})}


def _dtype(config: Mapping[str, Any]) -> object:
    found = _inside(config)
    return found.get("dtype", found.get("torch_dtype"))


def _group(config: Mapping[str, Any]) -> str:
    """Weights that share a scale: 128 where that divides what the config says of widths, else one scale for each row."""
    found = _inside(config)
    widths = [value for name in WIDTHS if (value := found.get(name))]
    return f"group_size: {GROUP}, " if all(isinstance(width, int) and width % GROUP == 0 for width in widths) else ""


EXPERTS = """\
    # experts: {floor: 2, every_token: false}    # below 2 x its width in tokens an expert is shrunk toward its layer's
"""

_TEMPLATE = """\
# A job for `counterweight plan` (what it needs), `counterweight run` (does it) and `counterweight submit` (queues it).
# Every field is described by `counterweight schema`.
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {{name: {name}}}
spec:
  model: {{uri: {model}}}    # {type}
  calibration:
    source: {calibration}    # text like what the model will see
    sequences: 128
    sequence_length: {window}    # at most {positions} positions
    compute_dtype: {dtype}
    # propagate: compressed    # each block sees what the compressed ones before it produce; slower
{experts}  recipe:
    weights: {{bits: 4, {group}quantizer: {{kind: gptq}}}}    # 2, 3, 4 or 8 bits; rtn rounds to nearest
    # activations: {{bits: 8}}    # 4, 6 or 8; left out: they stay as they are
    # transforms: [{{kind: rotation}}]    # for activations of few bits
    # compensation: {{kind: svd, rank: {{count: 32}}}}    # a low-rank branch for what quantization takes away; or lrc, aser
    # overrides: [{{match: "*.down_proj", weights: {{bits: 8}}}}]
    # keep: [lm_head]
  validation:
    text: {validation}    # another text than the calibration's
    compute_dtype: {dtype}
    gates: {{perplexity_ratio: 1.1}}    # beyond it nothing is published
  resources: {{workers: 1, gpus_per_worker: 0}}
  output: {{uri: {output}}}    # a folder, or s3://bucket/prefix
"""
