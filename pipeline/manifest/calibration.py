"""The part of a manifest that says what a model is calibrated on."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.source import CalibrationSource, ModelSamples, SpecialTokens, TokenSource
from counterweight.workers.config import Config
from counterweight.workers.models.family import is_expert


def _text_by_default(source: object) -> object:
    # `text: {uri: ...}` reads as it is meant; the union itself needs a tag to give clear errors.
    return {"kind": "text", **source} if isinstance(source, dict) and "kind" not in source else source


Tokens = Annotated[TokenSource, BeforeValidator(_text_by_default)]
"""A token source; without a `kind` it is a text."""

CalibrationTokens = Annotated[CalibrationSource, BeforeValidator(_text_by_default)]
"""Likewise, or the model itself."""


class Section(Config):
    """A mapping of the manifest. Strict: a quoted number is no number, and 1 is not true."""

    model_config = ConfigDict(strict=True)


class Calibration(Section):
    """The tokens that statistics are gathered on, and how they pass through the model."""

    source: CalibrationTokens
    """Where the tokens come from; without a `kind`, a text."""
    sequences: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Number of windows cut from the source."""
    sequence_length: Annotated[int, Field(ge=2, le=1_048_576)] = 2048
    """Tokens of a window."""
    sampling: Literal["random", "consecutive"] = "random"
    """`random`: windows at random places of the text; `consecutive`: side by side, from its start."""
    special_tokens: SpecialTokens | None = None
    """What has the special tokens that the tokenizer puts around a text: the `text`, so that its first window alone begins with
    one, or every `window`. null: windows of models that are lost without a beginning (Gemma), texts of all others.
    """
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of random sampling, of windows or by the model."""
    held_out: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Further windows of the source that nothing is solved on: the report's errors of linears are theirs. null:
    one for sixteen that are solved on, of 4096 tokens in all, as far as the source goes. 0: none, and errors are
    those of the tokens that were solved on, as always where the model writes its own.
    """
    drawn: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Further windows of the source for experts that see fewer tokens than `experts.floor` asks for in the others:
    these are solved on the tokens that they see of them too, everything else is not. All of them run through every
    block, because which experts of later blocks lack tokens is not known when a window passes the first. 0: none,
    as always where the model writes its own.
    """
    propagate: Literal["original", "compressed"] = "original"
    """`original`: every block sees the original model's activations, and all blocks are independent;
    `compressed`: a block sees what the compressed blocks before it produce, one block after the other.
    """
    segment_blocks: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """With `propagate: compressed`: so many blocks are a segment, whose first sees the original model's
    activations and whose others come one after the other; segments are independent. 1 is `original`. null: all
    blocks are one segment.
    """
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the blocks compute in while activations are captured; statistics are summed in float32 or
    wider.
    """
    experts: ExpertCalibration = Field(default_factory=ExpertCalibration)
    """How experts are calibrated that the router sends few tokens; of dense models nothing."""

    @property
    def held_out_sequences(self) -> int:
        """Windows to be held out; of a source that may have fewer, where `held_out` is null."""
        if self.held_out is not None:
            return self.held_out
        if isinstance(self.source, ModelSamples):
            return 0
        return min(ceil(self.sequences / 16), max(1, 4096 // self.sequence_length))

    @property
    def propagated(self) -> Literal["original", "compressed"]:
        """`propagate`; of segments of one block, which see the original's activations alone, `original`."""
        return "original" if self.segment_blocks == 1 else self.propagate

    def segment_start(self, block: int) -> int | None:
        """The first block of a block's segment; None where every block sees the original's activations."""
        if self.propagated == "original":
            return None
        return 0 if self.segment_blocks is None else block - block % self.segment_blocks

    @model_validator(mode="after")
    def _segments_are_of_compressed_blocks(self) -> Calibration:
        if self.segment_blocks is not None and self.propagate == "original":
            raise ValueError(f"segment_blocks: {self.segment_blocks}: expected null with propagate: original")
        return self

    @model_validator(mode="after")
    def _samples_have_no_more(self) -> Calibration:
        if self.held_out and isinstance(self.source, ModelSamples):
            raise ValueError(f"held_out: {self.held_out}: expected null or 0 where the model writes its own tokens")
        if self.drawn and isinstance(self.source, ModelSamples):
            raise ValueError(f"drawn: {self.drawn}: expected 0 where the model writes its own tokens")
        return self

    @model_validator(mode="after")
    def _draws_for_somebody(self) -> Calibration:
        if self.drawn and not self.experts.samples:
            raise ValueError(f"drawn: {self.drawn}: expected 0 with experts.floor 0 or experts.every_token")
        return self

    def experts_among(self, linears: Iterable[str]) -> ExpertCalibration | None:
        """`experts`, where one of a block's linears with these names is an expert's; None in a dense block."""
        return self.experts if any(map(is_expert, linears)) else None
