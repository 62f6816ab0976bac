"""What the runner owns: that no rewrite escapes verification or the fuel, facts found anew, dumps, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from fxfuse import Plan
from fxfuse.backend.frontend import capture
from fxfuse.cpu import prepack
from fxfuse.errors import OptionError, VerifyError
from fxfuse.passes import REPORTS, add_in_kernel, apply_plan, fuse_ffn, parallelize
from fxfuse.passes.base import Control, Fusion, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.drop import Drop
from fxfuse.passes.fill_in import FillIn
from fxfuse.passes.runner import run, running
from fxfuse.passes.verify import Claim
from fxfuse.stream.branch import Term
from tests.models.blocks import WIDTH, Attention, Stream, SwiGLU, Traced, assert_same, ready, trace, vectors

PAIR = Plan(parallel=[["layers.0.body", "layers.1.body"]])


def wide_by_kernels() -> Traced:
    """Two FFNs as one, by the kernels, that the stream adds."""
    traced = trace(ready(Stream(SwiGLU(), SwiGLU())), vectors())
    parallelize(traced.gm, PAIR.parallel)
    fuse_ffn(traced.gm, kernels="fxfuse")
    return traced


class TestAddInKernel:
    def test_what_it_makes_is_what_it_replaces(self) -> None:
        traced = wide_by_kernels()
        expected = traced()

        report = run(traced.gm, add_in_kernel.AddInKernel(), inputs=traced.inputs, verify=True)

        assert len(report.done) == 1
        assert_same(traced(), expected)

    def test_a_wrong_one_is_an_error_and_is_taken_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        traced = wide_by_kernels()
        (call,) = traced.gm.graph.find_nodes(op="call_function", target=add_in_kernel.WIDE_FFN)
        (total,) = call.users
        total.kwargs = {"alpha": 2.0}
        traced.gm.recompile()
        before = traced.gm.code
        found = add_in_kernel._Added(call, total.args[0], total)  # type: ignore[arg-type]  # a node
        monkeypatch.setattr(add_in_kernel, "_added", lambda ffn: found)

        with pytest.raises(VerifyError, match=call.name):
            run(traced.gm, add_in_kernel.AddInKernel(), inputs=traced.inputs, verify=True)

        assert traced.gm.code == before

    def test_it_costs_fuel(self) -> None:
        traced = trace(ready(Stream(SwiGLU(), SwiGLU())), vectors())

        apply_plan(traced.gm, PAIR, names=traced.names, kernels="fxfuse", max_rewrites=1)

        by_name = {report.name: report for report in traced.gm.meta[REPORTS]}
        assert len(by_name["fuse_ffn"].done) == 1
        assert not by_name["add_in_kernel"]
        assert [edit.detail for edit in by_name["add_in_kernel"].refused] == ["max_rewrites is spent"]


@pytest.mark.usefixtures("prepacked_wins")
class TestPrepack:
    @pytest.fixture
    def prepacked_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prepack, "prepacked_wins", lambda size: True)
        monkeypatch.setattr(prepack, "LEAST", 0)

    @staticmethod
    def sized() -> tuple[fx.GraphModule, tuple[torch.Tensor, ...]]:
        model = ready(Stream(SwiGLU()))
        (captured,) = capture(model, vectors())
        run(captured.gm, FillIn())
        return captured.gm, captured.inputs

    def test_what_it_makes_is_what_it_replaces(self) -> None:
        gm, inputs = self.sized()

        report = run(gm, prepack.Prepack(), inputs=inputs, verify=True)

        assert any(len(edit.branches) == 2 for edit in report.done)

    def test_a_wrong_one_is_an_error_and_is_taken_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gm, inputs = self.sized()
        before = gm.code
        right = prepack.slices
        monkeypatch.setattr(prepack, "slices", lambda *given: right(*given)[::-1])

        with pytest.raises(VerifyError, match="prepacked weight"):
            run(gm, prepack.Prepack(), inputs=inputs, verify=True)

        assert gm.code == before

    def test_it_costs_fuel(self) -> None:
        gm, _ = self.sized()

        report = run(gm, prepack.Prepack(), max_rewrites=1)

        assert len(report.done) == 1
        assert report.refused
        assert {edit.detail for edit in report.refused} == {"max_rewrites is spent"}


@dataclass(frozen=True)
class _Node:
    node: fx.Node
    detail = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.node.name,)


@dataclass(frozen=True)
class _Negate(Fusion[_Node]):
    """A pass that is wrong: it negates what the stream returns."""

    name, verb, done, product = "negate", "negate", "negated", "its opposite"

    def find(self, graph: Canonical, report: PassReport) -> Sequence[_Node]:
        return [_Node(graph.streams[0].sums[-1].out)]

    def write(self, graph: Canonical, rewrites: Sequence[_Node]) -> Iterator[tuple[_Node, Claim]]:
        for rewrite in rewrites:
            with graph.graph.inserting_after(rewrite.node):
                made = graph.graph.call_function(torch.neg, (rewrite.node,))
            made.meta = dict(rewrite.node.meta)
            yield rewrite, Claim([([Term(made)], [Term(rewrite.node)])])
            rewrite.node.replace_all_uses_with(made, delete_user_cb=made.__ne__)


def test_every_fusion_is_verified_whatever_it_does() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors())

    with pytest.raises(VerifyError, match="its opposite"):
        run(traced.gm, _Negate(), inputs=traced.inputs, verify=True)

    assert run(traced.gm, _Negate(), inputs=traced.inputs, verify=True, max_rewrites=0).refused


@dataclass(frozen=True)
class _Names(Pass):
    """A pass that does nothing and notes which branches it was shown."""

    name = "names"
    seen: list[list[str]]

    def run(self, graph: Canonical, control: Control) -> PassReport:
        self.seen.append([branch.name for stream in graph.streams for branch in stream.branches])
        return PassReport(self.name)


def test_a_pass_sees_the_streams_as_those_before_it_left_them() -> None:
    traced = trace(ready(Stream(Attention(), SwiGLU(), SwiGLU())), vectors())
    seen: list[list[str]] = []

    with running(traced.gm) as runner:
        first = runner.name(traced.names).streams
        runner(_Names(seen))
        runner(Drop(frozenset({"layers.0.body"})))
        runner(_Names(seen))

    assert [branch.name for stream in first for branch in stream.branches] == seen[0]
    assert seen == [["layers.0.body", "layers.1.body", "layers.2.body"], ["layers.1.body", "layers.2.body"]]


def test_streams_are_found_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.passes import canonical

    found: list[object] = []
    right = canonical.find_streams
    monkeypatch.setattr(canonical, "find_streams", lambda *given: found.append(given) or right(*given))
    traced = trace(ready(Stream(SwiGLU(), SwiGLU())), vectors())

    apply_plan(traced.gm, Plan(), names=traced.names, merge_gate_up=True)

    assert len(found) == 1


def test_the_graph_is_dumped_as_it_was_and_after_each_pass_that_changed_it(tmp_path: Path) -> None:
    traced = trace(ready(Stream(SwiGLU(), SwiGLU())), vectors())

    apply_plan(traced.gm, PAIR, names=traced.names, dump=tmp_path / "graph")

    files = sorted(path.name for path in (tmp_path / "graph").iterdir())
    assert files[0] == "00_as_given.py"
    assert {name[3:] for name in files} >= {"parallelize.py", "fuse_ffn.py"}
    assert "drop.py" not in {name[3:] for name in files}
    assert "linear" in (tmp_path / "graph" / files[0]).read_text()


def test_the_backend_dumps_each_graph_in_a_folder_of_its_own(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = ready(Stream(SwiGLU(), SwiGLU()))
    options = {"plan": PAIR, "inner": "eager", "dump": str(tmp_path)}

    for tokens in (3, 5):
        torch.compile(model, backend="ffnfuse", options=options, dynamic=False)(vectors(2, tokens, WIDTH))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph0", "graph1"]


def test_without_a_plan_too_the_graph_is_dumped_as_it_was_traced(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = ready(Stream(SwiGLU(), nn.Dropout(0.5)).eval())

    torch.compile(model, backend="ffnfuse", options={"inner": "eager", "dump": str(tmp_path)})(vectors())

    assert "dropout" in (tmp_path / "graph0" / "00_as_given.py").read_text()


def test_a_number_of_rewrites_is_not_negative() -> None:
    traced = trace(ready(Stream(SwiGLU(), SwiGLU())), vectors())

    with pytest.raises(OptionError, match="max_rewrites"):
        fuse_ffn(traced.gm, max_rewrites=-1)
