"""The plans of SmolLM2-135M that are served: what engines are tested and timed with."""

from __future__ import annotations

import fxfuse


def attn(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn" for layer in layers]


def mlp(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


_DROPPED = (5, 6, 7, 11, 12, 15, 16, 20, 21, 25)
_CHAINS = ((4, 5, 6, 7), (10, 11, 12), (14, 15, 16), (19, 20, 21), (24, 25))
_PAIRS = tuple((layer, layer + 1) for layer in range(4, 26, 2))

PLANS = {
    "dropped": fxfuse.Plan(drop=attn(*_DROPPED)),
    "fused": fxfuse.Plan(drop=attn(*_DROPPED), parallel=[mlp(*chain) for chain in _CHAINS]),
    "pairs": fxfuse.Plan(parallel=[each(*pair) for pair in _PAIRS for each in (attn, mlp)]),
    "blocks": fxfuse.Plan(parallel=[[[*attn(one), *mlp(one)] for one in pair] for pair in _PAIRS]),
}
"""Ten attentions out; and 15 FFNs in five wide ones; 11 layer pairs in parallel; the same as full blocks."""
