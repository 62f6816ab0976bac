"""Links leave a stream what it is, factors make a multiple of it; all else ends it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxfuse.stream.steps import before, link, way

H, GAIN = torch.randn(2, 3, 4), torch.rand(4) + 1

LINKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a cast": lambda h, gain: h.bfloat16(),
    "tokens in one dimension": lambda h, gain: h.flatten(0, 1),
    "the sizes at hand": lambda h, gain: h.squeeze(0),
    "a copy": lambda h, gain: h.clone(),
}
FACTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda h, gain: h * 0.5,
    "a gain": lambda h, gain: gain * h,
    "a quotient": lambda h, gain: h / gain,
    "a shift": lambda h, gain: gain - h,
}
ENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a rounded quotient": lambda h, gain: torch.div(h, gain, rounding_mode="floor"),
    "a reciprocal": lambda h, gain: gain / h,
    "a split of the features": lambda h, gain: h.view(2, 3, 2, 2),
    "more than one value of each": lambda h, gain: h * gain.view(4, 1, 1, 1),
}


def made(step: Callable[[Tensor, Tensor], Tensor], sizes: bool = True) -> tuple[fx.Node, fx.Node, fx.Node]:
    """``h``, the gain and the node of the last op of the step."""
    gm = fx.symbolic_trace(step)
    h, gain, *rest = (node for node in gm.graph.nodes if node.op != "output")
    held: dict[fx.Node, Tensor] = {h: H, gain: GAIN}
    for node in rest:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
        owner = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        held[node] = owner(*args, **kwargs)
    for node, found in held.items() if sizes else ():
        node.meta["example_value"] = found
    return h, gain, rest[-1]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_taken_for_the_stream_itself(name: str) -> None:
    h, gain, node = made(LINKS[name])

    assert link(node) is h
    assert way(node, {gain}) == [node, h]


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_is_a_step_and_no_link(name: str) -> None:
    h, gain, node = made(FACTORS[name])

    assert link(node) is None
    assert before(node, {gain}) is h


@pytest.mark.parametrize("name", ENDS)
def test_what_is_no_multiple_of_the_stream_ends_it(name: str) -> None:
    _, gain, node = made(ENDS[name])

    assert before(node, {gain}) is None


def test_a_view_whose_sizes_are_not_known_is_no_link() -> None:
    _, gain, node = made(lambda h, gain: h.view(2, 3, 2, 2), sizes=False)

    assert before(node, {gain}) is None
