"""Peers of healing in closed form, written plainly for Llama-shaped models of transformers: baselines, not library.

- NBL (arXiv 2505.21077): attentions become linear maps, each the best one on the original's own stream.
- ReplaceMe (arXiv 2505.02819): consecutive blocks are left out; a linear map of the last FFN before them stands for
  them, in its down projection, by least squares.
- LinearPatch (arXiv 2505.24680), its rescaling alone: consecutive blocks are left out; before the next one every
  channel of the stream gets back the mean size that it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[Mapping[str, object]]

STRENGTH = 1e-6
"""Of the ridge, relative to the mean of the Gram matrix' diagonal: for the rounding errors alone."""


class Scale(nn.Module):
    """A block whose output has its channels rescaled."""

    def __init__(self, block: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(*args, **kwargs) * self.scale


class Linear(nn.Module):
    """In an attention's place."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return nn.functional.linear(hidden_states, self.weight, self.bias), None


@torch.no_grad()
def linear_maps(model: Any, layers: Sequence[int], batches: Batches) -> dict[int, Linear]:
    """The best linear map, with a bias, in place of the attention of each of ``layers`` alone."""
    fits = {layer: Fit() for layer in layers}

    def look(layer: int) -> Callable[..., None]:
        return lambda _, args, kwargs, out: fits[layer].add(kwargs.get("hidden_states", *args[:1]), out[0])

    with ExitStack() as stack:
        for layer in layers:
            hook = model.model.layers[layer].self_attn.register_forward_hook(look(layer), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            model.model(**batch)
    return {layer: Linear(*fit.solve()) for layer, fit in fits.items()}


def nbl(model: Any, layers: Sequence[int], batches: Batches) -> nn.Module:
    """Linear maps in place of the attentions of ``layers``."""
    student = copy.deepcopy(model)
    for layer, made in linear_maps(model, layers, batches).items():
        student.model.layers[layer].self_attn = made
    return student


@torch.no_grad()
def skip(model: Any, count: int, batches: Batches, patch: str) -> nn.Module:
    """The ``count`` consecutive blocks left out that turn the stream least, patched by "replaceme" or "linearpatch"."""
    last = len(model.model.layers) - count
    turned = torch.zeros(last)  # by the blocks from n + 1 on
    for batch in batches[:4]:
        streams = model.model(**batch, output_hidden_states=True).hidden_states
        for n in range(last - 1):  # the last of all streams has been through the final norm
            turned[n] -= nn.functional.cosine_similarity(streams[n + 1], streams[n + 1 + count], dim=-1).mean()
    start = int(turned[: last - 1].argmin())
    fit, sizes = Fit(), torch.zeros(2, model.config.hidden_size, dtype=torch.float64)
    added: list[Tensor] = []
    with ExitStack() as stack:
        hook = model.model.layers[start].mlp.register_forward_hook(lambda _, args, out: added.append(out))
        stack.callback(hook.remove)
        for batch in batches:
            streams = model.model(**batch, output_hidden_states=True).hidden_states
            before, after = streams[start + 1], streams[start + 1 + count]
            fit.add(added[-1], after - (before - added.pop()))
            sizes += torch.stack([each.abs().flatten(0, 1).double().sum(0) for each in (before, after)])
    student = copy.deepcopy(model)
    blocks = student.model.layers
    if patch == "replaceme":
        down = blocks[start].mlp.down_proj
        weight, _ = fit.solve(bias=False)
        down.weight.copy_(weight @ down.weight)
    else:
        blocks[start] = Scale(blocks[start], (sizes[1] / sizes[0]).float())
    student.model.layers = nn.ModuleList([*blocks[: start + 1], *blocks[start + 1 + count :]])
    return student


class Fit:
    """The best linear map of some vectors to others, from sums over tokens in float64."""

    def __init__(self) -> None:
        self._gram = self._cross = torch.zeros((), dtype=torch.float64)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Add tokens ``[..., d]``."""
        x, y = (each.flatten(0, -2).double() for each in (given, wanted))
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self._gram, self._cross = self._gram + x.T @ x, self._cross + y.T @ x

    def solve(self, bias: bool = True) -> tuple[Tensor, Tensor]:
        """Its weight ``[d, d]`` and its bias ``[d]``, which is zero if there is to be none."""
        columns = len(self._gram) - (not bias)
        gram, cross = self._gram[:columns, :columns].clone(), self._cross[:, :columns]
        gram.diagonal().add_(STRENGTH * gram.diagonal().mean())
        made = torch.linalg.solve(gram, cross.T).T.float()
        return made[:, : len(self._gram) - 1], made[:, -1] if bias else torch.zeros(len(made))
