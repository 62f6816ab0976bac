"""The planned model as blocks of a Llama: what the formats of Llama-shaped models are written from.

A Llama-shaped model is a stream of RMS norms, rotary attentions and gated FFNs. Weights are expressions
(:mod:`fxfuse.exporting.weights`) that are computed when they are written. :mod:`fxfuse.exporting.llama` makes a layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.exporting.weights import Weight


@dataclass(frozen=True)
class Attention:
    """An attention with its norm. The scores' scale is ``head_dim ** -0.5``; another was folded into the queries.

    Attributes:
        name: the branch.
        norm: the gain of its RMS norm, ``[d]``.
        q, k, v, o: weights ``[out, in]``.
        q_bias, k_bias, v_bias, o_bias: biases, or None.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: features of a head.
    """

    name: str
    norm: Weight
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: Weight | None
    k_bias: Weight | None
    v_bias: Weight | None
    o_bias: Weight | None
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LinearAttention:
    """One linear map in the place of an attention: ``o norm(x) + o_bias``.

    Attributes:
        name: the branch.
        norm: the gain of its RMS norm, ``[d]``.
        o: ``[d, d]``.
        o_bias: ``[d]``, or None.
    """

    name: str
    norm: Weight
    o: Weight
    o_bias: Weight | None


@dataclass(frozen=True)
class GatedFFN:
    """FFNs that read one point, as one: ``down(activation(gate norm(x)) * (up norm(x)))``.

    Attributes:
        names: the branches that it is made of.
        activation: silu, gelu, ...
        norm: the gain of its RMS norm, ``[d]``; ones where gains are folded into gate and up.
        gate, up: ``[width, d]``.
        down: ``[d, width]``.
        gate_bias, up_bias, down_bias: biases, or None.
    """

    names: tuple[str, ...]
    activation: str
    norm: Weight
    gate: Weight
    up: Weight
    down: Weight
    gate_bias: Weight | None
    up_bias: Weight | None
    down_bias: Weight | None

    @property
    def width(self) -> int:
        """Hidden units."""
        return self.gate.shape[0]


@dataclass(frozen=True)
class Block:
    """A decoder layer: an attention, then an FFN. One of them may be None, never both."""

    attention: Attention | LinearAttention | None
    ffn: GatedFFN | None


@dataclass(frozen=True)
class Layout:
    """A planned Llama-shaped model.

    Attributes:
        blocks: in order.
        embedding: ``[vocabulary, d]``.
        norm: the gain of the last RMS norm, ``[d]``.
        head: ``[vocabulary, d]``; None if it is the embedding.
        eps: of all RMS norms.
    """

    blocks: tuple[Block, ...]
    embedding: Weight
    norm: Weight
    head: Weight | None
    eps: float

    @property
    def width(self) -> int:
        """Features of the stream, d."""
        return self.norm.shape[0]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Those that compute scores, and so have a KV cache."""
        return tuple(block.attention for block in self.blocks if isinstance(block.attention, Attention))
