"""Simplify removes what computes nothing and what writes needlessly, and changes no output and no side effect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse.passes import simplify
from tests.models.blocks import (
    WIDTH,
    Layer,
    Stream,
    SwiGLU,
    Traced,
    assert_same,
    flat_tensors,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)


class Function(nn.Module):
    def __init__(self, f: Callable[..., object]) -> None:
        super().__init__()
        self.f = f
        self.register_buffer("buffer", torch.ones(2, 3, WIDTH, dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> object:
        return self.f(self, *inputs)


@torch.no_grad()
def assert_unchanged(model: nn.Module, traced: Traced, *args: Tensor) -> None:
    """The same outputs, and the same values left in the inputs and the buffers."""
    own = tuple(arg.clone() for arg in args)
    for _, buffer in model.named_buffers():
        buffer.fill_(1.0)
    expected = [t.clone() for t in flat_tensors(model(*own))]
    written = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _, buffer in [*model.named_buffers(), *traced.gm.named_buffers()]:
        buffer.fill_(1.0)
    assert_same(traced(), expected)
    buffers = dict(traced.gm.named_buffers()) or dict(model.named_buffers())
    for name, value in written.items():
        assert name not in buffers or torch.equal(buffers[name], value)
    given = [value for value in traced.inputs if isinstance(value, Tensor) and value.shape == own[0].shape]
    assert any(torch.equal(value, own[0]) for value in given)


# What it does, how many nodes that removes, and what the report calls them.
REMOVED: dict[str, tuple[Callable[..., object], str]] = {
    "a cast to the dtype at hand": (lambda m, x: (x * 2).to(torch.float64) + 1, "removed cast"),
    "a cast by method": (lambda m, x: (x * 2).double() + 1, "removed cast"),
    "a cast to another's dtype": (lambda m, x: (x * 2).type_as(x) + 1, "removed cast"),
    "idle dropout": (lambda m, x: F.dropout(x * 2, 0.1, False) + 1, "removed dropout"),
    "dropout of p=0": (lambda m, x: F.dropout(x * 2, 0.0, True) + 1, "removed dropout"),
    "added zeros": (lambda m, x: torch.zeros_like(x) + x * 2, "removed add"),
    "zeros added": (lambda m, x: x * 2 + torch.zeros_like(x), "removed add"),
    "Python's sum": (lambda m, x: sum([x * 2, x * 3]), "removed add"),
    "zero added": (lambda m, x: torch.add(x * 2, 0, alpha=3), "removed add"),
    "scaled zeros added": (lambda m, x: torch.add(x * 2, torch.zeros_like(x), alpha=3), "removed add"),
    "a copy": (lambda m, x: x.clone() + 1, "removed clone"),
    "zeros of one number": (lambda m, x: x * 2 + torch.zeros_like(x[0, 0]), "removed add"),
}


@on_every_road
def test_what_computes_nothing_is_removed(road: str) -> None:
    names = ["a cast by method", "idle dropout", "added zeros"] if road == "strict export" else list(REMOVED)
    for name in names:
        model = Function(REMOVED[name][0])
        traced = trace(model, vectors(), road=road)

        report = simplify(traced.gm)

        assert [edit.action for edit in report.done if edit.action != "translated"] == [REMOVED[name][1]], name
        assert traced.count("to", "dropout", "type_as", "double") == 0, name
        assert_unchanged(model, traced, vectors())


def scattered(m: nn.Module, x: Tensor) -> Tensor:
    """Mixtral's routed sum: zeros that are no zeros once they are read."""
    total = torch.zeros_like(x)
    total.index_add_(1, torch.arange(3), x * 3)
    return x * 2 + total


def assigned(m: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total[:, 1] = x[:, 1]
    return x * 2 + total


def through_a_view(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x * 2
    same = F.dropout(h, 0.1, False)
    same.view(-1).mul_(3)
    return same, h


def zeros_through_a_view(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x * 2
    copy = h + torch.zeros_like(h)
    copy.view(-1).mul_(3)
    return copy, h


def cast_then_written(m: nn.Module, x: Tensor) -> Tensor:
    same = x.to(torch.float64)
    same += 1
    return same


def dropped_then_written(m: nn.Module, x: Tensor) -> Tensor:
    """In eval mode dropout returns its input, so this writes to the caller's tensor."""
    h = F.dropout(x, 0.1, False)
    h += torch.sin(h)
    return h


def copied_then_written(m: nn.Module, x: Tensor) -> Tensor:
    h = x.clone()
    h.view(-1).mul_(3)
    return h + x


KEPT: dict[str, Callable[..., object]] = {
    "a copy that is handed out": lambda m, x: x.clone(),
    "a view of one that is": lambda m, x: x.clone().view(-1),
    "a copy that is written through a view": copied_then_written,
    "a cast that rounds": lambda m, x: (x * 2).to(torch.float32) + 1,
    "a cast there and back": lambda m, x: (x * 2).to(torch.float32).to(torch.float64) + 1,
    "zeros that broadcast": lambda m, x: x[:, :1] * 2 + torch.zeros_like(x),
    "the stream as the scaled side": lambda m, x: torch.add(torch.zeros_like(x), x, alpha=3),
    "zeros that promote": lambda m, x: x.float() + torch.zeros_like(x),
    "a number": lambda m, x: x * 2 + 1,
    "zero that promotes": lambda m, x: (x > 0) + 0.0,
    "ones": lambda m, x: x + torch.ones_like(x),
    "zeros that were written by index": scattered,
    "zeros that were written by assignment": assigned,
    "a value written through a view": through_a_view,
    "a sum of zeros written through a view": zeros_through_a_view,
    "the caller's tensor under a cast": cast_then_written,
    "the caller's tensor under dropout": dropped_then_written,
}


@on_both_roads
def test_what_computes_something_stays(road: str) -> None:
    for name, f in KEPT.items():
        model = Function(f)
        traced = trace(model, vectors(), road=road)

        report = simplify(traced.gm)

        assert [edit for edit in report.done if "removed" in edit.action and name != "a cast there and back"] == [], (
            name
        )
        assert_unchanged(model, traced, vectors())


@on_both_roads
def test_live_dropout_stays(road: str) -> None:
    model = Function(lambda m, x: F.dropout(x * 2, 0.5, True))
    traced = trace(model, vectors(), road=road)

    assert not simplify(traced.gm)
    assert traced.count("dropout") == 1


def plus(h: Tensor, f: Tensor) -> Tensor:
    h += f
    return h


def minus(h: Tensor, f: Tensor) -> Tensor:
    h -= f
    return h


IN_PLACE = [
    plus,
    minus,
    lambda h, f: h.add_(f),
    lambda h, f: h.add_(f, alpha=0.5),
    lambda h, f: h.sub_(f, alpha=0.5),
]


@on_every_road
def test_an_add_in_place_on_the_graphs_own_memory_becomes_a_plain_one(road: str) -> None:
    model = ready(Stream(*(Layer(SwiGLU(), add=add) for add in IN_PLACE)))
    traced = trace(model, vectors(), road=road)

    report = simplify(traced.gm)

    assert [edit.action for edit in report.done if "removed" not in edit.action] == ["made functional"] * len(IN_PLACE)
    assert traced.count("iadd", "isub", "add_", "sub_") == 0
    assert_unchanged(model, traced, vectors())


def on_the_input(m: nn.Module, x: Tensor) -> Tensor:
    x += torch.sin(x)
    return x * 2


def on_a_buffer(m: nn.Module, x: Tensor) -> Tensor:
    m.buffer.add_(x)
    return m.buffer * 2


def on_a_view_of_the_input(m: nn.Module, x: Tensor) -> Tensor:
    h = x.view(-1)
    h += torch.sin(h)
    return x * 2


def seen_through_a_view(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x * 2
    view = h.view(-1, WIDTH)
    h += torch.sin(h)
    return h, view * 2


def seen_through_an_unknown_view(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x * 2
    view = torch.movedim(h, 0, 1)
    h += torch.sin(h)
    return h, view * 2


def a_view_written(m: nn.Module, x: Tensor) -> Tensor:
    h = x * 2
    part = h[:, 1]
    part += 5 * x[:, 0]
    return h


def out_of_another(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, buffer = x * 2, torch.empty_like(x)
    made = torch.add(h, torch.sin(h), out=buffer)
    return made * 4, h * 3, buffer * 2


SEEN: dict[str, Callable[..., object]] = {
    f.__name__: f
    for f in (
        on_the_input,
        on_a_buffer,
        on_a_view_of_the_input,
        seen_through_a_view,
        seen_through_an_unknown_view,
        a_view_written,
        out_of_another,
    )
}


@on_both_roads
def test_an_add_in_place_that_somebody_sees_stays(road: str) -> None:
    for name, f in SEEN.items():
        model = Function(f)
        traced = trace(model, vectors(), road=road)

        report = simplify(traced.gm)

        assert not report.done, name
        assert_unchanged(model, traced, vectors())


def by_the_old_name(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x * 2
    h.add_(torch.sin(h))
    y = h * 3
    h.mul_(5)
    return h, y


@on_both_roads
def test_who_reads_a_value_after_it_was_written_reads_the_write(road: str) -> None:
    model = Function(by_the_old_name)
    traced = trace(model, vectors(), road=road)

    simplify(traced.gm)

    first = next(node for node in traced.gm.graph.nodes if "mul" in str(node.target))
    assert all("sin" in str(user.target) or "add" in str(user.target) for user in first.users)
    assert_unchanged(model, traced, vectors())


def test_a_simplified_graph_has_nothing_to_simplify() -> None:
    traced = trace(ready(Stream(*(Layer(SwiGLU(), add=add) for add in IN_PLACE))), vectors())
    simplify(traced.gm)
    before = traced.gm.code

    assert not simplify(traced.gm)
    assert traced.gm.code == before


def test_the_report_says_what_was_done_to_which_node() -> None:
    traced = trace(Function(lambda m, x: F.dropout(x * 2, 0.1, False) + 1), vectors())

    report = simplify(traced.gm)

    assert report.name == "simplify"
    assert str(report) == "simplify: 1 done, 0 refused\n  removed dropout dropout"
