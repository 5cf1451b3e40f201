"""One block at a time of a transformers model: built without weights, filled from a checkpoint, run alone.

transformers' base model already knows masks, rotary embeddings and layer types, so a single block is run by *it*: a base
model with exactly that layer, no final norm, fed with hidden states instead of tokens. The embedding is its embedding
module, and the head is the causal model with no layer at all (final norm, lm_head, logit soft-capping). Nothing is
allocated before its weights arrive: modules are built on the meta device.

Experts that transformers fuses into 3-D parameters are unfused into one linear per projection and expert, because each
has its own input statistics, its own grid and its own low-rank branch.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.errors import CheckpointError, UnsupportedModelError
from counterweight.workers.models.config import parse_config
from counterweight.workers.models.config_values import said
from counterweight.workers.models.experts import GatedProduct, LinearExperts, SeparateExperts, SortedExperts
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import ModelFamily, SharedInputGroup
from counterweight.workers.models.layout import BlockLayout, ModelLayout
from counterweight.workers.models.wrapper import TextNames


class BlockBuilder:
    """Builds the parts of one model from its config.json; holds no weights.

    stored: names of the checkpoint's tensors, of which those outside the blocks count: what its parts are called, and whether
    there is a head where the config leaves that open. config: of a multimodal model, that of its text model.

    Raises UnsupportedModelError for an unknown family or an impossible configuration.
    """

    def __init__(self, config: Mapping[str, Any], stored: Container[str] = ()) -> None:
        self.family: ModelFamily = family_of(config.get("model_type"))
        self.names: TextNames = self.family.names_among(stored)
        self.config = parse_config(config, headless=self.names.head not in stored)
        self.model_type: str = self.family.known_as or str(config["model_type"])
        self.config._attn_implementation = "eager" if self.family.eager_attention else "sdpa"
        self.blocks: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        self.vocabulary: int = self.config.vocab_size
        self.tied: bool = bool(self.config.tie_word_embeddings)
        self.experts: int = 0
        self.active_experts: int = 0
        self._shells: dict[str, tuple[PreTrainedModel, type[nn.Module]]] = {}
        if self.family.experts is not None:
            self.experts = int(getattr(self.config, self.family.experts.count_key))
            self.active_experts = int(getattr(self.config, self.family.experts.active_key))
        shell = self._causal(_with_layers(self.config, []))  # what cannot be built is refused now, not by a worker
        self._check_rotary(shell.model.rotary_emb)

    def _check_rotary(self, rotary: nn.Module) -> None:
        """UnsupportedModelError for a rotary embedding that attention cannot apply to its heads."""
        width: int = getattr(self.config, "head_dim", None) or self.hidden_size // self.config.num_attention_heads
        for name, frequencies in rotary.named_buffers():
            turned = 2 * len(frequencies)
            if turned > width or (turned < width and not self.family.partial_rotary):
                raise UnsupportedModelError(
                    f"config.json: rope_parameters: {name} turns {turned} of the {width} channels of a head: "
                    f"expected {'at most ' if self.family.partial_rotary else ''}{width} for {self.config.model_type}"
                )

    # -- names and shapes ---------------------------------------------------------------------------------------

    def block_module(self, index: int) -> nn.Module:
        """Block `index` on the meta device, experts unfused; parameter names are relative to the block."""
        return self._unfused(self._layer(index))

    @cached_property
    def layout(self) -> ModelLayout:
        """Names and shapes of all that the model consists of."""
        predicting = self.family.prediction_layers
        kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}
        layouts: list[BlockLayout] = []
        kind_of: list[int] = []
        for index in range(self.blocks):
            layer = self._layer(index)
            # Unfusing hundreds of experts takes longer than all else here, and most blocks are alike.
            kind = tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items())
            if kind not in kinds:
                kinds[kind] = len(layouts)
                layouts.append(self._layout(self._unfused(layer)))
            kind_of.append(kinds[kind])
        return ModelLayout(
            model_type=self.model_type,
            names=self.names,
            hidden_size=self.hidden_size,
            heads=int(self.config.num_attention_heads),
            vocabulary=self.vocabulary,
            tied=self.tied,
            experts=self.experts,
            active_experts=self.active_experts,
            kinds=tuple(layouts),
            kind_of=tuple(kind_of),
            prediction_layers=0 if predicting is None else int(getattr(self.config, predicting) or 0),
        )

    def _layout(self, layer: nn.Module) -> BlockLayout:
        linears = frozenset(name for name, module in layer.named_modules() if isinstance(module, nn.Linear))
        return BlockLayout(
            parameters={name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()},
            linears=self.family.groups_among(linears, self.experts),
        )

    def _layer(self, index: int) -> nn.Module:
        with _building(f"block {index}"):
            _, layer_class = self._shell(index)
            layer: nn.Module = layer_class(self.config, index)
        return layer

    def _shell(self, index: int) -> tuple[PreTrainedModel, type[nn.Module]]:
        """What is around block `index`, a base model without layers, and the block's class: both depend on its type alone, and
        building them takes longer than the block."""
        types = getattr(self.config, "layer_types", None)
        kind = "" if types is None else str(types[index])
        if kind not in self._shells:
            base = _base_class(self.config)(_with_layers(self.config, [index]))
            layer_class = type(base.layers[0])
            base.layers, base.norm, base.embed_tokens = nn.ModuleList(), nn.Identity(), None
            self._shells[kind] = base.eval(), layer_class
        return self._shells[kind]

    def _unfused(self, layer: nn.Module) -> nn.Module:
        layout = self.family.experts
        if layout is None:
            return layer
        parent_name, _, leaf = layout.module.rpartition(".")
        parent = layer.get_submodule(parent_name)
        fused = getattr(parent, leaf, None)
        if fused is None:
            return layer
        experts, *matrix = fused.gate_up_proj.shape
        hidden, double = matrix if layout.transposed else reversed(matrix)
        product = GatedProduct(fused.act_fn) if layout.product is None else layout.product(fused)
        biased = layout.fused_biases_on_disk is not None
        separate = SortedExperts if layout.scaled_inputs else LinearExperts
        with torch.device("meta"):
            setattr(parent, leaf, separate(experts, hidden, double // 2, product, bias=biased))
        return layer

    # -- parts that run -----------------------------------------------------------------------------------------

    def embedding(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """tokens [batch, length] int64 -> hidden states [batch, length, hidden]."""
        with torch.device("meta"):
            module = _base_class(self.config)(_with_layers(self.config, [])).embed_tokens
        return _filled_embedding(module, weight.to(device, dtype))

    def block(
        self,
        index: int,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        absent: Container[str] = (),
    ) -> Block:
        """Block `index`, filled with `parameters` (names relative to the block, any float dtype).

        Buffers (a router's correction bias) keep the dtype in which transformers makes them, whatever `dtype` is.
        absent: linears whose weight is not given because another module will take their place. Any other parameter that
        is missing, and any that the block does not have, is a CheckpointError.
        """
        layer = self.block_module(index)
        buffers = {name: buffer.dtype for name, buffer in layer.named_buffers()}
        # A part of a fused tensor may be a strided view, which every product would copy anew.
        filled = {name: value.to(device, buffers.get(name, dtype)).contiguous() for name, value in parameters.items()}
        wrong = layer.load_state_dict(filled, assign=True, strict=False)
        missing = [name for name in wrong.missing_keys if name.removesuffix(".weight") not in absent]
        if missing or wrong.unexpected_keys:
            raise CheckpointError(f"block {index}: missing {missing}, unexpected {wrong.unexpected_keys}")
        return Block(self._around(layer, index, device), self.layout.block_linears(index))

    def head(self, parameters: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """hidden states [batch, length, hidden] -> logits [batch, length, vocabulary], in `dtype`; gradients are of the former.

        parameters: the final norm and the lm_head (of a tied model: the embedding), by their names in `names`.
        """
        model = self._causal(_with_layers(self.config, []))
        self._fill_head(model, parameters, device, dtype)
        model.model.rotary_emb = _rotary(model.model, self.config, device)
        return _Head(model).eval().requires_grad_(False)

    def causal_shell(
        self, embedding: Tensor, head: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> PreTrainedModel:
        """The whole causal model without its blocks, for a caller that appends them to `model.layers` in order."""
        # Built whole, on the meta device: some families settle by their layers which masks they make (Qwen2's windows).
        model = self._causal(_with_layers(self.config, list(range(self.blocks))))
        model.model.layers = nn.ModuleList()
        _filled_embedding(model.model.embed_tokens, embedding.to(device, dtype))
        self._fill_head(model, head, device, dtype)
        if self.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.model.rotary_emb = _rotary(model.model, self.config, device)
        return model

    def _fill_head(
        self, model: PreTrainedModel, parameters: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        for module, name in ((model.model.norm, self.names.norm), (model.lm_head, self.names.head)):
            module.load_state_dict({"weight": parameters[name].to(device, dtype)}, assign=True)

    def _causal(self, config: PreTrainedConfig) -> PreTrainedModel:
        with _building("the model around the blocks"):
            model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)](config)
        return model

    def _around(self, layer: nn.Module, index: int, device: torch.device) -> PreTrainedModel:
        base: PreTrainedModel = copy.deepcopy(self._shell(index)[0])
        base.layers.append(layer.eval())
        base.rotary_emb = _rotary(base, self.config, device)
        return base


class Block:
    """A filled block: `run` hidden states through it, look up its linears, copy it for another thread.

    transforms: linear -> what is done to its input.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        groups: tuple[SharedInputGroup, ...],
        transforms: Mapping[str, Hadamard] | None = None,
    ) -> None:
        self._base = base
        self.groups = groups
        self.transforms = dict(transforms or {})

    @property
    def layer(self) -> nn.Module:
        """The decoder layer itself; module names are relative to it."""
        layer: nn.Module = self._base.layers[0]
        return layer

    def linear(self, name: str) -> nn.Linear:
        """A linear by its name in the tables."""
        module = self.layer.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is a {type(module).__name__}, expected a linear layer")
        return module

    def experts(self) -> list[tuple[str, LinearExperts]]:
        """The modules of separate experts that are given the routing, by name; at most one."""
        return [(name, module) for name, module in self.layer.named_modules() if isinstance(module, LinearExperts)]

    def separate_experts(self) -> tuple[str, SeparateExperts] | None:
        """The module of a sparse MLP's experts with its name, however they are given their tokens; None in a dense block."""
        named = self.layer.named_modules()
        return next(((name, module) for name, module in named if isinstance(module, SeparateExperts)), None)

    def routed(self) -> nn.Module | None:
        """What a router sends its tokens to, experts on kernels too; None in a dense block."""
        family = family_of(self.model_type)
        named = dict(self.layer.named_modules())
        return None if family.experts is None else named.get(family.experts.module)

    @property
    def experts_in_config(self) -> int:
        """Experts of a sparse block; 0 in a model without."""
        family = family_of(self.model_type)
        return 0 if family.experts is None else int(getattr(self._base.config, family.experts.count_key))

    @property
    def experts_of_token(self) -> int:
        """Experts that a token is given to; 0 in a model without."""
        family = family_of(self.model_type)
        return 0 if family.experts is None else int(getattr(self._base.config, family.experts.active_key))

    @contextmanager
    def asking(self, linears: Iterable[str]) -> Iterator[None]:
        """While it is open, experts with none of these linears are not run: what enters the others stays the same, the block's
        output does not."""
        names = [name.rsplit(".", 2)[:2] for name in linears]
        sparse = self.separate_experts()
        if sparse is None:
            yield
            return
        place, module = sparse
        module.asked = frozenset(int(expert) for parent, expert in names if parent == place)
        try:
            yield
        finally:
            module.asked = None

    def transform_input(self, name: str, transform: Hadamard) -> None:
        """Transforms what enters the linear `name`, for everyone who looks at its input later."""
        self.transforms[name] = transform
        self.linear(name).register_forward_pre_hook(lambda _, arguments: (transform.apply(arguments[0]),))

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts `module` where the linear `name` was; it transforms its own input where `transforms` says so."""
        self.layer.set_submodule(name, module)

    def replica(self) -> Block:
        """A copy that shares every tensor but has its own modules, so that another thread can hook and run it."""
        shared = [*self._base.parameters(), *self._base.buffers()]
        return Block(copy.deepcopy(self._base, {id(tensor): tensor for tensor in shared}), self.groups, self.transforms)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        frequencies: Tensor = next(self._base.rotary_emb.buffers())
        return frequencies.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return next(self.layer.parameters()).dtype  # of attention: experts may be lent in the dtype they are stored in

    @property
    def model_type(self) -> str:
        """The family's `model_type`."""
        return str(self._base.config.model_type)

    @property
    def heads(self) -> int:
        """Attention's heads, of queries."""
        return int(self._base.config.num_attention_heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """As `run`, with gradients."""
        output: Tensor = self._base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return output

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Tensor:
        """hidden [batch, length, hidden] -> the block's output, same shape and dtype; causal, positions from 0."""
        return self.forward(hidden)


class _Head(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits


@contextmanager
def _building(what: str) -> Iterator[None]:
    """The meta device; what transformers makes of an impossible config becomes an UnsupportedModelError."""
    try:
        with torch.device("meta"):
            yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UnsupportedModelError(f"config.json: transformers cannot build {what}: {said(error)}") from error


def _base_class(config: PreTrainedConfig) -> Any:
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def _with_layers(config: PreTrainedConfig, indices: list[int]) -> PreTrainedConfig:
    """The config of a model that has only these layers of the whole."""
    part = copy.deepcopy(config)
    part._attn_implementation = config._attn_implementation
    types = getattr(config, "layer_types", None)
    part.num_hidden_layers = len(indices)
    if types is not None:
        part.layer_types = [types[index] for index in indices]
    return part


def _filled_embedding(module: nn.Module, weight: Tensor) -> nn.Module:
    """Puts the weight in; a scaled embedding (Gemma) also keeps its scale in a buffer, which meta lost."""
    module.load_state_dict({"weight": weight}, assign=True, strict=False)
    if isinstance(getattr(module, "embed_scale", None), Tensor):
        module.embed_scale = torch.tensor(module.scalar_embed_scale, device=weight.device)
    return module.eval()


def _rotary(base: Any, config: PreTrainedConfig, device: torch.device) -> nn.Module:
    """The family's rotary embedding with real buffers (those built on the meta device hold no values)."""
    with torch.device(device):
        module: nn.Module = type(base.rotary_emb)(config)
    return module
