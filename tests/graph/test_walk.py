from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse.errors import CaptureError
from fxfuse.graph.rerun import Program
from fxfuse.graph.walk import Route, Stage, Walk


class Chain(nn.Module):
    """Three steps, and a tap on the middle one that is used at the end."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first = x.sin()
        second = first @ a
        tap = second.cos()
        third = second.relu() @ b
        return third + first, tap


def traced() -> tuple[Program, dict[str, fx.Node]]:
    gm = fx.symbolic_trace(Chain())
    return Program(gm), {node.name: node for node in gm.graph.nodes}


def inputs(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(3, 3, dtype=torch.float64) for _ in range(3)]


def staged() -> tuple[Route, dict[str, fx.Node]]:
    program, nodes = traced()
    stages = [
        Stage(frozenset({nodes["sin"]}), program.plan({nodes["a"]}, {nodes["matmul"]})),
        Stage(frozenset({nodes["relu"]}), program.plan({nodes["b"]}, {nodes["matmul_1"]})),
        Stage(frozenset({nodes["add"], nodes["cos"]})),
    ]
    return Route(program, stages), nodes


def test_a_walk_ends_where_the_model_does() -> None:
    route, nodes = staged()
    given = inputs()
    walk = Walk(route, given)
    for _ in range(2):
        walk.reach()
        walk.leave({})
    walk.reach()

    wanted = Chain()(*given)
    assert torch.equal(walk.values[nodes["add"]], wanted[0])  # type: ignore[arg-type]
    assert torch.equal(walk.values[nodes["cos"]], wanted[1])  # type: ignore[arg-type]


def test_what_is_tried_changes_nothing_and_what_is_decided_does() -> None:
    route, nodes = staged()
    x, a, b = inputs()
    other = inputs(1)[1]
    walk = Walk(route, [x, a, b])
    walk.reach()

    assert torch.equal(walk.attempt({nodes["a"]: other})[nodes["matmul"]], x.sin() @ other)  # type: ignore[arg-type]
    assert torch.equal(walk.attempt({nodes["a"]: a})[nodes["matmul"]], x.sin() @ a)  # type: ignore[arg-type]
    walk.leave({nodes["a"]: other})
    walk.reach()
    walk.leave({})
    walk.reach()
    wanted = Chain()(x, other, b)
    assert torch.equal(walk.values[nodes["add"]], wanted[0])  # type: ignore[arg-type]
    assert torch.equal(walk.values[nodes["cos"]], wanted[1])  # type: ignore[arg-type]


def test_only_what_is_still_needed_is_held() -> None:
    route, _ = staged()
    walk = Walk(route, inputs())
    held: list[set[str]] = []
    for _ in range(2):
        walk.reach()
        walk.leave({})
        held.append({node.name for node in walk.values if node.op != "placeholder"})

    assert held == [{"sin", "matmul"}, {"sin", "matmul_1", "cos"}]


class Regional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            first = x.sin()
            return first.cos()


def test_no_stage_stops_inside_an_autocast_region() -> None:
    held: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: list[Tensor]) -> object:
        held.append(gm)
        return gm.forward

    torch.compile(Regional(), backend=keep)(torch.randn(3))  # type: ignore[arg-type]
    program = Program(held[0])
    sine = next(node for node in program.nodes if node.target == "sin")
    with pytest.raises(CaptureError, match="autocast"):
        Route(program, [Stage(frozenset({sine}))])
