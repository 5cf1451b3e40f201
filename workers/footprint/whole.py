"""Memory of a model that is run as a whole, for samples and for tasks of the lm-evaluation-harness. Torch-free."""

from __future__ import annotations

from counterweight.workers.matrix_bytes import SINGLE

BATCH = 8
"""Requests of the harness that run together; logits differ in their last bits with it."""

LOGITS = 2
"""Copies of a batch's logits in float32: themselves, and their log-probabilities."""


def whole_bytes(parameters: int, itemsize: int, *, tokens: int, state: int, scored: int) -> int:
    """At the peak. parameters: of `itemsize` bytes. tokens: of a batch, whose keys and values stay; state: numbers of keys and
    values of a token. scored: logits that are held at once."""
    return parameters * itemsize + tokens * state * itemsize + LOGITS * SINGLE * scored
