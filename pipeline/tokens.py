"""A job's token sets: what calibrates the model and what it is measured on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.manifest.job import TextShare
from counterweight.workers.calibration.source import ModelSamples
from counterweight.workers.calibration.tokens import TokenSet, token_set
from counterweight.workers.errors import RequestError

CALIBRATION, VALIDATION, DISTILLATION = "spec.calibration.source", "spec.validation.text", "spec.distillation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token sets of a job. validation: None when it asks for none. trained, held_out: texts of a distillation, none without
    it. seconds: what reading all took."""

    calibration: TokenSet
    validation: TokenSet | None
    trained: tuple[TokenSet, ...] = ()
    held_out: tuple[TokenSet, ...] = ()
    seconds: float

    def within(self, vocabulary: int) -> Tokens:
        """Itself; RequestError when an id is not below the model's `vocabulary`."""
        self.calibration.within(vocabulary, CALIBRATION)
        if self.validation is not None:
            self.validation.within(vocabulary, VALIDATION)
        for index, text in enumerate(self.trained):
            text.within(vocabulary, f"{DISTILLATION}.texts.{index}")
        for index, text in enumerate(self.held_out):
            text.within(vocabulary, f"{DISTILLATION}.held_out.{index}")
        return self


def read_tokens(job: CompressionJob, tokenizer: bytes | None, sampled: TokenSet | None = None) -> Tokens:
    """Reads and tokenizes the texts that `job` names; RequestError when one does not give what is asked of it.

    tokenizer: the model's tokenizer.json. What the model's vocabulary is need not be known yet, see `Tokens.within`. sampled:
    what the model wrote, when it is to be calibrated on that; ValueError without it.
    """
    started = time.perf_counter()
    calibration, validation = job.spec.calibration, job.spec.validation
    if not isinstance(calibration.source, ModelSamples):
        first = token_set(
            calibration.source,
            tokenizer,
            length=calibration.sequence_length,
            sequences=calibration.sequences,
            sampling=calibration.sampling,
            seed=calibration.seed,
            field=CALIBRATION,
        )
    elif sampled is None:
        raise ValueError("sampled: none: expected what the model wrote")
    else:
        first = sampled
    second = None
    if validation is not None:
        second = token_set(
            validation.text,
            tokenizer,
            length=validation.sequence_length or calibration.sequence_length,
            sequences=validation.windows,
            sampling="consecutive",
            seed=0,
            field=VALIDATION,
        )
    trained, held_out = _distillation(job, tokenizer)
    return Tokens(
        calibration=first,
        validation=second,
        trained=trained,
        held_out=held_out,
        seconds=time.perf_counter() - started,
    )


def _distillation(job: CompressionJob, tokenizer: bytes | None) -> tuple[tuple[TokenSet, ...], tuple[TokenSet, ...]]:
    """Texts that are trained on, and those that are held out; RequestError where a window is in both."""
    stage, length = job.spec.distillation, job.spec.calibration.sequence_length
    if stage is None:
        return (), ()

    def read(shares: Sequence[TextShare], name: str) -> tuple[TokenSet, ...]:
        return tuple(
            _share(share, tokenizer, length, f"{DISTILLATION}.{name}.{index}.source")
            for index, share in enumerate(shares)
        )

    trained, held_out = read(stage.texts, "texts"), read(stage.held_out, "held_out")
    seen = {tuple(window) for text in trained for window in text.ids.tolist()}
    for index, text in enumerate(held_out):
        shared = sum(tuple(window) in seen for window in text.ids.tolist())
        if shared:
            raise RequestError(
                f"{DISTILLATION}.held_out.{index}: {shared} of {text.sequences} windows are trained on: expected none, "
                "as another text or `skip` gives"
            )
    return trained, held_out


def _share(share: TextShare, tokenizer: bytes | None, length: int, field: str) -> TokenSet:
    found = token_set(
        share.source,
        tokenizer,
        length=length,
        sequences=share.skip + share.sequences,
        sampling="consecutive",
        seed=0,
        field=field,
    )
    return TokenSet(found.ids[share.skip :].contiguous())
