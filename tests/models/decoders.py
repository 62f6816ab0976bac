"""Streams and decoders with the habits that make rewriting hard: shared keys, caches, taps, writes in place."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor, nn

from tests.models.blocks import WIDTH, Decoder, Stream, SwiGLU, Traced, ready, trace, vectors


class Deep(Decoder):
    """Three layers."""

    depth = 3


@cache
def decoder() -> Decoder:
    """One of two layers, its weights drawn."""
    model = ready(Decoder())
    assert isinstance(model, Decoder)
    return model


@cache
def traced_decoder(road: str) -> Traced:
    """Its graph; take a copy to rewrite it."""
    return trace(decoder(), vectors(), road=road)


@cache
def deep() -> Deep:
    """One of three layers, its weights drawn."""
    model = ready(Deep())
    assert isinstance(model, Deep)
    return model


@cache
def traced_deep(road: str) -> Traced:
    """Its graph; take a copy to rewrite it."""
    return trace(deep(), vectors(), road=road)


class Tied(Decoder):
    """The FFN of layer 0 is that of layer 2; so the names of both are numbers in stream order."""

    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].mlp = self.layers[0].mlp


class Parallel(Decoder):
    """Attention and FFN side by side behind one norm, the second time under a multiplier."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for index, layer in enumerate(self.layers):
            y = layer.attn_norm(h)
            a, f = layer.attn(y), layer.mlp(y)
            h = a + f + h if index == 0 else h + 0.5 * (a + f)
        return h


class Tapped(Decoder):
    """Returns hidden states, some of them pooled."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = x * 1.5
        taps = [h]
        for layer in self.layers:
            h = h + layer.attn(layer.attn_norm(h))
            taps.append(h)
            h = h + layer.mlp(layer.mlp_norm(h))
            taps.append(h.mean(1))
        return (h, *taps)


class KeyOutputs(Decoder):
    """Returns the keys and values of every layer, as a model with a dynamic cache does."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h, returned = x * 1.5, []
        for layer in self.layers:
            y = layer.attn_norm(h)
            key, value = layer.attn.key_value(y)
            returned += [key, value]
            h = h + layer.attn.attend(y, key, value)
            h = h + layer.mlp(layer.mlp_norm(h))
        return (h, *returned)


class CrossLayer(Decoder):
    """Layer 1 uses the keys and values of layer 0; layer 2 mixes its own values with those of layer 0."""

    depth = 3

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        key, value = self.layers[0].attn.key_value(self.layers[0].attn_norm(h))
        for index, layer in enumerate(self.layers):
            y = layer.attn_norm(h)
            k, v = (key, value) if index < 2 else layer.attn.key_value(y)
            h = h + layer.attn.attend(y, k, v if index < 2 else 0.5 * v + 0.5 * value)
            h = h + layer.mlp(layer.mlp_norm(h))
        return h


class LateKeys(Decoder):
    """Layer 2 uses the keys and values of layer 1."""

    depth = 3

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x * 1.5)
        y = self.layers[1].attn_norm(h)
        key, value = self.layers[1].attn.key_value(y)
        h = h + self.layers[1].attn.attend(y, key, value)
        h = h + self.mlp(1, h)
        h = h + self.layers[2].attn.attend(self.layers[2].attn_norm(h), key, value)
        return h + self.mlp(2, h)


class Tokens(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(7, WIDTH), nn.Embedding(7, WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        return self.token(ids) + self.position(torch.arange(ids.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return h


class Cached(Decoder):
    """Writes keys and values to buffers at a position, and attends to the buffers by their own names."""

    depth = 3

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attn.register_buffer("keys", torch.zeros(2, 2, 4, WIDTH // 2))
            layer.attn.register_buffer("values", torch.zeros(2, 2, 4, WIDTH // 2))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            y, attn = layer.attn_norm(h), layer.attn
            key, value = attn.key_value(y)
            attn.keys.index_copy_(2, position, key)
            attn.values.index_copy_(2, position, value)
            h = h + attn.attend(y, attn.keys, attn.values, causal=False)
            h = h + layer.mlp(layer.mlp_norm(h))
        return h

    def padded(self, index: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The contribution of an attention on an empty cache of four places, and the keys and values it writes."""
        layer = self.layers[index]
        y = layer.attn_norm(h)
        key, value = (nn.functional.pad(t, (0, 0, 0, 4 - t.shape[2])) for t in layer.attn.key_value(y))
        return layer.attn.attend(y, key, value, causal=False), key, value

    def by_hand(self, x: Tensor, drop: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The output without some attentions, and the keys that every layer writes."""
        h, keys = x * 1.5, []
        for index in range(self.depth):
            f, key, _ = self.padded(index, h)
            keys.append(key[:, :, : x.shape[1]])
            h = h if index in drop else h + f
            h = h + self.mlp(index, h)
        return h, keys


class SharedCache(Decoder):
    """All layers write their keys to one buffer, each after the one before has read it."""

    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 2, 3, WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            y = layer.attn_norm(h)
            key, value = layer.attn.key_value(y)
            self.keys.copy_(key)
            h = h + layer.attn.attend(y, self.keys, value)
        return h


class Side(Stream):
    """Branches side by side: all read one point, and their sum is added there."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.start(x))

    def sum(self, h: Tensor) -> Tensor:
        out = h
        for layer in self.layers:
            out = layer.add(out, layer.branch(h))
        return out


class InPlace(Stream):
    """Three FFNs, added in place."""

    def __init__(self, form: str) -> None:
        super().__init__(SwiGLU(), SwiGLU(), SwiGLU())
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            f = layer.branch(h)
            if self.form == "h += f":
                h += f
            elif self.form == "h -= f":
                h -= f
            elif self.form == "h.add_(f)":
                h = h.add_(f)
            else:
                h.add_(f)
        return h


class IndexedExperts(nn.Module):
    """A routed sum that is built in place, as Mixtral builds its."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, WIDTH)
        weight, chosen = torch.topk(torch.softmax(self.router(rows), -1), 2, -1)
        weights = torch.zeros_like(self.router(rows)).scatter(-1, chosen, weight)
        out, every = torch.zeros_like(rows), torch.arange(rows.shape[0])
        for index, expert in enumerate(self.experts):
            out.index_add_(0, every, expert(rows) * weights[:, index : index + 1])
        return out.view(x.shape)
