"""Latency of language models as they are served: a prompt (prefill), then tokens one by one with a cache (decode)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxfuse._torch.pytree import tree_leaves
from fxfuse.bench.timing import Samples, clock_of, interleave
from fxfuse.data.batches import cache_keyword, cache_of
from fxfuse.errors import FxfuseError
from fxfuse.model.force import uncompiled

Program: TypeAlias = Callable[..., object]
"""A model, compiled or not, called by keyword as Hugging Face models are."""

SAMPLE = 0.1
"""Seconds that one sample lasts, at least: on a shared machine shorter ones say little."""


@dataclass(frozen=True)
class Latency:
    """One phase, timed for several programs that took turns.

    Attributes:
        phase: prefill or decode.
        tokens: in the prompt, or in the cache.
        samples: seconds per call of each program.
    """

    phase: str
    tokens: int
    samples: Samples


def prefill(programs: Mapping[str, Program], ids: Tensor, repeats: int, progress: bool = False) -> Latency:
    """Time each program on the prompt ``ids`` ``[batch, tokens]``; ``progress`` shows on stderr how far it is."""

    def call(program: Program) -> Callable[[], object]:
        return lambda: program(input_ids=ids, use_cache=False)

    with torch.no_grad():
        calls = {name: call(program) for name, program in programs.items()}
        return _latency("prefill", calls, ids, repeats, progress)


def decode(
    programs: Mapping[str, Program], caches: Mapping[str, object], ids: Tensor, repeats: int, progress: bool = False
) -> Latency:
    """Time each program on one more token after ``ids`` ``[batch, tokens]``, which its cache holds.

    ``progress`` shows on stderr how far it is.

    Raises:
        FxfuseError: a cache cannot be cut back after each step.
    """
    with torch.no_grad():
        calls = {name: decode_step(program, caches[name], ids[:, -1:]) for name, program in programs.items()}
        return _latency("decode", calls, ids, repeats, progress)


def _latency(
    phase: str, calls: Mapping[str, Callable[[], object]], ids: Tensor, repeats: int, progress: bool
) -> Latency:
    samples = interleave(calls, repeats, SAMPLE, clock_of(ids.device), phase if progress else "")
    return Latency(phase, ids.shape[1], samples)


def decode_step(program: Program, cache: object, token: Tensor) -> Callable[[], object]:
    """A call of ``program`` on ``token`` ``[batch, 1]`` after what ``cache`` holds, which is so again afterwards.

    Raises:
        FxfuseError: the cache cannot be cut back.
    """
    crop = getattr(cache, "crop", None)
    if crop is None:
        raise FxfuseError(f"a {type(cache).__name__} cannot be cut back, so a decode step cannot be timed")

    keyword = cache_keyword(program)

    def step() -> object:
        output = program(input_ids=token, use_cache=True, **{keyword: cache})
        crop(-1)
        return output

    return step


def filled_cache(model: nn.Module, ids: Tensor) -> object:
    """The KV cache that ``model``, run uncompiled, leaves after ``ids`` ``[batch, tokens]``.

    Raises:
        FxfuseError: it leaves none.
    """
    with torch.no_grad(), uncompiled(model):
        cache = cache_of(model(input_ids=ids, use_cache=True))
    if cache is None:
        raise FxfuseError("the model returns no KV cache")
    return cache


def cache_bytes_per_token(model: nn.Module, ids: Tensor) -> float:
    """Bytes of keys and values that one token of one sequence costs."""
    layers = getattr(filled_cache(model, ids), "layers", ())
    held = [
        leaf for layer in layers for leaf in tree_leaves([getattr(layer, "keys", None), getattr(layer, "values", None)])
    ]
    return sum(leaf.numel() * leaf.element_size() for leaf in held if isinstance(leaf, Tensor)) / ids.numel()
