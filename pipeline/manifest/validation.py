"""The part of a manifest that says how a compressed model is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints, create_model, model_validator

from counterweight.pipeline.manifest.calibration import Section, Tokens
from counterweight.workers.calibration.source import SpecialTokens
from counterweight.workers.dtypes import ModelDtype
from counterweight.workers.metrics import BOUNDED, METRICS, longest_common

TEXT = "text"
"""What the text is called that every validation has, beside further ones."""

TextName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-_a-z0-9]{0,61}[a-z0-9])?$")]


class _Gates(Section):
    """Bounds that the compressed model must keep; beyond one of them nothing is published."""


_Bound = Annotated[float, Field(gt=0, le=1e6)] | None

if TYPE_CHECKING:
    Gates = _Gates
else:
    # A field for each metric, which the type checker does not see.
    Gates = create_model(
        "Gates",
        __base__=_Gates,
        __doc__=_Gates.__doc__,
        **{metric.gate: (_Bound, Field(default=None, description=metric.description)) for metric in METRICS},
    )


FIRST_GATES = frozenset({"perplexity_ratio", "kl", "kl_p99", "top1_agreement", "router_agreement"})
"""Gates that enter an artifact's id where they are null too: younger ones do where they bound something."""


KINDS = ("at_most", "at_least", "max_ratio", "max_drop", "no_worse_than")
"""Fields of a bound that say what is allowed."""

MAX_URI = 2000  # characters


class FurtherText(Section):
    """A further text that models are judged on, in windows as long as those of `text`."""

    source: Tokens
    """Where it comes from; without a `kind`, a text."""
    windows: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Number of windows, from the start of the text; null: all."""


class Bound(Section):
    """A bound on one metric of one model on one text. Exactly one of `at_most`, `at_least`, `max_ratio`, `max_drop` and
    `no_worse_than` says what is allowed.
    """

    metric: Annotated[str, Field(json_schema_extra={"enum": [measure.name for measure in BOUNDED]})]
    """What is bounded: a metric of text, or `longest_common`, of the samples of `generation`."""
    text: TextName = TEXT
    """The text that it is measured on: `text`, or a name of `texts`."""
    variant: Literal["quantized", "compensated", "compensated_prefill"] = "compensated"
    """The model: its codes alone; as it decodes; as it takes a text that is given whole, which differs where there are residual
    stores.
    """
    at_most: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Its largest value, of a metric of which less is better."""
    at_least: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Its smallest value, of a metric of which more is better."""
    max_ratio: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Its largest multiple of the original's, of a perplexity."""
    max_drop: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """How much worse than the original's it may be, in the metric's unit."""
    no_worse_than: Annotated[str, StringConstraints(min_length=1, max_length=MAX_URI)] | None = None
    """URI of an artifact, or of a name for its latest one, whose compensated model it may not be worse than. Its report must
    have been measured on the same tokens in the same dtype; anything else is refused.
    """
    slack: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """By how much it may be worse all the same, in the metric's unit; with `no_worse_than` alone."""
    significance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What is beyond `max_ratio`, `max_drop` or `no_worse_than` fails only where a bootstrap of the windows' differences finds
    at this level that the compensated model is worse; with a metric of text. null: whatever is beyond it fails.
    """

    @property
    def kind(self) -> str:
        """The field that says what is allowed."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _says_one_thing_that_makes_sense(self) -> Bound:
        metric = next((each for each in BOUNDED if each.name == self.metric), None)
        if metric is None:
            known = ", ".join(each.name for each in BOUNDED)
            raise ValueError(f"metric: {self.metric!r}: expected one of {known}")
        said = [name for name in KINDS if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(f"expected exactly one of {', '.join(KINDS)}")
        if said == ["at_most" if metric.higher_is_better else "at_least"]:
            better = "more" if metric.higher_is_better else "less"
            raise ValueError(f"{said[0]}: expected the other, because of {metric.name} {better} is better")
        if said == ["max_ratio"] and not metric.relative:
            raise ValueError(
                f"max_ratio: expected at_most, at_least or max_drop: the original's {metric.name} is no measure"
            )
        if self.slack and said != ["no_worse_than"]:
            raise ValueError("slack: expected no_worse_than beside it")
        if self.significance is not None:
            self._check_that_it_can_be_tested(said[0])
        return self

    def _check_that_it_can_be_tested(self, kind: str) -> None:
        if kind in ("at_most", "at_least"):
            raise ValueError("significance: expected max_ratio, max_drop or no_worse_than: a test compares two models")
        if self.variant != "compensated" or self.metric == longest_common.MEASURE.name:
            raise ValueError(
                "significance: expected a metric of text, of the compensated model: it has numbers of windows"
            )


class HarnessTask(Section):
    """A task of the lm-evaluation-harness (the extra `counterweight[lm-eval]`), which is asked of the original, the quantized
    and the compensated model; each has to fit into a worker's memory as a whole.
    """

    uri: Annotated[str, StringConstraints(min_length=1, max_length=MAX_URI)]
    """Its YAML file, as the harness has it, without `!function`; its `dataset_kwargs.data_files` are .json or .jsonl files,
    named relative to it. Templates in it run as a program does: name only files that you trust.
    """
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Worked examples before each item; null: as the file says."""
    limit: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Items that are asked, from the first; null: all."""
    max_drop: Annotated[
        dict[Annotated[str, StringConstraints(min_length=1, max_length=200)], Annotated[float, Field(ge=0, le=1e6)]],
        Field(max_length=32, json_schema_extra={"additionalProperties": False}),
    ] = Field(default_factory=dict)
    """Metric of the task (`acc`, `exact_match`) -> how much worse than the original's the compressed model's may be."""
    significance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A drop beyond `max_drop` fails only where a paired test over the items finds it at this level: McNemar's for items that
    are right or wrong, a bootstrap of the differences for others. null: every drop beyond it fails.
    """


class Generation(Section):
    """Samples of what the original, the quantized and the compensated model write, side by side in the report; each has to fit
    into a worker's memory as a whole.
    """

    prompts: Annotated[int, Field(ge=1, le=64)] = 4
    """How many: each is the beginning of a window of `text`."""
    prompt_tokens: Annotated[int, Field(ge=1, le=4096)] = 32
    """Tokens of a prompt, at most those of a window."""
    new_tokens: Annotated[int, Field(ge=1, le=4096)] = 32
    """Tokens that follow it, the most probable one each time."""


class Validation(Section):
    """How the compressed model is judged before it is published."""

    text: Tokens
    """What it is judged on; without a `kind`, a text. Not the calibration's."""
    texts: Annotated[
        dict[TextName, FurtherText], Field(max_length=32, json_schema_extra={"additionalProperties": False})
    ] = Field(default_factory=dict)
    """Further texts by name, on which every metric is measured too, in the same run. Names are for reports and bounds, in which
    the text above is called `text`.
    """
    sequence_length: Annotated[int, Field(ge=2, le=1_048_576)] | None = None
    """Tokens of a window, at most the model's positions; null: the calibration's."""
    special_tokens: SpecialTokens | None = None
    """What has the special tokens that the tokenizer puts around a text: the `text`, so that its first window alone begins with
    one, or every `window`. null: windows of models that are lost without a beginning (Gemma), texts of all others.
    """
    windows: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Number of windows, from the start of the text; null: all."""
    compute_dtype: ModelDtype = "float32"
    """Type that the original and the compressed model compute in. float32 shows what compression costs and nothing
    else; bfloat16 is what a GPU is fast in; float16 shows what a model is worth that is served in it.
    """
    gates: Gates = Field(default_factory=Gates)
    """Bounds for publication, on the compressed model while decoding: residual stores correct every token."""
    prefill_gates: Gates | None = None
    """Likewise in prefill: residual stores leave a text that is given whole alone; without them both are one model. null: no
    bounds.
    """
    bounds: Annotated[tuple[Bound, ...], Field(max_length=200)] = ()
    """Further bounds, each on a metric, a text and a model of its own."""
    tasks: Annotated[
        dict[TextName, HarnessTask], Field(max_length=64, json_schema_extra={"additionalProperties": False})
    ] = Field(default_factory=dict)
    """Tasks of the lm-evaluation-harness by name."""
    generation: Generation | None = None
    """Samples for people to read, and for how long a compressed model writes what the original does; null: none."""

    @model_validator(mode="after")
    def _texts_are_there(self) -> Validation:
        if TEXT in self.texts:
            raise ValueError(f"texts.{TEXT}: expected another name: that of spec.validation.text")
        for index, bound in enumerate(self.bounds):
            if bound.text not in self.sources:
                raise ValueError(f"bounds.{index}.text: {bound.text!r}: expected one of {', '.join(self.sources)}")
            if bound.metric == longest_common.MEASURE.name and (self.generation is None or bound.text != TEXT):
                raise ValueError(
                    f"bounds.{index}.metric: {bound.metric}: expected generation, whose prompts are of {TEXT!r}"
                )
        return self

    @property
    def runs_whole(self) -> bool:
        """Whether models are run as a whole, and not block by block alone."""
        return bool(self.tasks) or self.generation is not None

    @property
    def sources(self) -> Mapping[str, tuple[Tokens, int | None]]:
        """Name -> source and number of windows (None: all), of every text, `text` first."""
        further = {name: (text.source, text.windows) for name, text in self.texts.items()}
        return {TEXT: (self.text, self.windows), **further}
