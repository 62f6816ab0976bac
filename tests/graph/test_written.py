"""Who reads memory after it was written depends on the write, by whatever alias, and no recogniser looks past it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.backend.frontend import capture
from fxfuse.graph.order import writes_in_vain
from fxfuse.graph.written import as_written, tie_writes, untie_writes, written_by
from fxfuse.passes import fuse_ffn, merge_gate_up, simplify
from tests.models.edits import Edit, edited

EDITS = Edit.__args__  # type: ignore[attr-defined]  # the values of a Literal


@torch.library.custom_op("fxfuse_tests::silu_and_mul", mutates_args=("out",))
def silu_and_mul(out: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def traced(f: Callable[..., object]) -> fx.Graph:
    graph = fx.symbolic_trace(f).graph
    tie_writes(graph)
    return graph


def reads(graph: fx.Graph, name: str) -> list[str]:
    """What the node reads, writes it comes after in brackets."""
    (node,) = [node for node in graph.nodes if node.name == name]
    return [f"{s.args[0]}[{write}]" if (write := written_by(s)) else s.name for s in node.all_input_nodes]


def test_a_reader_after_a_write_by_index_depends_on_it_and_one_before_does_not() -> None:
    def f(x: Tensor) -> Tensor:
        a = torch.relu(x)
        b = torch.cos(a)
        a.narrow(0, 0, 1).fill_(0)
        return torch.sin(a) + b

    graph = traced(f)

    assert reads(graph, "cos") == ["relu"]
    assert reads(graph, "sin") == ["relu[fill_]"]


def test_a_write_through_a_view_of_a_view_is_seen_by_the_base_and_by_other_views() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(x)
        other = a.t()
        a.view(-1).narrow(0, 0, 2).zero_()
        return torch.sin(a), torch.cos(other)

    graph = traced(f)

    assert reads(graph, "sin") == ["relu[zero_]"]
    assert reads(graph, "cos") == ["t[zero_]"]


def test_a_write_that_returns_what_it_overwrote_is_read_itself() -> None:
    graph = traced(lambda x: torch.relu(x).add_(1).mul_(2) + 0)

    assert not graph.find_nodes(op="call_function", target=as_written)


def test_later_writes_come_after_earlier_ones() -> None:
    def f(x: Tensor) -> Tensor:
        a = torch.relu(x)
        a.narrow(0, 0, 1).fill_(0)
        a.narrow(0, 1, 1).fill_(1)
        return torch.sin(a)

    graph = traced(f)

    (sin,) = [node for node in graph.nodes if node.name == "sin"]
    (last,) = sin.all_input_nodes
    assert written_by(last).name == "fill__1"
    assert written_by(last.args[0]).name == "fill_"


def test_tying_twice_is_tying_once_and_untying_gives_the_graph_back() -> None:
    def f(x: Tensor) -> Tensor:
        a = torch.relu(x)
        a.narrow(0, 0, 1).fill_(0)
        return torch.sin(a) + a.sum()

    graph = fx.symbolic_trace(f).graph
    before = str(graph)
    tie_writes(graph)
    once = str(graph)
    tie_writes(graph)

    assert str(graph) == once != before
    untie_writes(graph)
    assert str(graph) == before


def test_a_write_is_in_vain_once_nobody_reads_what_it_wrote() -> None:
    def f(x: Tensor) -> Tensor:
        a, b = torch.relu(x), torch.relu(x)
        a.chunk(2)[1].zero_()
        b.chunk(2)[1].zero_()
        return a

    graph = fx.symbolic_trace(f).graph

    assert [writes_in_vain(node) for node in graph.nodes if node.target == "zero_"] == [False, True]


class FFN(nn.Module):
    """Gated, of one norm outside; ``edit`` says what is edited where."""

    def __init__(self, place: str = "", edit: Edit | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.place, self.edit = place, edit

    def at(self, place: str, x: Tensor) -> Tensor:
        return edited(self.edit, x) if place == self.place else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("input", x)
        gate, up = self.at("gate", self.gate(x)), self.at("up", self.up(x))
        return self.at("output", self.down(self.at("hidden", F.silu(gate) * up)))


class Chain(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one_norm, self.other_norm = nn.RMSNorm(8), nn.RMSNorm(8)
        self.one, self.other = one, other
        self.double().requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.one(self.one_norm(h))
        return h + self.other(self.other_norm(h))


class Side(Chain):
    """Two FFNs that the model itself runs in parallel: no plan is needed for them to fuse."""

    def forward(self, h: Tensor) -> Tensor:
        return h + self.one(self.one_norm(h)) + self.other(self.other_norm(h))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("place", ["input", "gate", "up", "hidden", "output"])
def test_an_edit_anywhere_in_an_ffn_is_kept(place: str, edit: Edit) -> None:
    """Two FFNs in parallel as the model has them, in a graph of Dynamo and in one of torch.export."""
    model, h = Side(FFN(), FFN(place, edit)), torch.randn(2, 5, 8, dtype=torch.float64)
    (captured,) = capture(model, h)
    exported = torch.export.export(model, (h,)).module()

    simplify(captured.gm)
    fuse_ffn(captured.gm)
    merge_gate_up(captured.gm)
    fuse_ffn(exported)

    torch.testing.assert_close(captured.gm(*captured.inputs)[0], model(h), rtol=0, atol=1e-10)
    torch.testing.assert_close(exported(h), model(h), rtol=0, atol=1e-10)
    assert not captured.gm.graph.find_nodes(op="call_function", target=as_written)


def test_explain_says_that_a_value_is_edited_in_place() -> None:
    model, h = Chain(FFN("hidden", "units"), FFN("output", "token")), torch.randn(2, 5, 8, dtype=torch.float64)
    plan = fxfuse.Plan(parallel=[["one", "other"]])

    reasons = {branch.name: branch.reason for branch in fxfuse.explain(model, h, plan=plan).branches}

    assert reasons["one"] == "its hidden units are edited in place (setitem)"
    assert reasons["other"] == "its output is not a linear projection but edited in place (setitem_1)"


class BehindAnOp(nn.Module):
    """vLLM's spelling: the hidden units are an output argument."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate_up(x)
        out = torch.empty(*x.shape[:-1], 12, dtype=x.dtype)
        silu_and_mul(out, x)
        return self.down(out)


def test_an_ffn_behind_an_op_with_an_output_argument_is_a_branch_that_plans_reach() -> None:
    model, h = Chain(BehindAnOp(), BehindAnOp()), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = h + model.one(model.one_norm(h)) + model.other(model.other_norm(h))
    explained = fxfuse.explain(model, h)

    for plan, wanted in (
        (fxfuse.Plan(parallel=[["one", "other"]]), expected),
        (fxfuse.Plan(drop=["other"]), h + model.one(model.one_norm(h))),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager", "strict": True})
        torch.testing.assert_close(compiled(h), wanted, rtol=0, atol=1e-10)

    assert [branch.name for branch in explained.branches] == ["one", "other"]
    assert all("edited in place" in branch.reason for branch in explained.branches)


class Experts(nn.Module):
    """Two experts by modality: each writes its tokens by index into a fresh output."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = FFN(), FFN()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :2] = self.text(x[:, :2])
        out[:, 2:] = self.image(x[:, 2:])
        return out


@pytest.mark.parametrize("dropped", ["one", "other"])
def test_experts_that_write_by_index_can_be_dropped_and_moved(dropped: str) -> None:
    model, h = Chain(Experts(), Experts()), torch.randn(2, 5, 8, dtype=torch.float64)
    kept = "other" if dropped == "one" else "one"

    for plan, wanted in (
        (fxfuse.Plan(drop=[dropped]), h + getattr(model, kept)(getattr(model, f"{kept}_norm")(h))),
        (
            fxfuse.Plan(parallel=[["one", "other"]]),
            h + model.one(model.one_norm(h)) + model.other(model.other_norm(h)),
        ),
    ):
        torch._dynamo.reset()
        (captured,) = capture(model, h)
        fxfuse.passes.apply_plan(captured.gm, plan, names=captured.names, strict=True)
        torch.testing.assert_close(captured.gm(*captured.inputs)[0], wanted, rtol=0, atol=1e-10)
        writes = [node for node in captured.gm.graph.nodes if "setitem" in node.name]
        assert len(writes) == (2 if plan.drop else 4)  # what was dropped writes nothing any more


class Reread(nn.Module):
    """A term of an inner sum is overwritten before the outer sum is made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.other = nn.RMSNorm(8), FFN(), FFN()
        self.double().requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        f, g = self.one(x), self.other(x)
        inner = h + f
        f.zero_()
        return inner + g + f


def test_what_an_inner_sum_added_is_not_read_again_after_it_was_overwritten() -> None:
    model, h = Reread(), torch.randn(2, 5, 8, dtype=torch.float64)
    (captured,) = capture(model, h)

    fxfuse.passes.apply_plan(captured.gm, fxfuse.Plan())

    torch.testing.assert_close(captured.gm(*captured.inputs)[0], model(h), rtol=0, atol=1e-10)


def spelled(h: Tensor, spelling: str) -> Tensor:
    """A word of a dialect whose operand is overwritten between its two halves."""
    x = torch.relu(h)
    match spelling:
        case "gain last":
            y = torch.full((8,), 3.0, dtype=h.dtype) * x
            x.zero_()
            return y / h.norm(dim=-1, keepdim=True)
        case "stack":
            y = torch.stack([x, h])
            x.zero_()
            return y.sum(0)
        case "norm":
            y = torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5)
            x.zero_()
            return y[0]
        case _:
            y = x.t().reshape(8, 5, 2)
            x.zero_()
            return y[..., 0]


@pytest.mark.parametrize("spelling", ["gain last", "stack", "norm", "part"])
def test_a_word_is_not_translated_past_a_write_to_what_it_reads(spelling: str) -> None:
    h = torch.randn(10, 8, dtype=torch.float64)

    class Net(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return spelled(h, spelling) + 0.0

    (captured,) = capture(Net(), h)
    simplify(captured.gm)

    torch.testing.assert_close(captured.gm(*captured.inputs)[0], Net()(h), rtol=0, atol=0)
