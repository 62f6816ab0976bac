"""A model under a plan, computed by the model's own modules and hooks on its layers. Never imports fxfuse.

What a layer adds to the stream is ``layer(h) - h``, whatever stands in it. Where its attention is silenced, that is
what its FFN adds, norms, scales and gates included. So layers whose FFNs stand in parallel are computed by giving each
of them the stream that the first one reads, and adding up what they add.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.anatomy import Block


@contextmanager
def in_parallel(blocks: Sequence[Block]) -> Iterator[None]:
    """The model computes, until the end of the block, what it would if ``blocks``, which follow each other, did this:
    their attention and other mixers of tokens add nothing, and their FFNs all read what the first one reads.

    Raises:
        ValueError: a layer does not take and return the stream.
    """
    run = _Run()
    handles = []
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(run.enter, with_kwargs=True))
        handles.append(block.module.register_forward_hook(run.leave))
    try:
        with silenced(blocks):
            yield
    finally:
        for handle in handles:
            handle.remove()


def multiplies_its_stream(model: Any, inputs: Mapping[str, Tensor], blocks: Sequence[Block]) -> bool:
    """Whether a layer, all parts of which add nothing, hands on each channel of the stream times another number than 1.

    What such a layer adds is not ``layer(h) - h``.
    """
    multiplied: list[bool] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        made = out[0] if isinstance(out, tuple) else out
        if isinstance(given, Tensor) and isinstance(made, Tensor) and made.shape == given.shape:
            before, after = ((each - each.mean(0)) for each in (given.flatten(0, -2), made.flatten(0, -2)))
            factor = (before * after).sum(0) / before.square().sum(0)
            straight = (after - factor * before).abs().max() < 1e-9 * given.abs().max()  # else a part is not silent
            multiplied.append(bool(straight and (factor - 1).abs().max() > 1e-6))

    handles = [block.module.register_forward_hook(compare, with_kwargs=True) for block in blocks]
    try:
        with silenced(blocks, ("attention", "mixer", "ffn", "moe", "shared")):
            outputs(model, inputs)
    except ValueError:
        return False  # a part is more than a branch, which the comparison itself will say
    finally:
        for handle in handles:
            handle.remove()
    return any(multiplied)


@contextmanager
def silenced(blocks: Sequence[Block], parts: Sequence[str] = ("attention", "mixer")) -> Iterator[None]:
    """The attention and other mixers of tokens of ``blocks``, or other ``parts``, add nothing until the block ends."""
    sites = [site for block in blocks for site in block.sites if site.part in parts]
    handles = [site.last.register_forward_hook(_nothing) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    """Zeros for what a part returns, or returns first; a state or attention weights beside it stay.

    Raises:
        ValueError: the part is more than a branch: it adds to the stream itself, and normalises that.
    """
    if not isinstance(out, tuple):
        return torch.zeros_like(out)
    if any(type(inner).__name__.endswith("Norm") for inner in module.children()):
        raise ValueError(f"{type(module).__name__} is more than a branch")
    return (torch.zeros_like(out[0]), *out[1:])


@contextmanager
def narrowed(last: nn.Module, keep: Sequence[bool]) -> Iterator[None]:
    """Of the features that ``last``, the down projection of an FFN, reads, all are zero but those of ``keep``."""
    mask = torch.tensor(keep)
    handle = last.register_forward_pre_hook(lambda module, args: (args[0] * mask, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def made_linear(attention: nn.Module, last: nn.Module) -> Iterator[None]:
    """``last``, the output projection of ``attention``, reads what the queries and keys are made of: its norm's output.

    Raises:
        ValueError: it reads another number of features.
    """
    read: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if not isinstance(given, Tensor):
            raise ValueError(f"{type(module).__name__} does not take the stream first")
        read[:] = [given]

    def normalise(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if read and args and args[0] is read[0]:
            read[:] = [out]

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].shape[-1] != read[0].shape[-1]:
            raise ValueError(f"its output projection reads {args[0].shape[-1]} features of {read[0].shape[-1]}")
        return (read[0].reshape(args[0].shape), *args[1:])

    norms = [inner for inner in attention.children() if type(inner).__name__.endswith("Norm")]
    handles = [attention.register_forward_pre_hook(begin, with_kwargs=True), last.register_forward_pre_hook(replace)]
    handles += [norm.register_forward_hook(normalise) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def width_read(model: Any, inputs: Mapping[str, Tensor], last: nn.Module) -> int:
    """How many features ``last`` reads when the model is called."""
    seen: list[int] = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    try:
        outputs(model, inputs)
    finally:
        handle.remove()
    return seen[-1]


class _Run:
    """The layers of one group, as they are called one after the other."""

    def __init__(self) -> None:
        self._start: Tensor | None = None  # the stream that all of them read
        self._sum: Tensor | None = None  # it, and what they have added so far

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        key = "hidden_states"
        given = args[0] if args else kwargs.get(key)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise ValueError(f"{type(module).__name__} does not take the stream first")
        if self._start is None:
            self._start = self._sum = given
        elif given is not self._sum:
            raise ValueError(f"{type(module).__name__} does not follow the layer before it")
        return ((self._start, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, key: self._start})

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        made = out[0] if isinstance(out, tuple) else out
        if self._start is None or self._sum is None or not isinstance(made, Tensor) or made.shape != self._start.shape:
            raise ValueError(f"{type(module).__name__} does not return the stream first")
        self._sum = made - self._start + self._sum
        return (self._sum, *out[1:]) if isinstance(out, tuple) else self._sum


def outputs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first tensor that a model returns: its logits, or its last hidden state."""
    with torch.no_grad():
        made = model(**inputs)
    if isinstance(made, Tensor):
        return made
    return next(value for value in (made.values() if isinstance(made, Mapping) else made) if isinstance(value, Tensor))
