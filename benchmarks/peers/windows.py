"""What every peer's script reads: a model's tokenizer and windows of a text, as its own libraries make them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast


def tokenizer_and_windows(
    model: str, text: str, sequences: int, length: int
) -> tuple[PreTrainedTokenizerFast, list[list[int]]]:
    """The tokenizer, and the first `sequences` windows of `length` ids of the text, which is tokenized as a whole."""
    # By its file: what tokenizer_config.json calls its class, older versions of transformers do not know.
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model)
    with open(text) as file:
        ids = tokenizer(file.read())["input_ids"]
    return tokenizer, [ids[start : start + length] for start in range(0, sequences * length, length)]
