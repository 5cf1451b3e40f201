"""A job's token sets: what calibrates the model and what it is measured on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.manifest.job import TextShare
from counterweight.pipeline.texts import (
    CALIBRATION,
    DISTILLATION,
    Request,
    Texts,
    read_texts,
    requests,
    validation_field,
)
from counterweight.workers.calibration.source import SpecialTokens
from counterweight.workers.calibration.tokens import TokenSet, as_tensor, checked, token_set
from counterweight.workers.calibration.windows import AnyTokenizer
from counterweight.workers.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token sets of a job. drawn: further windows of the calibration's source, for experts that see too few tokens; unseen:
    those that nothing is solved on; None without any.
    validation: by name, those of each text, all of one length; empty when it asks for none. trained, held_out: texts of a
    distillation, none without it. usual: what has special tokens where the manifest does not say it. seconds: what reading all
    took."""

    calibration: TokenSet
    drawn: TokenSet | None = None
    unseen: TokenSet | None = None
    validation: Mapping[str, TokenSet]
    trained: tuple[TokenSet, ...] = ()
    held_out: tuple[TokenSet, ...] = ()
    usual: SpecialTokens = "text"
    seconds: float

    def within(self, vocabulary: int) -> Tokens:
        """Itself; RequestError when an id is not below the model's `vocabulary`."""
        self.calibration.within(vocabulary, CALIBRATION)
        for further in (self.drawn, self.unseen):
            if further is not None:
                further.within(vocabulary, CALIBRATION)
        for name, windows in self.validation.items():
            windows.within(vocabulary, validation_field(name))
        for index, text in enumerate(self.trained):
            text.within(vocabulary, f"{DISTILLATION}.texts.{index}")
        for index, text in enumerate(self.held_out):
            text.within(vocabulary, f"{DISTILLATION}.held_out.{index}")
        return self

    @property
    def judged(self) -> TokenSet | None:
        """The windows of all texts of the validation, one text behind the other; None without any."""
        texts = [text.ids for text in self.validation.values()]
        return TokenSet(torch.cat(texts)) if texts else None


def read_tokens(
    job: CompressionJob, tokenizer: AnyTokenizer, sampled: TokenSet | None = None, texts: Texts | None = None
) -> Tokens:
    """The token sets that `job` names; RequestError when a text does not give what is asked of it.

    tokenizer: the model's tokenizer.json. What the model's vocabulary is need not be known yet, see `Tokens.within`. sampled:
    what the model wrote, when it is to be calibrated on that; ValueError without it. texts: those of the job, where they have
    been read.
    """
    texts = texts or read_texts(job, tokenizer)
    started = time.perf_counter()
    found = {asked.field: _token_set(asked, texts) for asked in requests(job, texts.usual)}
    if sampled is not None:
        found[CALIBRATION] = sampled
    elif CALIBRATION not in found:
        raise ValueError("sampled: none: expected what the model wrote")
    trained, held_out = _distillation(job, found)
    calibration, drawn, unseen = _divided(job, found[CALIBRATION])
    asked = job.spec.validation
    return Tokens(
        calibration=calibration,
        drawn=drawn,
        unseen=unseen,
        validation={name: found[validation_field(name)] for name in asked.sources} if asked is not None else {},
        trained=trained,
        held_out=held_out,
        usual=texts.usual,
        seconds=texts.seconds + time.perf_counter() - started,
    )


def _token_set(asked: Request, texts: Texts) -> TokenSet:
    if asked.field in texts.found:
        return checked(as_tensor(texts.found[asked.field]), asked.field)
    return token_set(
        asked.source,
        None,
        length=asked.length,
        sequences=asked.sequences,
        sampling=asked.sampling,
        seed=asked.seed,
        field=asked.field,
        further=asked.further,
        special_tokens=asked.special_tokens,
    )


def _divided(job: CompressionJob, found: TokenSet) -> tuple[TokenSet, TokenSet | None, TokenSet | None]:
    """The windows that everything is solved on, those that are drawn for experts, and those that are held out. RequestError
    where the manifest names more than are left. The source gives held-out ones first: they do not depend on how many are drawn.
    """
    asked, ids = job.spec.calibration, found.ids
    further = len(ids) - asked.sequences
    if asked.held_out is not None and further < asked.held_out:
        raise RequestError(
            f"spec.calibration.held_out: {asked.held_out}: the source has {further} windows beside those that are solved on"
        )
    unseen = min(further, asked.held_out_sequences)
    if further - unseen < asked.drawn:
        raise RequestError(
            f"spec.calibration.drawn: {asked.drawn}: the source has {further - unseen} windows beside {asked.sequences} that "
            f"are solved on and {unseen} that are held out"
        )
    solved, held_out, drawn = ids.split([asked.sequences, unseen, asked.drawn])
    return TokenSet(solved.contiguous()), _of(drawn), _of(held_out)


def _of(windows: Tensor) -> TokenSet | None:
    return TokenSet(windows.contiguous()) if len(windows) else None


def _distillation(
    job: CompressionJob, found: Mapping[str, TokenSet]
) -> tuple[tuple[TokenSet, ...], tuple[TokenSet, ...]]:
    """Texts that are trained on, and those that are held out; RequestError where a window is in both."""
    stage = job.spec.distillation
    if stage is None:
        return (), ()

    def shares(asked: Sequence[TextShare], name: str) -> tuple[TokenSet, ...]:
        """Each without the windows that it skips."""
        ids = (found[f"{DISTILLATION}.{name}.{index}.source"].ids for index in range(len(asked)))
        return tuple(TokenSet(one[share.skip :].contiguous()) for share, one in zip(asked, ids, strict=True))

    trained, held_out = shares(stage.texts, "texts"), shares(stage.held_out, "held_out")
    seen = {tuple(window) for text in trained for window in text.ids.tolist()}
    for index, text in enumerate(held_out):
        shared = sum(tuple(window) in seen for window in text.ids.tolist())
        if shared:
            raise RequestError(
                f"{DISTILLATION}.held_out.{index}: {shared} of {text.sequences} windows are trained on: expected none, "
                "as another text or `skip` gives"
            )
    return trained, held_out
