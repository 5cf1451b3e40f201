"""A served layer as one operator of torch.library, into which compiled graphs do not look; what it asks of vLLM meanwhile."""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context

from counterweight.pipeline.serving.served import PackedLinear

_LAYERS: WeakValueDictionary[int, ServedLayer] = WeakValueDictionary()
_NUMBERS = count()


class ServedLayer(nn.Module):
    """x [..., in], the input of this rank -> [..., out]: the outputs of `parts`, which vLLM has merged into one layer, side by
    side. gather: whether they need all ranks' channels of a token."""

    number: Tensor

    def __init__(self, parts: list[nn.Module], out_features: int, *, gather: bool) -> None:
        super().__init__()
        self.parts, self.out_features, self.gather = nn.ModuleList(parts), out_features, gather
        number = next(_NUMBERS)
        _LAYERS[number] = self
        # An input of the graph rather than a constant in it: graphs of equal layers are then equal, and compiled once.
        self.register_buffer("number", torch.tensor(number, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.counterweight.served_layer(x, self.number, self.out_features)
        return y

    def run(self, x: Tensor) -> Tensor:
        """What the operator does."""
        rows = x.reshape(-1, x.shape[-1])
        if self.gather:
            rows = tensor_model_parallel_all_gather(rows)
        decoded = decoded_tokens(len(rows)) if any(has_store(part) for part in self.parts) else None
        y = [part(rows, decoded) if isinstance(part, PackedLinear) else part(rows) for part in self.parts]
        return (y[0] if len(y) == 1 else torch.cat(y, dim=-1)).reshape(*x.shape[:-1], self.out_features)


@torch.library.custom_op("counterweight::served_layer", mutates_args=())
def served_layer(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    """number: int64, on the CPU: of a `ServedLayer`."""
    return _LAYERS[int(number)].run(x)


@served_layer.register_fake
def _(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def has_store(part: nn.Module) -> bool:
    """Whether a residual store corrects tokens of this linear."""
    return isinstance(part, PackedLinear) and part.residual is not None


def decoded_tokens(tokens: int) -> Tensor | None:
    """bool [tokens]: those of requests of which this step computes one token, as `load_model` tells decoding from prefill; None
    while vLLM measures memory or warms up. `tokens` may count padding, which is not decoded."""
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    batches = metadata if isinstance(metadata, list) else [metadata]
    if len(batches) > 1:
        raise ValueError(f"residual store: a batch in {len(batches)} parts: expected vLLM not to split them")
    starts: Tensor = next(iter(batches[0].values())).query_start_loc
    lengths = starts.diff()
    mask = torch.repeat_interleave(lengths == 1, lengths)
    return nn.functional.pad(mask, (0, tokens - len(mask)))
