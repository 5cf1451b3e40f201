"""Whether tokens come one at a time, as they do while a text is generated (decoding), or a text comes whole (prefill): what a
residual store that corrects decoded tokens alone has to know."""

from __future__ import annotations

from contextvars import ContextVar

from torch import Tensor, nn

_LENGTH: ContextVar[int | None] = ContextVar("tokens of a sequence in the decoder layer that is running", default=None)


def tell_length(layer: nn.Module) -> None:
    """Makes a decoder layer, called with hidden states [batch, length, hidden], tell `length` to the linears inside it.

    Experts cannot see it in their own input, which is a list of tokens [tokens, hidden] of all sequences.
    """
    layer.register_forward_pre_hook(_enter)
    layer.register_forward_hook(_leave, always_call=True)


def is_decoding(x: Tensor) -> bool:
    """Whether x [..., length, in] holds one token of each sequence; the length is the layer's where one tells it."""
    length = _LENGTH.get()
    return (x.shape[-2] if length is None else length) == 1


def _enter(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    _LENGTH.set(arguments[0].shape[-2])


def _leave(layer: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
    _LENGTH.set(None)
