"""Checkpoints that are not artifacts of ours: plain models, and what other tools have quantized, as transformers loads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from counterweight.pipeline.artifact import DOCUMENT
from counterweight.pipeline.artifact.document import LATEST
from counterweight.pipeline.judging.yardstick import Yardstick
from counterweight.pipeline.model_files import resolve
from counterweight.pipeline.validate import Windows
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.context import DTYPES
from counterweight.workers.errors import CheckpointError, RequestError
from counterweight.workers.foreign import PackedFormat, format_of
from counterweight.workers.storage import open_store
from counterweight.workers.storage.names import file_root
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, QUANTIZED
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.whole_model import measure_whole


def is_ours(uri: str) -> bool:
    """Whether there is an artifact of ours, or a name with a latest one."""
    if uri.startswith("hf:"):
        return False
    store = open_store(uri)
    return store.exists(DOCUMENT) or store.exists(LATEST)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A checkpoint in a folder of this machine. kind: its quant_method, or `plain`. bytes: of its weights' files. packed: how
    its weights are decoded; None where transformers does it."""

    folder: Path
    kind: str
    bytes: int
    packed: PackedFormat | None = None

    @classmethod
    def open(cls, uri: str) -> Foreign:
        """Reads config.json. RequestError where there is no checkpoint in safetensors on this machine."""
        folder = file_root(resolve(uri))
        if folder is None:
            raise RequestError(f"{uri}: expected an artifact of ours, a folder of this machine, or hf:owner/name")
        files = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").is_file() or not files:
            raise RequestError(
                f"{uri}: no artifact.json and no latest.json, nor config.json and weights in safetensors: expected an "
                "artifact, or a checkpoint that transformers loads"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise CheckpointError(f"{uri}: config.json: {error}") from error
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        quantization = quantization if isinstance(quantization, dict) else {}
        method = str(quantization.get("quant_method") or "plain")
        return cls(folder, method, sum(path.stat().st_size for path in files), format_of(quantization))

    def judge(self, yardstick: Yardstick) -> Windows:
        """On the yardstick's windows; the model is in memory as a whole."""
        device, note = yardstick.worker.context.device, yardstick.note
        note(f"loading {self.folder} ({self.kind}) through transformers")
        model = self.load(DTYPES[yardstick.dtype]).to(device).eval()
        ids = yardstick.tokens.ids.long().to(device)

        def told(done: int) -> None:
            note(f"{self.folder.name}: {done} of {len(ids)} windows")

        batches = ids.split(shard_sequences(ids.shape[1]))
        found = measure_whole(model, batches, yardstick.log_probabilities, told)
        same = {BASELINE: found[BASELINE], QUANTIZED: found[QUANTIZED], COMPENSATED: found[QUANTIZED]}
        return Windows(
            metrics={variant: list(measured.metrics) for variant, measured in same.items()},
            profiles={variant: list(measured.profiles) for variant, measured in same.items()},
        )

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model in memory. RequestError for what transformers refuses here, and where it would make weights up."""
        try:
            found = self._stock(dtype) if self.packed is None else self._decoded(self.packed, dtype)
        except (ImportError, OSError, RuntimeError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())[:300]
            raise RequestError(f"{self.folder}: transformers cannot load it here ({self.kind}): {said}") from error
        if found.missing:
            raise RequestError(
                f"{self.folder}: transformers finds no {found.missing[0]} ({len(found.missing)} such): it would invent them"
            )
        return found.model

    def _stock(self, dtype: torch.dtype) -> _Loaded:
        """As transformers loads it, with what it has of the quantization."""
        return _Loaded.of(
            AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, local_files_only=True, use_safetensors=True, **_ASKED
            )
        )

    def _decoded(self, packed: PackedFormat, dtype: torch.dtype) -> _Loaded:
        """The plain model, of weights that are decoded here: transformers would need the tool that wrote them."""
        checkpoint = Checkpoint.open(open_store(self.folder.as_uri()), quantized=True)
        tensors = packed.weights(checkpoint.read_many(checkpoint.names))
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return _Loaded.of(model.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **_ASKED))


_ASKED = {"trust_remote_code": False, "output_loading_info": True}


@dataclass(frozen=True, slots=True)
class _Loaded:
    """missing: weights that the model has and its checkpoint does not."""

    model: PreTrainedModel
    missing: list[str]

    @classmethod
    def of(cls, found: tuple[PreTrainedModel, Mapping[str, Iterable[str]]]) -> _Loaded:
        model, info = found
        return cls(model, sorted(info["missing_keys"]))
