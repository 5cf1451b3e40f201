"""A job's token sets: what calibrates the model and what it is measured on."""

from __future__ import annotations

import time
from dataclasses import dataclass

from counterweight.pipeline.manifest import CompressionJob
from counterweight.workers.calibration.source import ModelSamples
from counterweight.workers.calibration.tokens import TokenSet, token_set

CALIBRATION, VALIDATION = "spec.calibration.source", "spec.validation.text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token sets of a job. validation: None when it asks for none. seconds: what reading both took."""

    calibration: TokenSet
    validation: TokenSet | None
    seconds: float

    def within(self, vocabulary: int) -> Tokens:
        """Itself; RequestError when an id is not below the model's `vocabulary`."""
        self.calibration.within(vocabulary, CALIBRATION)
        if self.validation is not None:
            self.validation.within(vocabulary, VALIDATION)
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
    return Tokens(calibration=first, validation=second, seconds=time.perf_counter() - started)
