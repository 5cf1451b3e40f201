"""A job's texts as windows of token ids, without torch: read before Ray and workers start."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from counterweight.pipeline.manifest import TEXT, Calibration, CompressionJob
from counterweight.pipeline.manifest.job import TextShare
from counterweight.workers.calibration.encoder import Encoder
from counterweight.workers.calibration.source import ModelSamples, SpecialTokens, TokenSource, TokensSource
from counterweight.workers.calibration.texts import open_text
from counterweight.workers.calibration.windows import AnyTokenizer, Sampling, Windows, encoder, windows
from counterweight.workers.models.families import family_of

CALIBRATION, VALIDATION, DISTILLATION = "spec.calibration.source", "spec.validation", "spec.distillation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job asks of one source. field: where it stands in the manifest. See `calibration.tokens.token_set`."""

    field: str
    source: TokenSource
    length: int
    sequences: int | None
    sampling: Sampling = "consecutive"
    seed: int = 0
    further: tuple[int, ...] = ()
    special_tokens: SpecialTokens = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Field of the manifest -> the windows of the text that it names; prepared tokens are not among them. usual: see
    `requests`. seconds: what reading took."""

    found: Mapping[str, Windows]
    usual: SpecialTokens
    seconds: float


def validation_field(name: str) -> str:
    """Where a text of the validation stands in the manifest."""
    return f"{VALIDATION}.text" if name == TEXT else f"{VALIDATION}.texts.{name}.source"


def requests(job: CompressionJob, usual: SpecialTokens) -> Iterator[Request]:
    """Everything that is read before a model runs. usual: what has special tokens where the manifest does not say it."""
    calibration, validation, stage = job.spec.calibration, job.spec.validation, job.spec.distillation
    if not isinstance(calibration.source, ModelSamples):
        yield Request(
            field=CALIBRATION,
            source=calibration.source,
            length=calibration.sequence_length,
            sequences=calibration.sequences,
            sampling=calibration.sampling,
            seed=calibration.seed,
            further=(calibration.held_out_sequences, calibration.drawn),
            special_tokens=calibration.special_tokens or usual,
        )
    if validation is not None:
        length = validation.sequence_length or calibration.sequence_length
        for name, (source, count) in validation.sources.items():
            yield Request(
                field=validation_field(name),
                source=source,
                length=length,
                sequences=count,
                special_tokens=validation.special_tokens or usual,
            )
    if stage is not None:
        yield from _shares(stage.texts, "texts", calibration, usual)
        yield from _shares(stage.held_out, "held_out", calibration, usual)


def _shares(
    shares: Sequence[TextShare], name: str, calibration: Calibration, usual: SpecialTokens
) -> Iterator[Request]:
    for index, share in enumerate(shares):
        yield Request(
            field=f"{DISTILLATION}.{name}.{index}.source",
            source=share.source,
            length=calibration.sequence_length,
            sequences=share.skip + share.sequences,
            special_tokens=calibration.special_tokens or usual,
        )


def usual_special_tokens(config: Mapping[str, object]) -> SpecialTokens:
    """What has special tokens where a manifest does not say it, by the model's config.json."""
    return "window" if family_of(config.get("model_type")).needs_beginning else "text"


def read_texts(job: CompressionJob, tokenizer: AnyTokenizer, usual: SpecialTokens = "text") -> Texts:
    """Reads and tokenizes the texts that `job` names, as far as its windows need; RequestError when one does not give what is
    asked of it, or prepared tokens are not there. tokenizer: the model's. usual: see `requests`."""
    started = time.perf_counter()
    found = {asked.field: cut for asked, cut in _cut(requests(job, usual), tokenizer)}
    return Texts(found=found, usual=usual, seconds=time.perf_counter() - started)


def check_texts(job: CompressionJob, tokenizer: AnyTokenizer, usual: SpecialTokens = "text") -> None:
    """Looks whether `read_texts` would get what is asked of each text, reading no more of it than that takes. RequestError."""
    # As many tokens as windows need are enough, wherever the windows will lie.
    least = (
        replace(asked, sequences=asked.sequences or 1, sampling="consecutive", further=())
        for asked in requests(job, usual)
    )
    for _ in _cut(least, tokenizer):
        pass


def _cut(asked: Iterable[Request], tokenizer: AnyTokenizer) -> Iterator[tuple[Request, Windows]]:
    """The windows of each text; prepared tokens are only looked for. RequestError."""
    running: Encoder | None = None
    try:
        for one in asked:
            if isinstance(one.source, TokensSource):
                open_text(one.source.uri, one.field)
                continue
            running = running or encoder(tokenizer, one.field)
            cut = windows(
                one.source,
                running,
                length=one.length,
                sequences=one.sequences,
                sampling=one.sampling,
                seed=one.seed,
                field=one.field,
                further=one.further,
                special_tokens=one.special_tokens,
            )
            yield one, cut
    finally:
        if running is not None:
            running.close()
