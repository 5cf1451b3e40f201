"""report.json: what a job cost and won, in numbers that were measured.

Contract (DESIGN section 6). What is claimed without compensation was measured without it. Bits per weight are all in:
codes, scales with zero points, low-rank factors, residual store, over the weights that were quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, Field

from counterweight.pipeline.artifact.making import Earlier, Making, Sizes
from counterweight.pipeline.artifact.verdict import BenchmarkReport, GateReport, GenerationReport
from counterweight.pipeline.manifest.validation import TEXT
from counterweight.workers.calibration.source import SpecialTokens
from counterweight.workers.config import Config
from counterweight.workers.dtypes import ModelDtype
from counterweight.workers.errors import RequestError
from counterweight.workers.metrics import METRICS, Measure
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, PREFILL, QUANTIZED, VARIANTS, WindowMetrics
from counterweight.workers.tasks.records import ModuleReport, Timing

if TYPE_CHECKING:
    from counterweight.workers.calibration.source import CalibrationSource
    from counterweight.workers.calibration.tokens import TokenSet


T = TypeVar("T")

WindowsReport = Mapping[str, Mapping[str, tuple[float, ...]]]
"""Variant -> metric -> its number for each window, in order."""

WINDOW_DIGITS = 7
"""Of a window's number: what float32 holds."""


class Quality(Config):
    """A model on the validation windows: a number for each metric of `workers.metrics`. Those that every report has are fields;
    further ones are there when they were measured."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    perplexity: float
    kl: float
    top1_agreement: float

    def of(self, metric: Measure) -> float | None:
        """The metric's number; None in a report that is older than the metric."""
        value: float | None = getattr(self, metric.name, None)
        return value


class Judged(Config):
    """A document with a quality for each variant of the model (`workers.tasks.evaluate.VARIANTS`) that was measured."""

    @property
    def qualities(self) -> dict[str, Quality]:
        """Variant -> its quality; empty without validation."""
        found: dict[str, Quality | None] = {variant: getattr(self, variant) for variant in VARIANTS}
        return {variant: quality for variant, quality in found.items() if quality is not None}


class TokensReport(Config):
    """A token set. digest: of its ids. drawn: further windows, for experts that saw too few tokens of these. held_out: further
    ones, which nothing is solved on."""

    source: Mapping[str, object]
    sequences: int
    sequence_length: int
    digest: str
    drawn: int = 0
    held_out: int = 0
    special_tokens: SpecialTokens = "text"
    """What has the tokenizer's special tokens around it."""


class TextReport(Judged):
    """All models on one text, see `Report`. kl_by_position: variant -> mean divergence from the original in nats over positions
    0, 1, 2 to 3, 4 to 7 and so on of a window; windows: of the original and the compensated model, for bounds with a
    significance. Both are empty in reports that are older."""

    tokens: TokensReport
    baseline: Quality
    quantized: Quality
    compensated: Quality
    compensated_prefill: Quality | None = None
    kl_by_position: Mapping[str, tuple[float, ...]] = Field(default_factory=dict)
    windows: WindowsReport = Field(default_factory=dict)


def labelled(found: Mapping[str, T]) -> dict[str, T]:
    """What people call each variant -> what was found of it, in order."""
    labels = {BASELINE: "original", QUANTIZED: "quantized", COMPENSATED: "compensated"}
    if PREFILL in found:
        labels |= {COMPENSATED: "compensated, decoding", PREFILL: "compensated, prefill"}
    return {label: found[variant] for variant, label in labels.items() if variant in found}


class BitsPerWeight(Config):
    """Storage per quantized weight, in bits. model: everything the artifact stores over all of the model's weights."""

    weights: float
    scales: float
    factors: float
    residual: float
    total: float
    model: float

    @property
    def parts(self) -> dict[str, float]:
        """What `total` is the sum of, by what people call it; parts that cost nothing are left out."""
        parts = {"codes": self.weights, "scales": self.scales, "factors": self.factors, "residual store": self.residual}
        return {name: bits for name, bits in parts.items() if bits > 0}


class TaskReport(Config):
    """One task: where its seconds went, its memory's high-water mark; reused: found finished, not run by this job."""

    name: str
    reused: bool
    timing: Timing


class ModelReport(Config):
    """The source model. digest: of every tensor's digest."""

    uri: str
    model_type: str
    parameters: int
    digest: str


class DistillationReport(Config):
    """The training of the model. kept: the epoch that is published, 0: the model from before it. divergences: for each
    epoch from 0, KL(original || compressed) of each held-out text in nats a token. losses: of the training texts, from epoch
    1."""

    trained: tuple[TokensReport, ...]
    held_out: tuple[TokensReport, ...]
    kept: int
    divergences: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]


class Report(Judged):
    """The whole report. baseline, quantized and compensated are None when the job has no validation; without branches and
    residual stores compensated equals quantized, because it is the same model.

    With residual stores, compensated is decoding: the stores correct every token, as when tokens come one at a time, and gates
    look at it; `load_model(..., residual="all")` gives a whole text that score. compensated_prefill is what stores leave of it
    on a text that is given whole, as `load_model` scores it by default. A text that is generated after a prompt lies between:
    its prompt is prefill. None without residual stores, and in reports that are older than the field.
    """

    schema_version: int = 1
    name: str
    id: str
    created: str
    model: ModelReport
    recipe: Mapping[str, object]
    calibration: TokensReport
    validation: TokensReport | None
    distillation: DistillationReport | None = None
    """What training won; modules' errors are those from before it."""
    baseline: Quality | None
    quantized: Quality | None
    compensated: Quality | None
    compensated_prefill: Quality | None = None
    kl_by_position: Mapping[str, tuple[float, ...]] = Field(default_factory=dict)
    windows: WindowsReport = Field(default_factory=dict)
    """Both: see `TextReport`."""
    texts: Mapping[str, TextReport] = Field(default_factory=dict)
    """Further texts by name: what all models are worth on each of them."""
    benchmarks: Mapping[str, BenchmarkReport] = Field(default_factory=dict)
    """Tasks of the lm-evaluation-harness by name."""
    generation: GenerationReport | None = None
    """What models write; None where it was not asked for, and in reports that are older."""
    gates: tuple[GateReport, ...] = ()
    """Every bound that the job had, kept or not; empty in reports that are older."""
    base_model_problem: str | None = None
    """What is wrong with the original itself on these texts, so that compression is not blamed for it; None for nothing."""
    validation_dtype: ModelDtype = "float32"
    """Type that all models computed in when they were judged."""
    routers: Mapping[str, Mapping[int, float]] = Field(default_factory=dict)
    """Variant -> sparse block -> share of the validation's tokens that its router sends to the same experts as the original's;
    empty for dense models, without validation, and in reports that are older."""
    bits_per_weight: BitsPerWeight
    modules: tuple[ModuleReport, ...]
    tasks: tuple[TaskReport, ...]
    stages: Mapping[str, float]
    """Stage of the job -> seconds of wall time."""
    software: Mapping[str, str]
    sizes: Sizes | None = None
    """Before and after."""
    making: Making | None = None
    """The run that published it."""
    earlier: Earlier | None = None
    """The artifact of this name before it; null for the first."""

    @property
    def judged(self) -> dict[str, TextReport]:
        """Name -> what was measured, of every text, `text` first; empty without validation."""
        if self.validation is None or self.baseline is None or self.quantized is None or self.compensated is None:
            return {}
        first = TextReport(
            tokens=self.validation,
            baseline=self.baseline,
            quantized=self.quantized,
            compensated=self.compensated,
            compensated_prefill=self.compensated_prefill,
            kl_by_position=self.kl_by_position,
            windows=self.windows,
        )
        return {TEXT: first, **self.texts}


def tokens_report(
    source: CalibrationSource,
    tokens: TokenSet,
    unseen: TokenSet | None = None,
    special_tokens: SpecialTokens = "text",
    drawn: TokenSet | None = None,
) -> TokensReport:
    """A token set and where it came from; unseen, drawn: further windows of it, see `TokensReport`."""
    return TokensReport(
        source=source.model_dump(mode="json"),
        sequences=tokens.sequences,
        sequence_length=tokens.length,
        digest=tokens.digest,
        drawn=0 if drawn is None else drawn.sequences,
        held_out=0 if unseen is None else unseen.sequences,
        special_tokens=special_tokens,
    )


def quality(windows: Sequence[WindowMetrics]) -> Quality:
    """Every metric that the model has over windows, in the order given. RequestError for one beyond any number (a perplexity of
    e^710)."""
    measured = [metric for metric in METRICS if all(metric.name in window for window in windows)]
    try:
        summary = {metric.name: metric.over_windows([window[metric.name] for window in windows]) for metric in measured}
    except OverflowError as error:
        raise RequestError("validation: a metric is beyond float64: expected a model that predicts its text") from error
    return Quality.model_validate(summary)


def by_window(windows: Sequence[WindowMetrics]) -> dict[str, tuple[float, ...]]:
    """Every metric that the model has -> its number for each window, to as many digits as it is known."""
    return {
        metric.name: tuple(float(f"{window[metric.name]:.{WINDOW_DIGITS}g}") for window in windows)
        for metric in METRICS
        if all(metric.name in window for window in windows)
    }


def bits_per_weight(records: Iterable[BlockRecord], kept_bits: int, parameters: int) -> BitsPerWeight:
    """kept_bits: bits of all tensors that were carried over. parameters: of the whole model."""
    modules = [module for record in records for module in record.modules]
    weights = sum(module.rows * module.columns for module in modules)
    codes = sum(module.code_bits for module in modules)
    scales = sum(module.scale_bits for module in modules)
    factors = sum(module.factor_bits for module in modules)
    residual = sum(module.residual_bits for module in modules)
    per = max(weights, 1)
    return BitsPerWeight(
        weights=codes / per,
        scales=scales / per,
        factors=factors / per,
        residual=residual / per,
        total=(codes + scales + factors + residual) / per,
        model=(codes + scales + factors + residual + kept_bits) / parameters,
    )
