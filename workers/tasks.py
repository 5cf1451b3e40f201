"""The tasks of the data plane as values: what is asked (specs, with their keys) and what was found (records).

A spec is everything a worker needs and nothing it does not; its key is the digest of what determines the result. Specs
travel to workers, records come back and are committed under the key. Neither holds a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from counterweight.workers.config import Config
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.keys import digest, numerics, versions
from counterweight.workers.recipe import ModuleRecipe, Rotation
from counterweight.workers.workspace import Blob, Record

SHARD_TOKENS = 8192
"""Tokens of one shard of hidden states. Part of the numerics: statistics are reduced shard by shard."""


def shard_sequences(length: int) -> int:
    """Sequences of `length` tokens in one shard of hidden states."""
    return max(1, SHARD_TOKENS // length)


FORWARD, BLOCK, EMBED, KEEP, GAINS, EVALUATE = "forward", "block", "embed", "keep", "gains", "evaluate"

BASELINE, QUANTIZED, COMPENSATED = "baseline", "quantized", "compensated"
"""The models that validation compares: the original, its codes alone, and with what compensates them."""

IRRELEVANT_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of config.json that cannot change a block's result."""

ComputeDtype = Literal["float32", "bfloat16"]
ITEMSIZE: Mapping[ComputeDtype, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of an activation."""

Device = Literal["cpu", "cuda"]


class Setting(Config):
    """What every task of a job shares."""

    source: str
    """Root URI of the source checkpoint."""
    config: Mapping[str, Any]
    """The source's config.json."""
    workspace: str
    """Root URI of the durable state."""
    compute_dtype: ComputeDtype
    device: Device
    """Where the arithmetic was asked to run: bits differ between kinds of device, so results do not mix."""
    rotation: Rotation | None = None
    """Coordinates in which the model is compressed; null: its own."""

    def determines(self) -> dict[str, Any]:
        """The part of a key that all tasks share."""
        config = {name: value for name, value in self.config.items() if name not in IRRELEVANT_CONFIG}
        return {
            "numerics": numerics(),
            "config": config,
            "compute_dtype": self.compute_dtype,
            "device": self.device,
            "shard_tokens": SHARD_TOKENS,
            "rotation": None if self.rotation is None else self.rotation.model_dump(mode="json"),
            "versions": versions(self.rotation),
        }


class SampleSpec(Config):
    """Windows of tokens that a model draws from its own distribution."""

    source: str
    """Root URI of its checkpoint."""
    compute_dtype: ComputeDtype
    sequences: int
    length: int
    temperature: float
    seed: int


class EmbedSpec(Config):
    """Tokens to the hidden states that enter block 0."""

    setting: Setting
    tokens: Blob
    """A safetensors blob with `input_ids` [sequences, length] int32."""
    tensor: tuple[str, str]
    """Name and sha256 of the embedding."""

    def key(self) -> str:
        return digest([EMBED, self.setting.determines(), self.tokens.sha256, self.tensor[1]])


class BlockSpec(Config):
    """One transformer block: which, from which weights, on which inputs, compressed how."""

    setting: Setting
    index: int
    tensors: Mapping[str, str]
    """Source tensors of the block -> sha256."""
    inputs: tuple[Blob, ...]
    """Hidden states that enter the block, one blob per shard, in order."""
    recipe: Mapping[str, ModuleRecipe]
    """Linear (name relative to the block) -> what applies to it; linears that are kept are absent."""
    propagate: Literal["original", "compressed"]
    paired: bool = False
    """Whether the second half of `inputs` is what enters the block in the original model, which the first no longer is."""

    @property
    def shards(self) -> int:
        """Shards of one stream of inputs."""
        return len(self.inputs) // 2 if self.paired else len(self.inputs)

    def forward_key(self) -> str:
        """Key of the block's *original* output: no recipe enters, so jobs that differ in recipe share it."""
        return digest(
            [
                FORWARD,
                self.setting.determines(),
                self.index,
                dict(self.tensors),
                [blob.sha256 for blob in self.inputs],
            ]
        )

    def key(self) -> str:
        """Key of the compressed block."""
        recipe = {name: part.model_dump(mode="json") for name, part in self.recipe.items()}
        return digest([BLOCK, self.forward_key(), self.propagate, self.paired, recipe, versions(self.recipe)])


class KeepSpec(Config):
    """Tensors outside the blocks that the artifact carries over as they are."""

    setting: Setting
    tensors: Mapping[str, str]

    def key(self) -> str:
        return digest([KEEP, self.setting.determines(), dict(self.tensors)])


class EvaluateSpec(Config):
    """Windows [start, stop) of a token set, for an artifact and the model it was made from."""

    setting: Setting
    tensors: Mapping[str, str]
    """Every source tensor -> sha256."""
    artifact: str
    """Root URI of the artifact's files."""
    ledger: str
    """sha256 of the artifact's ledger, which holds the digest of every stored tensor."""
    tokens: Blob
    start: int
    stop: int

    def key(self) -> str:
        shared = {**self.setting.determines(), "compute_dtype": "float32"}
        return digest([EVALUATE, shared, dict(self.tensors), self.ledger, self.tokens.sha256, self.start, self.stop])


class Timing(Config):
    """Where a task's time went, in seconds, and its memory's high-water marks, in bytes."""

    load: float = 0.0
    forward: float = 0.0
    solve: float = 0.0
    write: float = 0.0
    host_peak_bytes: int = 0
    device_peak_bytes: int = 0
    device: str = "cpu"

    @property
    def total(self) -> float:
        return self.load + self.forward + self.solve + self.write


class HiddenRecord(Record):
    """Hidden states at a block's boundary, one blob per shard."""

    outputs: tuple[Blob, ...]
    timing: Timing


class GainsRecord(Record):
    """Linear (name relative to the block) -> what each further rank of its branch would take off its relative error."""

    gains: Mapping[str, tuple[float, ...]]


class LedgerEntry(Config):
    """What became of one source tensor."""

    source: str
    shape: tuple[int, ...]
    fate: Literal["quantized", "kept", "dropped"]
    stored_as: tuple[str, ...]
    """Names of the checkpoint's tensors that hold it; empty when dropped."""
    reason: str = ""


class FallbackReport(Config):
    """A departure from the recipe that was necessary, with its cause; never silent."""

    step: str
    cause: str


class ModuleReport(Config):
    """What one linear layer cost and won.

    error_quantized, error_compensated: squared error of the output over the calibration tokens, quantized inputs included,
    relative to the original output, before and after the low-rank branch; None when no token reached the layer. Bits are of
    storage, in sum over the layer.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int | None
    rank: int
    tokens: int
    code_bits: int
    scale_bits: int
    factor_bits: int
    residual_bits: int = 0
    error_quantized: float | None
    error_compensated: float | None
    fallbacks: tuple[FallbackReport, ...] = ()
    seconds: float


class BlockRecord(Record):
    """A compressed block: finished checkpoint shard, adapter factors, what it cost and won."""

    index: int
    checkpoint: Blob
    adapter: Blob | None
    outputs: tuple[Blob, ...]
    """Hidden states after the *compressed* block (propagate: compressed), then, of paired inputs, after the original one;
    otherwise empty."""
    tensors: Mapping[str, str]
    """Tensors in the checkpoint shard -> sha256 of dtype, shape and bytes."""
    factors: Mapping[str, str]
    """Tensors of the adapter -> sha256, likewise."""
    residual: Blob | None = None
    """The block's residual stores."""
    residuals: Mapping[str, str] = Field(default_factory=dict)
    """Tensors of the residual stores -> sha256, likewise."""
    modules: tuple[ModuleReport, ...]
    formats: Mapping[str, ModuleFormat]
    """Full module name, as stored -> format."""
    kept_bits: int = Field(ge=0)
    """Bits of the block's tensors that were carried over: norms, biases, routers, kept linears."""
    ledger: tuple[LedgerEntry, ...]
    timing: Timing

    @property
    def stored(self) -> tuple[Blob, ...]:
        """The blobs that an artifact is made of."""
        return tuple(blob for blob in (self.checkpoint, self.adapter, self.residual) if blob is not None)


class KeepRecord(Record):
    """Tensors carried over: one checkpoint shard."""

    checkpoint: Blob
    tensors: Mapping[str, str]
    ledger: tuple[LedgerEntry, ...]
    bits: int = Field(ge=0)
    timing: Timing


class WindowMetrics(Config):
    """One window under one model.

    nll: mean negative log-likelihood of its tokens but the first, in nats. kl: mean over positions of
    KL(baseline || this), in nats. agreement: share of positions with the baseline's most probable token.
    """

    nll: float
    kl: float
    agreement: float


class EvaluateRecord(Record):
    """Variant -> metrics of the windows, in order. Without any low-rank branch there is no `compensated`."""

    windows: Mapping[str, tuple[WindowMetrics, ...]]
    timing: Timing
