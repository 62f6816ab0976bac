"""A rerun computes what the whole graph would compute, and nothing that the change does not reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse.errors import CaptureError
from fxfuse.graph.rerun import Program


def traced(function: Callable[..., object]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    (found,) = [each for each in gm.graph.nodes if each.name == name]
    return found


def again(gm: fx.GraphModule, x: Tensor, changed: dict[str, Tensor], wanted: list[str]) -> dict[str, object]:
    program = Program(gm)
    job = program.plan([node(gm, name) for name in changed], [node(gm, name) for name in wanted])
    _, kept = program.run([x], job.given)
    return {n.name: v for n, v in program.rerun(job, kept, {node(gm, name): v for name, v in changed.items()})}


def test_what_depends_on_the_change_is_computed_anew_and_the_rest_is_not() -> None:
    calls: list[str] = []

    def counted(name: str, x: Tensor) -> Tensor:
        calls.append(name)
        return x + 1

    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(counted, ("a", x))
    b = graph.call_function(counted, ("b", x))
    c = graph.call_function(torch.mul, (a, b))
    d = graph.call_function(counted, ("d", c))
    graph.output((c, d))
    gm = fx.GraphModule({}, graph)

    made = again(gm, torch.tensor(1.0), {"counted": torch.tensor(10.0)}, ["mul", "counted_1", "counted_2"])

    assert made == {"mul": torch.tensor(20.0), "counted_2": torch.tensor(21.0)}
    assert calls == ["a", "b", "d", "d"]


def test_a_node_outside_of_those_allowed_keeps_its_value() -> None:
    gm = traced(lambda x: (x.sin() + 1) * x.sin().cos())
    program = Program(gm)
    x = node(gm, "x")
    job = program.plan([x], [node(gm, "mul")], within=[node(gm, n) for n in ("sin", "add", "mul")])
    one, other = torch.tensor(0.3), torch.tensor(0.7)

    output, kept = program.run([one], job.given)
    ((_, made),) = program.rerun(job, kept, {x: other})

    assert output == (one.sin() + 1) * one.sin().cos()
    assert made == (other.sin() + 1) * one.sin().cos()


def test_values_are_freed_when_nobody_needs_them_any_more() -> None:
    gm = traced(lambda x: x.sin().cos().tan())
    program = Program(gm)

    _, kept = program.run([torch.ones(2)], [node(gm, "cos")])

    assert list(kept) == [node(gm, "cos")]


def test_memory_written_in_place_is_made_anew_for_each_run() -> None:
    """As routed experts do: a buffer of zeros that depends on nothing, and additions to it that do."""

    graph = fx.Graph()
    h = graph.call_function(torch.add, (graph.placeholder("x"), 1))
    buffer = graph.call_function(torch.zeros, (2,))
    written = graph.call_method("add_", (buffer, h))
    graph.output(graph.call_function(torch.mul, (written, 2)))
    gm = fx.GraphModule({}, graph)
    program = Program(gm)
    job = program.plan([node(gm, "add")], [node(gm, "mul")])

    output, kept = program.run([torch.ones(2)], job.given)
    results = [dict(program.rerun(job, kept, {node(gm, "add"): torch.full((2,), v)})) for v in (5.0, 7.0)]

    assert torch.equal(output, torch.full((2,), 4.0))  # type: ignore[arg-type]
    assert [float(r[node(gm, "mul")][0]) for r in results] == [10.0, 14.0]  # type: ignore[index]


def test_a_write_to_an_input_cannot_run_twice() -> None:
    def model(x: Tensor, cache: Tensor) -> Tensor:
        h = x + 1
        cache.copy_(h)
        return h * 2

    gm = traced(model)

    with pytest.raises(CaptureError, match="writes to cache in place.*use_cache=False"):
        Program(gm).plan([node(gm, "add")], [node(gm, "mul")])


def test_random_numbers_are_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    with pytest.raises(CaptureError, match="random"):
        Program(traced(Noisy()))
