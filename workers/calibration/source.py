"""Where tokens come from, as the manifest says it; and how windows are cut from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from counterweight.workers.config import Config

Name = Annotated[str, Field(min_length=1, max_length=2000)]

SpecialTokens = Literal["text", "window"]
"""What has the special tokens (a beginning, an end) that a tokenizer puts around a text: the text that windows are cut from, so
that its first window alone has a beginning; or each window, which then has so many fewer of the text's."""


class TextSource(Config):
    """A UTF-8 text file, tokenized as one text, as far as its windows need it."""

    kind: Literal["text"] = "text"
    uri: Name
    """`file:`, `s3:` or a path relative to the manifest."""


class StandardLibrarySource(Config):
    """The running interpreter's own standard library: text that every machine has (the demo uses it)."""

    kind: Literal["standard_library"] = "standard_library"
    part: Literal["train", "calibration", "evaluation"]
    """Disjoint sets of files."""
    content: Literal["sources", "docstrings"] = "sources"
    """Whole files, or the longer docstrings in them: prose."""


class TokensSource(Config):
    """Token ids prepared elsewhere: a safetensors file with one integer tensor `input_ids` [sequences, length]."""

    kind: Literal["tokens"] = "tokens"
    uri: Name
    """`file:`, `s3:` or a path relative to the manifest."""


class DatasetSource(Config):
    """A Hugging Face dataset, by hub name, local directory or file; its text column is joined by blank lines, a column of
    conversations (lists of messages with a role) goes through the model's chat template."""

    kind: Literal["dataset"] = "dataset"
    path: Name
    """Hub name, or a local directory or file (.jsonl, .json, .csv, .parquet, .txt): these begin with `/`, `./`,
    `../` or `file:`, relative to the manifest."""
    name: Name | None = None
    """Configuration of a data set that has several."""
    split: Name = "train"
    """Part of the data set."""
    column: Name = "text"
    """Column that holds the text, or the messages."""
    rows: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Read at most this many rows; absent: all."""


class ModelSamples(Config):
    """The model itself: each window begins with its token for a beginning (or any token, where it has none) and goes on as the
    model does. For models whose training text nobody has. The whole model has to fit into a worker's memory."""

    kind: Literal["model"] = "model"
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Divides the logits before a token is drawn; 1: as the model means it."""


TokenSource = Annotated[TextSource | StandardLibrarySource | TokensSource | DatasetSource, Field(discriminator="kind")]
"""What can be read where no model runs."""

CalibrationSource = Annotated[
    TextSource | StandardLibrarySource | TokensSource | DatasetSource | ModelSamples, Field(discriminator="kind")
]
