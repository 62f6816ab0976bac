"""A Hugging Face model as a function of plain tensors: tokens, a mask, and the keys and values of all tokens so far.

What ``generate`` keeps in objects of its own, a program without transformers keeps in tensors ``[total, batch, heads,
width]``. Time comes first, so the first ``total`` rows of a longer buffer are contiguous: a caller allocates once,
passes a longer view with each token, and nothing is copied. The function writes the rows of the new tokens in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from fxfuse.errors import ExportError


@dataclass(frozen=True)
class CacheSpec:
    """The keys and values that one layer keeps.

    Attributes:
        layer: its index among all layers.
        heads: of keys and of values.
        key: features of a key.
        value: features of a value.
    """

    layer: int
    heads: int
    key: int
    value: int

    def tensors(self, total: int, batch: int, like: Tensor) -> list[Tensor]:
        """Keys and values of zeros, ``[total, batch, heads, width]`` both."""
        return [like.new_zeros(total, batch, self.heads, width) for width in (self.key, self.value)]


def cache_specs(model: nn.Module) -> tuple[CacheSpec, ...]:
    """The layers that keep keys and values, seen in one call.

    Raises:
        ExportError: the model keeps something else, or nothing.
    """
    cache, device = DynamicCache(), next(model.parameters()).device
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            model(input_ids=ids, use_cache=True, **{_cache_argument(model): cache})
    except Exception as error:
        raise ExportError(
            "pt2 keeps keys and values of attentions alone, and a call of this model with a cache of those fails: "
            f"{type(error).__name__}: {error}"
        ) from error
    specs = []
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise ExportError(f"layer {index} keeps a {type(layer).__name__}, and pt2 keeps keys and values alone")
        if layer.is_initialized:
            (batch, heads, length, key), value = layer.keys.shape, layer.values.shape
            if (batch, length) != (1, 2) or value[:3] != (batch, heads, length):
                raise ExportError(
                    f"layer {index} keeps keys {list(layer.keys.shape)} and values {list(value)} of two "
                    "tokens, and pt2 keeps [batch, heads, tokens, width]"
                )
            specs.append(CacheSpec(index, heads, key, value[3]))
    if not specs:
        raise ExportError("pt2 is for models that keep keys and values of attentions, and this one keeps none")
    if specs[0].layer:
        raise ExportError("the first layer of this model keeps no keys, which is where its length is read")
    return tuple(specs)


def _cache_argument(model: nn.Module) -> str:
    """The name of the argument that takes the cache: transformers 5.24 gave it a new one."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class CachedCall(nn.Module):
    """One call of the model with a cache: prefill, or decode."""

    def __init__(self, model: nn.Module, specs: Sequence[CacheSpec]) -> None:
        super().__init__()
        self.model = model
        self._specs = tuple(specs)
        takes = signature(model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = "position_ids" in takes
        self._cache = _cache_argument(model)

    def forward(self, ids: Tensor, mask: Tensor, caches: list[Tensor]) -> tuple[Tensor]:
        """The logits of the token that comes next.

        Args:
            ids: the new tokens, ``[batch, length]`` int64.
            mask: ``[batch, total]`` bool, false where a row is padded on the left; new tokens are the last.
            caches: keys and values of each of the layers, ``[total, batch, heads, width]``, the last ``length`` rows of
                which are written.

        Returns:
            ``[batch, vocabulary]``.
        """
        length = ids.shape[1]
        layers: list[CacheLayerMixin] = [_Rows(caches[0], caches[1], length) for _ in range(self._specs[-1].layer + 1)]
        for place, spec in enumerate(self._specs):
            layers[spec.layer] = _Rows(caches[2 * place], caches[2 * place + 1], length)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        given = {"position_ids": positions} if self._positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self._cache: Cache(layers=layers)},
            **given,
            **self._extra,
        )
        return (output.logits[:, -1],)

    def example(self, length: int, total: int, batch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Arguments of :meth:`forward`."""
        like = next(self.model.parameters())
        ids = torch.zeros(batch, length, dtype=torch.long, device=like.device)
        mask = torch.ones(batch, total, dtype=torch.bool, device=like.device)
        return ids, mask, [tensor for spec in self._specs for tensor in spec.tensors(total, batch, like.detach())]


class _Rows(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """A layer of a cache whose tensors are the caller's, long enough for the new tokens."""

    is_sliding = False  # windows are in the mask alone: all keys are kept

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._past = keys.shape[0] - length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the tensors are given")

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, ``[batch, heads, length, width]``; returns all."""
        keys, values = self.keys, self.values
        keys[self._past :] = key_states.permute(2, 0, 1, 3)
        values[self._past :] = value_states.permute(2, 0, 1, 3)
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[0], 0

    def get_seq_length(self) -> int:
        return self._past

    def get_max_length(self) -> int:
        return -1
