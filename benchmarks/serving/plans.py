"""The plans of SmolLM2-135M that are served: what engines are tested and timed with."""

from __future__ import annotations

import fxfuse


def attn(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn" for layer in layers]


def mlp(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


_TEN = (4, 5, 6, 7, 14, 15, 21, 25, 27, 29)
_IN_SEVEN = ((3, 4, 5), (6, 7), (13, 14, 15), (20, 21), (24, 25), (26, 27), (28, 29))
_FIFTEEN = (*_TEN, 8, 9, 12, 18, 22)
_IN_TEN = (*_IN_SEVEN[:3], (8, 9), (11, 12), (17, 18), (20, 21, 22), *_IN_SEVEN[4:])
_PAIRS = tuple((layer, layer + 1) for layer in range(4, 26, 2))

PLANS = {
    "dropped": fxfuse.Plan(drop=attn(*_TEN)),
    "fused": fxfuse.Plan(drop=attn(*_TEN), parallel=[mlp(*chain) for chain in _IN_SEVEN]),
    "half": fxfuse.Plan(drop=attn(*_FIFTEEN), parallel=[mlp(*chain) for chain in _IN_TEN]),
    "linear": fxfuse.Plan(linear=attn(*_FIFTEEN)),
    "pairs": fxfuse.Plan(parallel=[each(*pair) for pair in _PAIRS for each in (attn, mlp)]),
    "blocks": fxfuse.Plan(parallel=[[[*attn(one), *mlp(one)] for one in pair] for pair in _PAIRS]),
}
"""Ten attentions out, those that cost least as linear maps; and 16 FFNs in seven wide ones; 15 out and 23 FFNs in ten;
these 15 linear; 11 layer pairs in parallel; the same as full blocks."""
